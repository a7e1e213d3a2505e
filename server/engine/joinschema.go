package engine

import (
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/schema"
	sast "github.com/cedar-policy/cedar-go/x/exp/schema/ast"
)

// This file makes one schema of the schema files of a bundle. They are what Cedar calls schema fragments
// (Schema::from_schema_fragments of the cedar-policy crate): a namespace may stand in several files, each may
// use what another declares, and nothing may be declared twice.

// maxSchemaFilesBytes caps the schema files of a bundle together. Their joined text is held to
// [MaxSchemaBytes].
const maxSchemaFilesBytes = 4 * MaxSchemaBytes

// SchemaText is a schema file: Cedar's schema syntax, or Cedar's JSON format.
type SchemaText struct {
	File, Text string
	JSON       bool
}

// JoinSchemas returns the text, in Cedar's schema syntax, of several schema files or of one in JSON. It is the
// same at each call. If there are findings, which are without a bundle, there is no text.
func JoinSchemas(files []SchemaText) (text string, findings []Finding) {
	text, _, findings = joinSchemas(files)
	return text, findings
}

// joinSchemas is JoinSchemas that also returns the file of each declaration, see declarations.
func joinSchemas(files []SchemaText) (text string, declared map[string]SchemaText, findings []Finding) {
	j := joiner{joined: &sast.Schema{Namespaces: sast.Namespaces{}}, declared: map[string]SchemaText{}}
	total := 0
	for _, f := range files {
		if total += len(f.Text); total > maxSchemaFilesBytes {
			return "", nil, []Finding{{File: f.File, Message: fmt.Sprintf("the schema files have more than %d bytes together", maxSchemaFilesBytes)}}
		}
		sc, terr := parseSchemaFile(f)
		if terr != nil {
			j.findings = append(j.findings, Finding{File: f.File, Line: terr.line, Column: terr.column, Message: terr.msg, Hint: terr.hint})
			continue
		}
		j.add(f, sc)
		if f.JSON {
			j.inJSON = append(j.inJSON, fileSchema{f, sc})
		}
	}
	if len(j.findings) == 0 {
		j.shadowed()
	}
	if len(j.findings) > 0 {
		return "", j.declared, j.findings
	}
	whole := schema.NewSchemaFromAST(j.joined)
	written, err := whole.MarshalCedar()
	if err != nil || !sameSchema(whole, written) {
		of := files[0] // one in JSON, if there is any: names can be anything there
		if len(j.inJSON) > 0 {
			of = j.inJSON[0].file
		}
		return "", nil, []Finding{{File: of.File, Message: "the schema cannot be written in Cedar's schema syntax", Hint: "look at its names of types and attributes"}}
	}
	return string(written), j.declared, nil
}

type fileSchema struct {
	file   SchemaText
	schema *sast.Schema
}

type joiner struct {
	joined   *sast.Schema
	inJSON   []fileSchema
	declared map[string]SchemaText // see declarations
	findings []Finding
}

// add joins a file to the others.
func (j *joiner) add(f SchemaText, sc *sast.Schema) {
	twice := false
	for _, d := range declarations(sc) {
		other, before := j.declared[d]
		if before {
			twice = true
			line, column := declaredAt(f, d)
			first, _ := declaredAt(other, d)
			j.findings = append(j.findings, Finding{File: f.File, Line: line, Column: column, Message: fmt.Sprintf("%s is declared already, at %s:%d", d, other.File, first), Hint: "declare it once; a namespace may stand in several files"})
			continue
		}
		j.declared[d] = f
	}
	if twice {
		return
	}
	eachNamespace(sc, func(ns string, d sast.Namespace) {
		if _, known := j.declared["namespace "+ns]; !known {
			j.declared["namespace "+ns] = f
		}
		for name := range d.Actions { // some findings name the entity of the action
			j.declared[fmt.Sprintf("action %s::%q", qualify(ns, "Action"), string(name))] = f
		}
	})
	top := sast.Namespace{Entities: j.joined.Entities, Enums: j.joined.Enums, Actions: j.joined.Actions, CommonTypes: j.joined.CommonTypes}
	j.namespace(f, "", &top, sast.Namespace{Entities: sc.Entities, Enums: sc.Enums, Actions: sc.Actions, CommonTypes: sc.CommonTypes})
	j.joined.Entities, j.joined.Enums, j.joined.Actions, j.joined.CommonTypes = top.Entities, top.Enums, top.Actions, top.CommonTypes
	for name, ns := range sc.Namespaces {
		into := j.joined.Namespaces[name]
		j.namespace(f, string(name), &into, ns)
		j.joined.Namespaces[name] = into
	}
}

