package engine

import (
	"fmt"
	"strings"
)

// Source is one bundle as text.
type Source struct {
	Name string
	// SchemaFile names the schema in findings; Schema is its text in Cedar's
	// schema syntax.
	SchemaFile, Schema string
	// Schemas, if there are any, are the files that make the schema, in place of SchemaFile and Schema.
	Schemas  []SchemaText
	Policies []PolicyText
	// FieldsFile names the catalogue in findings.
	FieldsFile string
	Fields     []Field
	// ManifestFile names bundle.yaml in findings about PrincipalTokens, which says how access tokens
	// become principals, and about Exports.
	ManifestFile    string
	PrincipalTokens []PrincipalToken
	// Exports are the entity types that other bundles may use.
	Exports []Export
	// Published says that the bundle was accepted before, perhaps by a version that did
	// not have all rules for annotations. It is not checked against those rules again
	// when another bundle is published.
	Published bool
	// SkipForbidErrors applies Cedar's own rule, that a policy that fails is ignored,
	// to forbids too.
	SkipForbidErrors bool

	// declared has the file of each declaration, if Schemas are given: see declarations.
	declared map[string]SchemaText
}

// PolicyText is a text of one or more policies. Line is where it begins in its
// file, from 1 (0 is read as 1).
type PolicyText struct {
	File string
	Line int
	Text string
	// JSON says that the text is in Cedar's JSON format: a policy, or a policy set.
	JSON bool
}

// Field is one catalogued path of an entity type with the groups it is in; for
// the type FieldGroup, Path names a group.
type Field struct {
	Type, Path   string
	Groups       []string
	Line, Column int
}

// Finding is one problem of a bundle. Line and Column count from 1, 0 is
// unknown.
type Finding struct {
	Bundle       string
	File         string
	Line, Column int
	Policy       string
	Message      string
	Hint         string
	Warning      bool
	// Other is another bundle that Message names, or whose namespace it names; "" if there is none.
	// Without is the message that names neither.
	Other, Without string
}

// String returns "file:line:column: message".
func (f Finding) String() string {
	var b strings.Builder
	if f.File != "" {
		b.WriteString(f.File)
		if f.Line > 0 {
			fmt.Fprintf(&b, ":%d", f.Line)
			if f.Column > 0 {
				fmt.Fprintf(&b, ":%d", f.Column)
			}
		}
		b.WriteString(": ")
	}
	if f.Policy != "" {
		fmt.Fprintf(&b, "policy %s: ", f.Policy)
	}
	b.WriteString(f.Message)
	return b.String()
}

// PolicyInfo is one policy with its text and its place in a file.
type PolicyInfo struct {
	ID, File string
	Line     int
	Text     string
}

// inJSON reports whether the file of the policy has it in Cedar's JSON format, by its name: what is stored has the
// text in place of the JSON.
func (p *policy) inJSON() bool { return strings.HasSuffix(p.file, ".json") }

func finding(p *policy, msg, hint string) Finding {
	return Finding{Bundle: p.ref.Bundle, File: p.file, Line: p.line, Column: p.column, Policy: p.ref.ID, Message: msg, Hint: hint}
}
