package engine

import (
	"fmt"
	"regexp"
	"sort"
	"strconv"
	"strings"

	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/schema"
	sast "github.com/cedar-policy/cedar-go/x/exp/schema/ast"
)

var schemaErrorAt = regexp.MustCompile(`^[^:]*:(\d+):(\d+): (.*)$`)

// parseSchema parses one bundle's schema.
func parseSchema(text string) (*sast.Schema, *textError) {
	if len(text) > MaxSchemaBytes {
		return nil, &textError{1, 1, fmt.Sprintf("schema of %d bytes, the limit is %d", len(text), MaxSchemaBytes), ""}
	}
	if err := checkSchemaNesting(text); err != nil {
		return nil, err
	}
	var sc schema.Schema
	sc.SetFilename("schema")
	if err := sc.UnmarshalCedar([]byte(text)); err != nil {
		te := &textError{line: 1, column: 1, msg: err.Error()}
		if m := schemaErrorAt.FindStringSubmatch(err.Error()); m != nil {
			te.line, _ = strconv.Atoi(m[1])
			te.column, _ = strconv.Atoi(m[2])
			te.msg = m[3]
		}
		return nil, te
	}
	return sc.AST(), nil
}

// checkSchemaNesting bounds the depth of records and sets before parsing.
func checkSchemaNesting(text string) *textError {
	depth, line, col := 0, 1, 0
	inString, inComment := false, false
	for i := 0; i < len(text); i++ {
		c := text[i]
		col++
		switch {
		case c == '\n':
			line, col, inComment = line+1, 0, false
		case inComment:
			if c == '\r' && i+1 < len(text) && text[i+1] != '\n' {
				// Cedar ends the comment here, cedar-go does not.
				return &textError{line, col, "a carriage return without a line feed in a comment", "end lines with a line feed"}
			}
		case inString:
			switch c {
			case '\\':
				i++
			case '"':
				inString = false
			}
		case c == '"':
			inString = true
		case c == '/' && i+1 < len(text) && text[i+1] == '/':
			inComment = true
		case strings.IndexByte("({[<", c) >= 0:
			if depth++; depth > MaxNesting {
				return &textError{line, col, fmt.Sprintf("nested deeper than %d", MaxNesting), ""}
			}
		case strings.IndexByte(")}]>", c) >= 0:
			depth--
		}
	}
	return nil
}

// namespacesOf lists the namespaces that a schema declares anything in; the
// empty one only when something stands outside all others.
func namespacesOf(sc *sast.Schema) []string {
	var out []string
	if len(sc.Entities)+len(sc.Enums)+len(sc.Actions)+len(sc.CommonTypes) > 0 {
		out = append(out, "")
	}
	for ns := range sc.Namespaces {
		out = append(out, string(ns))
	}
	sort.Strings(out)
	return out
}

// builtinNames must not be declared in the empty namespace. Every namespace that does
// not declare such a name itself would use that declaration, so one bundle could change
// the meaning of the schemas of all others.
var builtinNames = []sast.Ident{"Bool", "Boolean", "Long", "String", "ipaddr", "decimal", "datetime", "duration", "Set", "Record", "Entity", "Extension"}

// declaredBuiltins lists the built-in names that a schema declares in the empty
// namespace.
func declaredBuiltins(sc *sast.Schema) []sast.Ident {
	var out []sast.Ident
	for _, name := range builtinNames {
		_, entity := sc.Entities[name]
		_, enum := sc.Enums[name]
		_, common := sc.CommonTypes[name]
		if entity || enum || common {
			out = append(out, name)
		}
	}
	return out
}

// maxSchemaNodes bounds the types of a schema after each use of a common type is
// replaced with its definition. Every line like "type B = { x: A, y: A };" doubles them.
const maxSchemaNodes = 100_000

// sizer counts the nodes of types after common types are replaced with their
// definitions.
type sizer struct {
	common map[types.Path]sast.CommonType
	known  map[types.Path]int
}

