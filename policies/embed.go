// Package policies has the bundles that are embedded in the binary, so that a first run
// needs no files.
package policies

import (
	"embed"
	"io/fs"
)

//go:generate go run ./shopgen -o shop/entities.json

//go:embed all:shop all:admin all:starter
var bundles embed.FS

// Shop is the example bundle, about the orders of a web shop that customers, support,
// finance and managers may see. `cedarpost dev` publishes it.
func Shop() fs.FS { return folder("shop") }

// Starter is the bundle that `cedarpost init` writes, about documents of teams.
func Starter() fs.FS { return folder("starter") }

// Admin is the bundle that says what the callers of Cedarpost may do to it, by role.
func Admin() fs.FS { return folder("admin") }

func folder(name string) fs.FS {
	sub, err := fs.Sub(bundles, name)
	if err != nil {
		panic(err) // the folder is embedded
	}
	return sub
}
