// Package bundle turns a bundle folder into plain structs and back. The command
// line reads a folder, the server reads an upload, and tests read an embedded
// tree; this package is why all three see the same thing and report the same
// mistakes. It knows the shape of a bundle, not Cedar: policy and schema text
// passes through unread.
package bundle

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/cedarpost/cedarpost/internal/entityuid"
)

// Names of the files that a bundle knows at its top level. Beside them it holds
// policies: any file that ends in .cedar, at any depth.
const (
	ManifestName = "bundle.yaml"
	SchemaName   = "schema.cedarschema"
	FieldsName   = "fields.yaml"
	EntitiesName = "entities.json"
	TestsName    = "tests.yaml"
)

// What Bundle.OnForbidError may hold.
const (
	Deny = "deny"
	Skip = "skip"
)

// A File is one file of a bundle. Path is relative, with forward slashes.
type File struct {
	Path    string
	Content []byte
}

// A Bundle is the schema, policies, field catalogue and tests of one
// application, as the folder holds them. It shares file contents with whoever
// made it; nobody changes them.
type Bundle struct {
	Name string
	// Description and Owners are shown with the bundle and have no effect.
	Description string
	Owners      []string
	// OnForbidError says what a forbid that errors does: Deny (the default)
	// or Skip, which is Cedar's own rule.
	OnForbidError string

	Schema   File
	Policies []File  // every *.cedar, sorted by path
	Fields   []Field // sorted by type, then path
	Entities []byte  // entities.json as it stands, nil if there is none
	Tests    []Test  // in the order of tests.yaml
	Files    []File  // every file the bundle knows, sorted by path
}

// A Field is one line of the field catalogue: a path of an entity type and the
// groups it is in. A path with other paths below it is not a leaf; its groups
// hold for everything below it.
//
// Where Type is a namespace's FieldGroup, Path names a group and Groups are
// the groups that it is in.
type Field struct {
	Type   string // "Shop::Order"
	Path   string // "customer.email"
	Groups []string
	Line   int
	Column int
}

// IsGroup reports whether the entry nests groups and does not catalogue a field.
func (f Field) IsGroup() bool { return baseName(f.Type) == groupType }

// baseName is the last identifier of a type name.
func baseName(typ string) string { return typ[strings.LastIndexByte(typ, ':')+1:] }

// A Ref names one entity.
type Ref struct{ Type, ID string }

// String writes the reference as Cedar text, Shop::User::"bob".
func (r Ref) String() string { return entityuid.Format(r.Type, r.ID) }

// A Test is one check of tests.yaml.
type Test struct {
	Name      string
	Line      int
	Principal Ref
	Action    Ref
	Resource  Ref
	// Context and the elements of Entities hold string, bool, int64, []any and
	// map[string]any only. Entities follow Cedar's entity JSON.
	Context    map[string]any
	Entities   []any
	Fields     []string
	AllFields  bool // fields: all
	RequireAll bool
	Expect     Expect
}

// Expect is what a Test wants to see. A nil slice or an empty string was not
// given and is not compared; an empty slice was given and must match.
type Expect struct {
	Decision    string   // "allow" or "deny"
	DeniedAt    string   // "FUNCTION", "OBJECT" or "FIELD"
	Permitted   []string // the exact set of permitted leaves
	Denied      []string // the exact set of denied paths
	Determining []string // policy ids
	Obligations []string
	Advice      []string
}

// Digest is the SHA-256, in hex, over every file: path and content, each with
// its length before it. It does not cover a name that came from the folder.
func (b *Bundle) Digest() string {
	h := sha256.New()
	part := func(p []byte) {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(p)))
		h.Write(n[:])
		h.Write(p)
	}
	for _, f := range b.Files {
		part([]byte(f.Path))
		part(f.Content)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// A Problem is one mistake in a bundle. Line and Column count from 1; 0 means
// that the problem is about the whole file.
type Problem struct {
	File    string
	Line    int
	Column  int
	Message string
	Hint    string // what to do about it, may be empty
}

// String writes the problem as "file:line:col: message".
func (p Problem) String() string {
	switch {
	case p.Line > 0 && p.Column > 0:
		return fmt.Sprintf("%s:%d:%d: %s", p.File, p.Line, p.Column, p.Message)
	case p.Line > 0:
		return fmt.Sprintf("%s:%d: %s", p.File, p.Line, p.Message)
	case p.File != "":
		return p.File + ": " + p.Message
	}
	return p.Message
}

// Problems is every mistake found in a bundle, and the error that ReadDir, Read
// and FromFiles return.
type Problems []Problem

// Error writes one problem to a line, with its hint.
func (ps Problems) Error() string {
	var b strings.Builder
	for i, p := range ps {
		if i > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(p.String())
		if p.Hint != "" {
			b.WriteString(" (" + p.Hint + ")")
		}
	}
	return b.String()
}

// maxProblems keeps a hostile upload from growing a report without end.
const maxProblems = 200

// add appends a problem while there is room.
func (ps *Problems) add(p Problem) {
	switch {
	case len(*ps) < maxProblems:
		*ps = append(*ps, p)
	case len(*ps) == maxProblems:
		*ps = append(*ps, Problem{File: p.File, Message: "too many problems, the rest are not listed"})
	}
}