// schemaNodes counts all nodes of a schema. It stops soon after maxSchemaNodes.
func schemaNodes(sc *sast.Schema) int {
	z := sizer{map[types.Path]sast.CommonType{}, map[types.Path]int{}}
	total := 0
	each := func(fn func(ns string, e sast.Entities, a sast.Actions, c sast.CommonTypes)) {
		fn("", sc.Entities, sc.Actions, sc.CommonTypes)
		for ns, d := range sc.Namespaces {
			fn(string(ns), d.Entities, d.Actions, d.CommonTypes)
		}
	}
	each(func(ns string, _ sast.Entities, _ sast.Actions, c sast.CommonTypes) {
		for name, t := range c {
			z.common[types.Path(qualify(ns, string(name)))] = t
		}
	})
	each(func(ns string, e sast.Entities, a sast.Actions, c sast.CommonTypes) {
		for _, ent := range e {
			total += z.size(ns, ent.Shape) + z.size(ns, ent.Tags)
		}
		for _, act := range a {
			if act.AppliesTo != nil {
				total += z.size(ns, act.AppliesTo.Context)
			}
		}
		for name := range c {
			total += z.named(types.Path(qualify(ns, string(name))))
		}
	})
	return total
}

func (z sizer) size(ns string, t sast.IsType) int {
	n := 1
	switch t := t.(type) {
	case nil:
		return 0
	case sast.RecordType:
		for _, a := range t {
			n = min(n+z.size(ns, a.Type), maxSchemaNodes+1)
		}
	case sast.SetType:
		n += z.size(ns, t.Element)
	case sast.TypeRef:
		name := types.Path(qualify(ns, string(t)))
		if _, ok := z.common[name]; !ok {
			name = types.Path(t)
		}
		n += z.named(name)
	}
	return min(n, maxSchemaNodes+1)
}

func (z sizer) named(name types.Path) int {
	t, ok := z.common[name]
	if !ok {
		return 0
	}
	n, ok := z.known[name]
	if !ok {
		z.known[name] = 0 // ends a cycle, which the resolver refuses later
		n = z.size(namespaceOf(types.EntityType(name)), t.Type)
		z.known[name] = n
	}
	return n
}

// mergeSchemas joins the schemas of all bundles, each namespace having one
// owner.
func mergeSchemas(all []*sast.Schema) *sast.Schema {
	out := &sast.Schema{Namespaces: sast.Namespaces{}}
	for _, sc := range all {
		if len(sc.Entities)+len(sc.Enums)+len(sc.Actions)+len(sc.CommonTypes) > 0 {
			out.Entities, out.Enums, out.Actions, out.CommonTypes = sc.Entities, sc.Enums, sc.Actions, sc.CommonTypes
		}
		for ns, decl := range sc.Namespaces {
			out.Namespaces[ns] = decl
		}
	}
	return out
}

// namesOnly returns a schema that declares the same names and refers to no others. Its common
// types are empty records, which can stand wherever a common type can.
func namesOnly(sc *sast.Schema) *sast.Schema {
	strip := func(entities sast.Entities, actions sast.Actions, types sast.CommonTypes) (sast.Entities, sast.Actions, sast.CommonTypes) {
		e, a, c := sast.Entities{}, sast.Actions{}, sast.CommonTypes{}
		for name := range entities {
			e[name] = sast.Entity{}
		}
		for name := range actions {
			a[name] = sast.Action{}
		}
		for name := range types {
			c[name] = sast.CommonType{Type: sast.RecordType{}}
		}
		return e, a, c
	}
	out := *sc
	out.Entities, out.Actions, out.CommonTypes = strip(sc.Entities, sc.Actions, sc.CommonTypes)
	out.Namespaces = sast.Namespaces{}
	for ns, decl := range sc.Namespaces {
		decl.Entities, decl.Actions, decl.CommonTypes = strip(decl.Entities, decl.Actions, decl.CommonTypes)
		out.Namespaces[ns] = decl
	}
	return &out
}
