// Package bundle reads a bundle folder into plain structs, and writes it. The command
// line reads a folder, the server reads an upload, and tests read an embedded folder.
// They share this package so that all three read the same and report the same mistakes.
// It knows the files of a bundle and not Cedar: it does not parse policies and schema.
package bundle

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/cedarpost/cedarpost/internal/entityuid"
)

// Names of the known files at the top level of a bundle. All other files of a bundle are policies, which end
// in .cedar or .cedar.json, and parts of its schema, which end in .cedarschema or .cedarschema.json, both at
// any depth. SchemaName is the usual name of a schema that is one file.
const (
	ManifestName = "bundle.yaml"
	SchemaName   = "schema.cedarschema"
	FieldsName   = "fields.yaml"
	EntitiesName = "entities.json"
	TestsName    = "tests.yaml"
)

// The values of Bundle.OnForbidError.
const (
	Deny = "deny"
	Skip = "skip"
)

// A File is one file of a bundle. Path is relative, with forward slashes.
type File struct {
	Path    string
	Content []byte
}

// JSON reports whether a policy or a schema is in Cedar's JSON format, and not in its own syntax.
func (f File) JSON() bool { return strings.HasSuffix(f.Path, ".json") }

// A Bundle is the schema, policies, field catalogue and tests of one application, as they
// are in the folder. It shares the contents of files with its maker, and they must not be
// changed.
type Bundle struct {
	Name string
	// Description and Owners are shown with the bundle and have no effect.
	Description string
	Owners      []string
	// OnForbidError says what a forbid does that fails to evaluate: Deny (the default) or
	// Skip, which is the rule of Cedar.
	OnForbidError string
	// Rules are what it asks for before it is published.
	Rules
	// PrincipalTokens says how access tokens become principals, sorted by issuer.
	PrincipalTokens []PrincipalToken
	// LintDisabled are ids of rules of lint that are switched off. There may be no such rule.
	LintDisabled []string
	// Exports are the entity types that other bundles may use, in the order of bundle.yaml.
	Exports []Export

	Schemas  []File  // every *.cedarschema and *.cedarschema.json, sorted by path; at least one
	Policies []File  // every *.cedar and *.cedar.json, sorted by path
	Fields   []Field // sorted by type, then path
	Entities []byte  // the content of entities.json, nil if there is none
	Tests    []Test  // in the order of tests.yaml
	Files    []File  // every known file, sorted by path
	// Ignored are the paths in the folder, or in the upload, that are not part of the bundle, sorted; that
	// of a folder that was left out as a whole ends with a slash.
	Ignored []string
}

// A Field is an entry of the field catalogue: a path of an entity type and the groups
// that it is in. If there are paths below it, it is not a leaf, and its groups apply to
// all paths below it.
//
// If Type is the FieldGroup of a namespace, Path is the name of a group, and Groups are
// the groups that the group is in.
type Field struct {
	Type   string // "Shop::Order"
	Path   string // "customer.email"
	Groups []string
	Line   int
	Column int
}

// IsGroup reports whether the entry is a group in groups, and not a field.
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

// Expect is the expected result of a Test. A nil slice or an empty string is not
// compared. An empty slice is compared.
type Expect struct {
	Decision    string   // "allow" or "deny"
	DeniedAt    string   // "FUNCTION", "OBJECT" or "FIELD"
	Permitted   []string // the exact set of permitted leaves
	Denied      []string // the exact set of denied paths
	Determining []string // policy ids
	Obligations []string
	Advice      []string
}

// Digest is the SHA-256, in hex, over path and content of every file, each after its
// length. It does not cover a name that was taken from the folder.
func (b *Bundle) Digest() string { return Digest(b.Files) }

// Digest is [Bundle.Digest] of files that may not be a valid bundle. They are those that a bundle has,
// in order of path.
func Digest(files []File) string {
	h := sha256.New()
	part := func(p []byte) {
		var n [8]byte
		binary.BigEndian.PutUint64(n[:], uint64(len(p)))
		h.Write(n[:])
		h.Write(p)
	}
	for _, f := range files {
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
	Hint    string // how to mend it; may be empty
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

// Problems are all mistakes that were found in a bundle. ReadDir, Read and FromFiles
// return it as error.
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

// maxProblems bounds the report about a hostile upload.
const maxProblems = 200

// add appends a problem if the list is not full.
func (ps *Problems) add(p Problem) {
	switch {
	case len(*ps) < maxProblems:
		*ps = append(*ps, p)
	case len(*ps) == maxProblems:
		*ps = append(*ps, Problem{File: p.File, Message: "too many problems, the rest are not listed"})
	}
}
