package bundle

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v4"

	"github.com/cedarpost/cedarpost/internal/entityuid"
)

// The entity types, in every namespace, of the entities that the field catalogue becomes.
const (
	fieldType = "Field"
	groupType = "FieldGroup"
)

var (
	namePattern = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,63}$`)
	pathPattern = regexp.MustCompile(`^[A-Za-z0-9_-]{1,64}(\.[A-Za-z0-9_-]{1,64}){0,15}$`)
)

const (
	nameRule  = "it must be 1 to 64 of a-z, 0-9, dot, underscore and dash, and start with a letter or digit"
	pathRule  = "a path is at most 16 segments joined by dots, each 1 to 64 of letters, digits, underscore and dash, 256 bytes in all"
	maxGroups = 100 // of one field
)

func validName(s string) bool { return namePattern.MatchString(s) }

func validFieldPath(s string) bool { return len(s) <= 256 && pathPattern.MatchString(s) }

// readManifest reads bundle.yaml into b.
func readManifest(f File, b *Bundle, probs *Problems) {
	y := yamlFile{path: f.Path, probs: probs}
	root := y.load(f.Content)
	if root == nil {
		return
	}
	y.each(root, ManifestName, func(k, v *yaml.Node) {
		switch k.Value {
		case "name":
			if s := y.str(v, "name"); s != "" || isText(v) {
				if !validName(s) {
					y.fail(v, nameRule, "%.100q cannot be a bundle's name", s)
				}
				b.Name = s
			}
		case "description":
			b.Description = y.str(v, "description")
		case "owners":
			b.Owners = y.strs(v, "owners")
		case "on_forbid_error":
			s := y.str(v, "on_forbid_error")
			if isText(v) && s != Deny && s != Skip {
				y.fail(v, "", "on_forbid_error must be %s or %s", Deny, Skip)
				return
			}
			b.OnForbidError = s
		case principalTokensKey:
			b.PrincipalTokens = y.principalTokens(v)
		case lintKey:
			b.LintDisabled = y.lint(v)
		case exportsKey:
			b.Exports = y.exports(v)
		default:
			if !y.rule(&b.Rules, k.Value, v) {
				y.unknown(k, "name", "description", "owners", approvalsKey, approvalsExpireKey, impactKey, freezeKey, "on_forbid_error", principalTokensKey, lintKey, exportsKey)
			}
		}
	})
}

const lintKey = "lint"

// rulePattern is the form of the id of a rule of lint. Which ids there are depends on the version.
var rulePattern = regexp.MustCompile(`^[a-z][a-z-]{0,63}$`)

// lint reads which rules of lint are switched off.
func (y yamlFile) lint(n *yaml.Node) (disabled []string) {
	y.each(n, lintKey, func(k, v *yaml.Node) {
		if k.Value != "disable" {
			y.unknown(k, "disable")
			return
		}
		for _, id := range y.strs(v, "disable") {
			if !rulePattern.MatchString(id) {
				y.fail(v, "such as unused-type", "%.100q is not the id of a rule", id)
				continue
			}
			disabled = append(disabled, id)
		}
	})
	return disabled
}

// approvals reads how many approvals a change needs.
func (y yamlFile) approvals(n *yaml.Node) int {
	// Only plain decimal: YAML has other ways to write a number, and a reader must not misread this one.
	if n.Kind == yaml.ScalarNode && !isText(n) && decimal.MatchString(n.Value) {
		if v, err := strconv.Atoi(n.Value); err == nil && v >= 0 && v <= maxApprovals {
			return v
		}
	}
	y.fail(n, "", "approvals must be a whole number from 0 to %d", maxApprovals)
	return 0
}

// readFields reads the field catalogue: entity type → path → groups.
func readFields(f File, probs *Problems) []Field {
	y := yamlFile{path: f.Path, probs: probs}
	root := y.load(f.Content)
	if root == nil {
		return nil
	}
	var fields []Field
	y.each(root, FieldsName, func(typ, paths *yaml.Node) {
		switch {
		case !entityuid.ValidType(typ.Value):
			y.fail(typ, "such as Shop::Order", "%.100q is not an entity type", typ.Value)
			return
		case baseName(typ.Value) == fieldType:
			y.fail(typ, "catalogue the fields of your own types", "%s is what the catalogue becomes", typ.Value)
			return
		case isNull(paths):
			return
		}
		y.each(paths, "the fields of "+typ.Value, func(p, groups *yaml.Node) {
			if len(fields) > MaxFields {
				return
			}
			if len(fields) == MaxFields {
				y.fail(p, "", "the catalogue holds more than %d fields", MaxFields)
			}
			if !validFieldPath(p.Value) {
				y.fail(p, pathRule, "%.100q is not a field path", p.Value)
				return
			}
			fields = append(fields, Field{Type: typ.Value, Path: p.Value, Groups: y.groups(groups),
				Line: p.Line, Column: p.Column})
		})
	})
	y.cycles(fields)
	slices.SortFunc(fields, func(a, b Field) int {
		return cmp.Or(cmp.Compare(a.Type, b.Type), cmp.Compare(a.Path, b.Path))
	})
	return fields
}

// groups reads the groups of one field. A field without groups has an empty list.
func (y yamlFile) groups(n *yaml.Node) []string {
	groups := y.strs(n, "groups")
	if len(groups) > maxGroups {
		y.fail(n, "", "a field is in at most %d groups", maxGroups)
	}
	for _, g := range groups {
		if !validFieldPath(g) {
			y.fail(n, pathRule, "%.100q is not a group's name", g)
		}
	}
	return groups
}

// cycles refuses a group that contains itself.
func (y yamlFile) cycles(fields []Field) {
	type group struct{ typ, name string }
	in := map[group]Field{}
	for _, f := range fields {
		if f.IsGroup() {
			in[group{f.Type, f.Path}] = f
		}
	}
	const visiting, done = 1, 2
	state := map[group]int{}
	var visit func(g group)
	visit = func(g group) {
		f, ok := in[g]
		if !ok || state[g] == done {
			return
		}
		state[g] = visiting
		for _, parent := range f.Groups {
			p := group{g.typ, parent}
			if state[p] == visiting {
				y.probs.add(Problem{File: y.path, Line: f.Line, Column: f.Column,
					Message: fmt.Sprintf("group %s is inside itself, through %s", parent, f.Path)})
				continue
			}
			visit(p)
		}
		state[g] = done
	}
	for _, f := range fields {
		if f.IsGroup() {
			visit(group{f.Type, f.Path})
		}
	}
}

// readTests reads the checks of tests.yaml.
func readTests(f File, probs *Problems) []Test {
	y := yamlFile{path: f.Path, probs: probs}
	root := y.load(f.Content)
	if root == nil {
		return nil
	}
	var tests []Test
	names := map[string]int{}
	y.each(root, TestsName, func(k, v *yaml.Node) {
		if k.Value != "checks" {
			y.unknown(k, "checks")
			return
		}
		if v.Kind != yaml.SequenceNode {
			y.fail(v, "", "checks must be a list, not %s", kindName(v))
			return
		}
		if len(v.Content) > MaxTests {
			y.fail(v, "", "there are more than %d checks", MaxTests)
			return
		}
		for _, n := range v.Content {
			t := y.test(n)
			if line, twice := names[t.Name]; twice && t.Name != "" {
				y.fail(n, "", "check %.100q is given twice, first on line %d", t.Name, line)
			}
			names[t.Name] = n.Line
			tests = append(tests, t)
		}
	})
	return tests
}

var testKeys = []string{"name", "principal", "action", "resource", "context", "fields", "require_all", "entities",
	"expect", "permitted", "denied", "denied_at", "determining", "obligations", "advice"}

// test reads one check.
func (y yamlFile) test(n *yaml.Node) Test {
	t := Test{Line: n.Line}
	given := map[string]*yaml.Node{}
	y.each(n, "a check", func(k, v *yaml.Node) {
		given[k.Value] = v
		switch k.Value {
		case "name":
			t.Name = y.str(v, "name")
		case "principal":
			t.Principal = y.ref(v)
		case "action":
			t.Action = y.ref(v)
		case "resource":
			t.Resource = y.ref(v)
		case "context":
			if v.Kind != yaml.MappingNode {
				y.fail(v, "", "context must be a mapping, not %s", kindName(v))
				return
			}
			t.Context, _ = y.value(v).(map[string]any)
		case "fields":
			if t.AllFields = isText(v) && v.Value == "all"; !t.AllFields {
				t.Fields = y.paths(v, "fields")
			}
		case "require_all":
			t.RequireAll = y.boolean(v, "require_all")
		case "entities":
			t.Entities = y.entities(v)
		case "expect":
			t.Expect.Decision = y.oneOf(v, "expect", strings.ToLower, "allow", "deny")
		case "permitted":
			t.Expect.Permitted = y.paths(v, "permitted")
		case "denied":
			t.Expect.Denied = y.paths(v, "denied")
		case "denied_at":
			t.Expect.DeniedAt = y.oneOf(v, "denied_at", strings.ToUpper, "FUNCTION", "OBJECT", "FIELD")
		case "determining":
			t.Expect.Determining = y.strs(v, "determining")
		case "obligations":
			t.Expect.Obligations = y.strs(v, "obligations")
		case "advice":
			t.Expect.Advice = y.strs(v, "advice")
		default:
			y.unknown(k, testKeys...)
		}
	})
	if n.Kind == yaml.MappingNode {
		y.complete(n, t, given)
	}
	return t
}

// complete refuses a check that lacks a part, or that no decision can pass.
func (y yamlFile) complete(n *yaml.Node, t Test, given map[string]*yaml.Node) {
	for _, k := range []string{"name", "principal", "action", "resource", "expect"} {
		if given[k] == nil {
			y.fail(n, "", "the check has no %s", k)
		}
	}
	if v := given["name"]; v != nil && isText(v) && v.Value == "" {
		y.fail(v, "", "a check's name must not be empty")
	}
	asks := t.AllFields || len(t.Fields) > 0
	for _, k := range []string{"permitted", "denied", "require_all"} {
		if given[k] != nil && !asks {
			y.fail(given[k], "add fields", "%s makes no sense in a check that asks for no fields", k)
		}
	}
	if t.Expect.DeniedAt != "" && t.Expect.Decision == "allow" {
		y.fail(given["denied_at"], "", "a check that expects allow cannot have denied_at")
	}
	if t.Expect.DeniedAt == "FIELD" && !t.RequireAll {
		y.fail(given["denied_at"], "add require_all: true", "only a check that requires all fields is denied at FIELD")
	}
}

// ref reads an entity reference: Cedar text, or a mapping of type and id.
func (y yamlFile) ref(n *yaml.Node) Ref {
	if n.Kind != yaml.MappingNode {
		s := y.str(n, "an entity reference")
		if !isText(n) {
			return Ref{}
		}
		typ, id, err := entityuid.Parse(s)
		if err != nil {
			y.fail(n, `write it as Type::"id"`, "%.200q: %s", s, err)
		}
		return Ref{Type: typ, ID: id}
	}
	var r Ref
	var hasType, hasID bool
	y.each(n, "an entity reference", func(k, v *yaml.Node) {
		switch k.Value {
		case "type":
			hasType = true
			if r.Type = y.str(v, "type"); isText(v) && !entityuid.ValidType(r.Type) {
				y.fail(v, "such as Shop::Order", "%.100q is not an entity type", r.Type)
			}
		case "id":
			hasID = true
			if v.Kind == yaml.ScalarNode && v.ShortTag() == "!!int" {
				r.ID = v.Value // id: 42 means "42", exactly as written
				return
			}
			r.ID = y.str(v, "id")
		default:
			y.unknown(k, "type", "id")
		}
	})
	if !hasType || !hasID {
		y.fail(n, "", "an entity reference has a type and an id")
	}
	return r
}

// paths reads a list of field paths.
func (y yamlFile) paths(n *yaml.Node, what string) []string {
	paths := y.strs(n, what)
	for _, p := range paths {
		if !validFieldPath(p) {
			y.fail(n, pathRule, "%s: %.100q is not a field path", what, p)
		}
	}
	return paths
}

// entities reads inline entities in the shape of Cedar's entity JSON.
func (y yamlFile) entities(n *yaml.Node) []any {
	if n.Kind != yaml.SequenceNode {
		y.fail(n, "", "entities must be a list, not %s", kindName(n))
		return nil
	}
	for _, e := range n.Content {
		hasUID := false
		y.each(e, "an entity", func(k, _ *yaml.Node) {
			switch k.Value {
			case "uid":
				hasUID = true
			case "attrs", "parents", "tags":
			default:
				y.unknown(k, "uid", "attrs", "parents", "tags")
			}
		})
		if e.Kind == yaml.MappingNode && !hasUID {
			y.fail(e, "", "an entity has a uid")
		}
	}
	out, _ := y.value(n).([]any)
	return out
}

// oneOf reads one of a few words, in any case.
func (y yamlFile) oneOf(n *yaml.Node, what string, fold func(string) string, words ...string) string {
	if !isText(n) {
		y.str(n, what)
		return ""
	}
	if w := fold(n.Value); slices.Contains(words, w) {
		return w
	}
	if len(words) == 1 {
		y.fail(n, "", "%s must be %s, or left out", what, words[0])
		return ""
	}
	y.fail(n, "", "%s must be one of %s", what, strings.Join(words, ", "))
	return ""
}
