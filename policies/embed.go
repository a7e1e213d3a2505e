// Package policies carries the bundles that ship inside the binary, so that a
// first run needs no files beside it.
package policies

import (
	"embed"
	"io/fs"
)

//go:generate go run ./shopgen -o shop/entities.json

//go:embed all:shop
var shop embed.FS

// Shop is the example bundle: a web shop's orders, seen by customers, support,
// finance and managers. `cedarpost dev` loads it.
func Shop() fs.FS {
	sub, err := fs.Sub(shop, "shop")
	if err != nil {
		panic(err) // the folder is embedded above
	}
	return sub
}