func (j *joiner) namespace(f SchemaText, name string, into *sast.Namespace, ns sast.Namespace) {
	for _, key := range sortedKeys(ns.Annotations) {
		if value, there := into.Annotations[key]; there && value != ns.Annotations[key] {
			j.findings = append(j.findings, Finding{File: f.File, Message: fmt.Sprintf("namespace %s has @%s with another value in another file", name, key), Hint: "annotate the namespace in one file"})
		}
	}
	into.Annotations = joinMaps(into.Annotations, ns.Annotations)
	into.Entities, into.Enums = joinMaps(into.Entities, ns.Entities), joinMaps(into.Enums, ns.Enums)
	into.Actions, into.CommonTypes = joinMaps(into.Actions, ns.Actions), joinMaps(into.CommonTypes, ns.CommonTypes)
}

func joinMaps[M ~map[K]V, K comparable, V any](a, b M) M {
	if len(a) == 0 && len(b) == 0 {
		return nil
	}
	out := make(M, len(a)+len(b))
	maps.Copy(out, a)
	maps.Copy(out, b)
	return out
}

// eachNamespace calls fn for the declarations outside of a namespace, and for each namespace, by name.
func eachNamespace(sc *sast.Schema, fn func(name string, ns sast.Namespace)) {
	fn("", sast.Namespace{Entities: sc.Entities, Enums: sc.Enums, Actions: sc.Actions, CommonTypes: sc.CommonTypes})
	for _, name := range sortedKeys(sc.Namespaces) {
		fn(string(name), sc.Namespaces[name])
	}
}

// declarations lists what a schema declares, as findings name it: "entity Shop::Order", "type Shop::Address",
// "action Shop::"View"". Entity types and their enumerated kind share the names.
func declarations(sc *sast.Schema) (list []string) {
	eachNamespace(sc, func(ns string, d sast.Namespace) {
		for _, name := range sortedKeys(d.CommonTypes) {
			list = append(list, "type "+string(qualify(ns, string(name))))
		}
		for _, name := range sortedKeys(d.Entities) {
			list = append(list, "entity "+string(qualify(ns, string(name))))
		}
		for _, name := range sortedKeys(d.Enums) {
			list = append(list, "entity "+string(qualify(ns, string(name))))
		}
		for _, name := range sortedKeys(d.Actions) {
			list = append(list, actionDeclaration(ns, string(name)))
		}
	})
	return list
}

func actionDeclaration(ns, name string) string {
	if ns != "" {
		ns += "::"
	}
	return fmt.Sprintf("action %s%q", ns, name)
}

// declaredAt returns the place of a declaration in its file, from 1. In JSON it is that of the first member or
// text of its name.
func declaredAt(f SchemaText, declaration string) (line, column int) {
	kind, name, _ := strings.Cut(declaration, " ")
	var ns string
	if kind == "action" {
		i := strings.IndexByte(name, '"')
		ns, name = strings.TrimSuffix(name[:i], "::"), name[i:]
		_ = json.Unmarshal([]byte(name), &name)
	} else {
		ns = namespaceOf(types.EntityType(name))
		name = baseName(types.EntityType(name))
	}
	if f.JSON {
		return inJSON(f.Text, name)
	}
	s, in, depth := scan(f.Text), "", 0
	for i, w := range s.words {
		switch {
		case w == "{":
			depth++
		case w == "}":
			if depth--; depth == 0 {
				in = ""
			}
		case w == "namespace" && depth == 0:
			for in = ""; i+1 < len(s.words) && s.words[i+1] != "{"; i++ {
				in += s.words[i+1]
			}
		case w == kind && in == ns && (s.word(i-2) == "@" || slices.Contains([]string{"", "{", "}", ";", ")"}, s.word(i-1))) && s.word(i+1) != ":" && s.word(i+1) != "?":
			for k := i + 1; k < len(s.words) && !slices.Contains([]string{"{", "=", ";", "in", "enum", "appliesTo", "tags"}, s.words[k]); k++ {
				if s.words[k] == name || s.words[k] == fmt.Sprintf("%q", name) {
					return s.lines[k], s.columns[k]
				}
			}
		}
	}
	return 0, 0
}

// inJSON returns the place of the first text in a JSON text that is a name, from 1, or zeros.
func inJSON(text, name string) (line, column int) {
	quoted, err := json.Marshal(name)
	i := strings.Index(text, string(quoted))
	if err != nil || i < 0 {
		return 0, 0
	}
	return place(text, i, 1)
}

