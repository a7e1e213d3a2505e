package engine

import (
	"cmp"
	"crypto/sha256"
	"reflect"
	"slices"
	"sort"

	"github.com/cedar-policy/cedar-go"
	xast "github.com/cedar-policy/cedar-go/x/exp/ast"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
)

// Set is all bundles of one policy state, compiled. It is immutable and safe for
// concurrent use.
type Set struct {
	bundles map[string]*compiledBundle
	owners  map[string]string // namespace → bundle
	schema  *resolved.Schema
	digest  [sha256.Size]byte // of all schemas and catalogues
	actions map[cedar.EntityUID]*action
	static  map[cedar.EntityUID]cedar.Entity // actions, fields, groups; closed
	// parsed holds each policy by its text, for the next Compile; clean, those
	// that were checked against this schema without a finding.
	parsed map[parseKey]*policy
	clean  map[parseKey]bool

	actionTypes, requestTypes, fieldTypes map[cedar.EntityType]bool
	catalogues                            map[cedar.EntityType]*catalogue

	// sensitive has the marks of entity types that requests may contain; sensitiveNames
	// are the names of all attributes that are marked @sensitive.
	sensitive      map[cedar.EntityType]entityMarks
	sensitiveNames map[cedar.String]bool

	// plainFields makes decideFields evaluate each field by itself. Only tests set it,
	// to compare with the answers that classes give.
	plainFields bool
}

type compiledBundle struct {
	name             string
	namespaces       []string
	policies         []*policy
	skipForbidErrors bool
	principalTokens  []PrincipalToken
	schema           Source // only what schemaFile and declaredAt read
	exports          exports
}

// parseKey identifies a parsed policy. Its place in the file is not part of the key, so
// a new line at the top of a file does not make all its policies compile again.
type parseKey struct {
	bundle, text string
}

// Namespaces returns the namespaces a bundle owns, sorted.
func (s *Set) Namespaces(bundle string) []string {
	if b := s.bundles[bundle]; b != nil {
		return b.namespaces
	}
	return nil
}

// SchemaFile returns the schema file that declares an entity type, "" if no bundle owns its namespace.
func (s *Set) SchemaFile(typ cedar.EntityType) string {
	b := s.bundles[s.owners[namespaceOf(typ)]]
	if b == nil {
		return ""
	}
	return b.schema.schemaFile("entity " + string(typ))
}

// Policies returns the policies of a bundle by id.
func (s *Set) Policies(bundle string) []PolicyInfo {
	var out []PolicyInfo
	for _, p := range s.bundles[bundle].policies {
		out = append(out, PolicyInfo{p.ref.ID, p.file, p.line, p.text})
	}
	return out
}

// PolicyTree returns the syntax tree of a policy of a bundle with a text, or nil if the set has none. It
// must not be changed.
func (s *Set) PolicyTree(bundle, text string) *xast.Policy {
	if p := s.parsed[parseKey{bundle, text}]; p != nil {
		return p.source
	}
	return nil
}

// ActionGroups returns the groups that an action is in, at any depth.
func (s *Set) ActionGroups(uid cedar.EntityUID) cedar.EntityUIDSet { return s.static[uid].Parents }

// TypesAbove returns the types whose entities an entity of a type can be in, at any depth.
func (s *Set) TypesAbove(typ cedar.EntityType) map[cedar.EntityType]bool {
	above := map[cedar.EntityType]bool{}
	todo := []cedar.EntityType{typ}
	for len(todo) > 0 {
		last := len(todo) - 1
		t := todo[last]
		todo = todo[:last]
		for _, parent := range s.schema.Entities[t].ParentTypes {
			if !above[parent] {
				above[parent] = true
				todo = append(todo, parent)
			}
		}
	}
	return above
}

// EntityTypes returns the entity types of one bundle's namespaces that can be stored,
// sorted.
func (s *Set) EntityTypes(bundle string) []string {
	var out []string
	for t := range s.schema.Entities {
		if s.owners[namespaceOf(t)] == bundle {
			out = append(out, string(t))
		}
	}
	for t := range s.schema.Enums {
		if s.owners[namespaceOf(t)] == bundle {
			out = append(out, string(t))
		}
	}
	sort.Strings(out)
	return out
}

// ChangedTypes lists the entity types whose declarations differ between s and old, or
// that only one of them declares. Every type may refer to enumerated types, so if one
// of those changed, all types are listed.
func (s *Set) ChangedTypes(old *Set) []string {
	if s.digest == old.digest {
		return nil
	}
	changed := map[cedar.EntityType]bool{}
	all := !reflect.DeepEqual(s.schema.Enums, old.schema.Enums)
	for _, pair := range [][2]*Set{{s, old}, {old, s}} {
		for t, decl := range pair[0].schema.Entities {
			other, ok := pair[1].schema.Entities[t]
			changed[t] = changed[t] || all || !ok || pair[0].fieldTypes[t] != pair[1].fieldTypes[t] || pair[0].requestTypes[t] != pair[1].requestTypes[t] ||
				!reflect.DeepEqual(decl.Shape, other.Shape) || !reflect.DeepEqual(decl.Tags, other.Tags) || !sameTypes(decl.ParentTypes, other.ParentTypes)
		}
		for t := range pair[0].schema.Enums {
			changed[t] = changed[t] || all
		}
	}
	out := []string{}
	for t, c := range changed {
		if c {
			out = append(out, string(t))
		}
	}
	sort.Strings(out)
	return out
}

// Actions lists the actions that can be asked about, sorted by type and id.
func (s *Set) Actions() []cedar.EntityUID {
	var list []cedar.EntityUID
	for uid, a := range s.actions {
		if a.appliesTo != nil && a.fieldOf == nil {
			list = append(list, uid)
		}
	}
	slices.SortFunc(list, func(a, b cedar.EntityUID) int {
		return cmp.Or(cmp.Compare(a.Type, b.Type), cmp.Compare(a.ID, b.ID))
	})
	return list
}

// Owner returns the bundle whose namespace has a type of entities or actions, or "".
func (s *Set) Owner(t cedar.EntityType) string { return s.owners[namespaceOf(t)] }

// OwnerOf returns the bundle that owns a namespace, or "".
func (s *Set) OwnerOf(namespace string) string { return s.owners[namespace] }

// decides reports whether the policies of a bundle can decide the actions of another one.
func decides(bundle, actions string) bool {
	switch bundle {
	case Guardrails:
		return true
	case AdminLocal:
		return actions == Admin
	}
	return actions == bundle
}

// matchedActions returns the actions p could decide: of its own bundle's
// namespaces, or of all for guardrails, by its action scope.
func (s *Set) matchedActions(p *policy) []*action {
	var out []*action
	own := func(a *action) bool { return decides(p.ref.Bundle, a.bundle) }
	switch {
	case p.action.all:
		for _, a := range s.actions {
			if own(a) {
				out = append(out, a)
			}
		}
	case !p.action.in:
		if a, ok := s.actions[p.action.uids[0]]; ok && own(a) {
			out = append(out, a)
		}
	default:
		for _, a := range s.actions {
			if own(a) && slices.ContainsFunc(p.action.uids, func(g cedar.EntityUID) bool {
				return g == a.uid || s.static[a.uid].Parents.Contains(g)
			}) {
				out = append(out, a)
			}
		}
	}
	return out
}