// parseSchemaFile parses a schema file in either form.
func parseSchemaFile(f SchemaText) (*sast.Schema, *textError) {
	if !f.JSON {
		return parseSchema(f.Text)
	}
	lines := lineCounter{text: f.Text, line: 1, column: 1}
	fail := func(e *jsonError) (*sast.Schema, *textError) {
		line, column := lines.at(e.at)
		return nil, &textError{line, column, e.msg, e.hint}
	}
	if err := checkJSON(f.Text); err != nil {
		return fail(err)
	}
	if _, err := jsonMembers(f.Text, jsonSpace(f.Text, 0), "a schema"); err != nil {
		return fail(err)
	}
	var sc schema.Schema
	if err := sc.UnmarshalJSON([]byte(f.Text)); err != nil {
		return fail(explainJSON(f.Text, err))
	}
	tree, err := readTree([]byte(f.Text))
	if err != nil {
		return fail(&jsonError{msg: err.Error()})
	}
	if path, msg, hint := oddSchema(tree); msg != "" {
		return fail(&jsonError{at: jsonPlace(f.Text, path), msg: msg, hint: hint})
	}
	out := sc.AST()
	noEmptyActions(out.Actions)
	for _, ns := range out.Namespaces {
		noEmptyActions(ns.Actions)
	}
	return out, nil
}

// noEmptyActions makes an action that applies to no type of principal or resource one that never applies,
// which is the same. Cedar's schema syntax knows the second form only.
func noEmptyActions(actions sast.Actions) {
	for name, a := range actions {
		if a.AppliesTo != nil && (len(a.AppliesTo.Principals) == 0 || len(a.AppliesTo.Resources) == 0) {
			a.AppliesTo = nil
			actions[name] = a
		}
	}
}

// oddSchema finds what cedar-go reads differently from the reference, or leaves out: null, an action without
// the types of its principals or resources, and a shape that is a common type, which it takes for a record
// without attributes.
func oddSchema(tree any) (at, msg, hint string) {
	if at := nullIn(tree, ""); at != "" {
		return at, "null says nothing here", ""
	}
	namespaces, _ := tree.(map[string]any)
	for _, ns := range sortedKeys(namespaces) {
		parts, _ := namespaces[ns].(map[string]any)
		path := "/" + pointerEscape.Replace(ns)
		entities, _ := parts["entityTypes"].(map[string]any)
		for _, name := range sortedKeys(entities) {
			e, _ := entities[name].(map[string]any)
			if shape, ok := e["shape"].(map[string]any); ok && shape["type"] != "Record" {
				return path + "/entityTypes/" + pointerEscape.Replace(name) + "/shape", fmt.Sprintf("the shape of %s is not a record", quote(name)), `write the attributes out: {"type": "Record", "attributes": {…}}`
			}
		}
		actions, _ := parts["actions"].(map[string]any)
		for _, name := range sortedKeys(actions) {
			a, _ := actions[name].(map[string]any)
			applies, ok := a["appliesTo"].(map[string]any)
			for _, list := range []string{"principalTypes", "resourceTypes"} {
				if _, there := applies[list]; ok && !there {
					return path + "/actions/" + pointerEscape.Replace(name) + "/appliesTo", fmt.Sprintf("appliesTo of %s has no %s", quote(name), list), "leave appliesTo out if the action is only a group"
				}
			}
		}
	}
	return "", "", ""
}

// nullIn returns the JSON pointer of a null that is not the value of an annotation, or "".
func nullIn(v any, path string) string {
	switch v := v.(type) {
	case nil:
		if !strings.Contains(path, "/annotations/") {
			return path
		}
	case []any:
		for i := range v {
			if at := nullIn(v[i], fmt.Sprintf("%s/%d", path, i)); at != "" {
				return at
			}
		}
	case map[string]any:
		for _, name := range sortedKeys(v) {
			if at := nullIn(v[name], path+"/"+pointerEscape.Replace(name)); at != "" {
				return at
			}
		}
	}
	return ""
}

// shadowed refuses types in JSON that say which kind of type they mean, if the name means another kind in
// Cedar's schema syntax: there, a common type hides an entity type of its name, and declared types hide those
// of Cedar.
func (j *joiner) shadowed() {
	for _, f := range j.inJSON {
		check := func(ns string, t sast.IsType) {
			eachType(t, func(t sast.IsType) {
				var name string
				kinds := []string{"type"}
				switch t := t.(type) {
				case sast.EntityTypeRef:
					name = string(t)
				case sast.ExtensionType:
					name, kinds = string(t), []string{"type", "entity"}
				case sast.StringType:
					name, kinds = "String", []string{"type", "entity"}
				case sast.LongType:
					name, kinds = "Long", []string{"type", "entity"}
				case sast.BoolType:
					name, kinds = "Bool", []string{"type", "entity"}
				default:
					return
				}
				for _, kind := range kinds {
					for _, full := range []string{string(qualify(ns, name)), name} {
						if other, hidden := j.declared[kind+" "+full]; hidden {
							line, column := inJSON(f.file.Text, name)
							j.findings = append(j.findings, Finding{File: f.file.File, Line: line, Column: column, Message: fmt.Sprintf("%s is another type here than %s %s, which %s declares", name, kind, full, other.File), Hint: "rename one of the two"})
							return
						}
					}
				}
			})
		}
		eachNamespace(f.schema, func(ns string, d sast.Namespace) {
			for _, name := range sortedKeys(d.CommonTypes) {
				check(ns, d.CommonTypes[name].Type)
			}
			for _, name := range sortedKeys(d.Entities) {
				check(ns, d.Entities[name].Shape)
				check(ns, d.Entities[name].Tags)
			}
			for _, name := range sortedKeys(d.Actions) {
				if at := d.Actions[name].AppliesTo; at != nil {
					check(ns, at.Context)
				}
			}
		})
	}
}

// eachType calls fn for a type and the types in it.
func eachType(t sast.IsType, fn func(sast.IsType)) {
	switch t := t.(type) {
	case nil:
	case sast.SetType:
		eachType(t.Element, fn)
	case sast.RecordType:
		for _, name := range sortedKeys(t) {
			eachType(t[name].Type, fn)
		}
	default:
		fn(t)
	}
}

// sameSchema reports whether a text says what a schema says, apart from the kinds of types, which a text
// leaves to their names.
func sameSchema(sc *schema.Schema, text []byte) bool {
	var again schema.Schema
	if again.UnmarshalCedar(text) != nil {
		return false
	}
	var trees [2]any
	for i, s := range []*schema.Schema{sc, &again} {
		written, err := s.MarshalJSON()
		if err != nil {
			return false
		}
		if trees[i], err = readTree(written); err != nil {
			return false
		}
		trees[i] = plainTypes(trees[i])
	}
	return reflect.DeepEqual(trees[0], trees[1])
}

// plainTypes replaces the kinds of types with their names, in a schema in JSON.
func plainTypes(v any) any {
	switch v := v.(type) {
	case []any:
		for i := range v {
			v[i] = plainTypes(v[i])
		}
	case map[string]any:
		if kind, ok := v["type"].(string); ok {
			name, named := v["name"].(string)
			switch {
			case kind == "Boolean":
				v["type"] = "Bool"
			case named && (kind == "Entity" || kind == "Extension" || kind == "EntityOrCommon"):
				v["type"] = name
				delete(v, "name")
			}
		}
		for key := range v {
			v[key] = plainTypes(v[key])
		}
	}
	return v
}

// joinSchema makes the schema of a source of its files. Its error is reported.
func (c *compiler) joinSchema(src *Source) bool {
	if len(src.Schemas) == 0 {
		return true
	}
	src.SchemaFile = src.Schemas[0].File
	text, declared, findings := joinSchemas(src.Schemas)
	for _, f := range findings {
		f.Bundle = src.Name
		c.report(f)
	}
	src.Schema, src.declared = text, declared
	return len(findings) == 0
}

// schemaFile returns the file that declares what a message is about. The message begins with it, as in
// "entity Shop::Order: …".
func (src *Source) schemaFile(about string) string {
	file, best := src.SchemaFile, ""
	for d, f := range src.declared {
		rest, found := strings.CutPrefix(about, d)
		if found && (rest == "" || strings.IndexByte(":, ", rest[0]) >= 0) && len(d) > len(best) {
			file, best = f.File, d
		}
	}
	return file
}

// declaredAt returns the place of the declaration of an action. If there is none, it is the file of its namespace.
func (src *Source) declaredAt(action types.EntityUID) (file string, line, column int) {
	ns := namespaceOf(action.Type)
	about := actionDeclaration(ns, string(action.ID))
	f, known := src.declared[about]
	if !known {
		f = SchemaText{File: src.schemaFile("namespace " + ns), Text: src.Schema}
	}
	line, column = declaredAt(f, about)
	return f.File, line, column
}

// firstUse returns the place of the first use of a name in the schema files.
func (src *Source) firstUse(name string) (file string, line, column int) {
	if len(src.Schemas) == 0 {
		line, column = firstUse(src.Schema, name)
		return src.SchemaFile, line, column
	}
	for _, f := range src.Schemas {
		if f.JSON {
			line, column = inJSON(f.Text, name)
		} else {
			line, column = firstUse(f.Text, name)
		}
		if line > 0 {
			return f.File, line, column
		}
	}
	return src.SchemaFile, 0, 0
}
