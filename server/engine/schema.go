package engine

import (
	"fmt"
	"strings"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
)

const (
	fieldSuffix       = ".field"
	fieldType         = "Field"
	fieldGroupType    = "FieldGroup"
	reservedNamespace = "Cedarpost"
	// Guardrails is the reserved bundle of forbids that join every decision.
	Guardrails = "guardrails"
	// Admin is the built-in bundle of the service's own rights. It is compiled apart from all
	// others.
	Admin = "admin"
	// AdminLocal is the reserved bundle of forbids that join the decisions of admin.
	AdminLocal = "admin-local"
	// maxEnvironments caps the combinations of action, principal type and resource
	// type of one bundle.
	maxEnvironments = 20_000
	// MaxSchemaBytes caps one bundle's schema.
	MaxSchemaBytes = 1 << 20
)

// action is one declared action with everything a decision on it needs.
type action struct {
	uid       cedar.EntityUID
	bundle    string
	appliesTo *resolved.AppliesTo // nil: only a group
	// field is the ".field" action, fieldOf the action this one is the
	// ".field" of.
	field, fieldOf *action
	fillsNow       bool
	auditAlways    bool
	// sensitive says which parts of the context are marked @sensitive.
	sensitive *marks
	index     *index
	// classes has the class of each leaf, by resource type, for a ".field" action.
	classes map[cedar.EntityType][]int
	// probed says for which classes parts of a policy are true.
	probed map[cedar.EntityType]map[*policy]probed
}

func isActionType(t cedar.EntityType) bool {
	return t == "Action" || strings.HasSuffix(string(t), "::Action")
}

func namespaceOf(t cedar.EntityType) string {
	if i := strings.LastIndex(string(t), "::"); i >= 0 {
		return string(t[:i])
	}
	return ""
}

func baseName(t cedar.EntityType) string {
	return strings.TrimPrefix(strings.TrimPrefix(string(t), namespaceOf(t)), "::")
}

func qualify(namespace, name string) cedar.EntityType {
	if namespace == "" {
		return cedar.EntityType(name)
	}
	return cedar.EntityType(namespace + "::" + name)
}

// knowsType says whether some schema declares the entity type.
func (s *Set) knowsType(t cedar.EntityType) bool {
	_, entity := s.schema.Entities[t]
	_, enum := s.schema.Enums[t]
	return entity || enum || s.actionTypes[t]
}

// requestOnly says whether the type is marked @source("request").
func (s *Set) requestOnly(t cedar.EntityType) bool { return s.requestTypes[t] }

// readSchema fills the tables that depend on the schema alone, and reports what is valid
// in Cedar and not allowed in this service.
func (s *Set) readSchema(report func(bundle, msg, hint string)) {
	owner := func(t cedar.EntityType) string { return s.owners[namespaceOf(t)] }
	for name, e := range s.schema.Entities {
		switch source := e.Annotations["source"]; source {
		case "":
		case "request":
			s.requestTypes[name] = true
		default:
			report(owner(name), fmt.Sprintf("entity %s: @source(%q) is not known", name, source), `the one source there is: @source("request")`)
		}
	}
	for name, e := range s.schema.Entities {
		if s.requestTypes[name] {
			continue
		}
		for _, p := range e.ParentTypes {
			if s.requestTypes[p] {
				report(owner(name), fmt.Sprintf(`entity %s: its parent type %s is marked @source("request"), which is never stored`, name, p), "")
			}
		}
	}
	environments := map[string]int{}
	for uid, decl := range s.schema.Actions {
		if decl.AppliesTo != nil {
			environments[owner(uid.Type)] += len(decl.AppliesTo.Principals) * len(decl.AppliesTo.Resources)
		}
		a := &action{uid: uid, bundle: owner(uid.Type), appliesTo: decl.AppliesTo, index: newIndex()}
		if decl.AppliesTo != nil {
			if now, ok := decl.AppliesTo.Context["now"]; ok {
				ext, isExt := now.Type.(resolved.ExtensionType)
				a.fillsNow = isExt && ext == "datetime"
			}
		}
		switch audit := decl.Annotations["audit"]; audit {
		case "":
		case "always":
			a.auditAlways = true
		default:
			report(a.bundle, fmt.Sprintf("action %s: @audit(%q) is not known", uid, audit), `the one value there is: @audit("always")`)
		}
		s.actions[uid] = a
		s.actionTypes[uid.Type] = true
		s.static[uid] = cedar.Entity{UID: uid, Parents: cedar.NewEntityUIDSet(s.actionAncestors(uid)...)}
	}
	for bundle, n := range environments {
		if n > maxEnvironments {
			report(bundle, fmt.Sprintf("its actions apply to %d combinations of principal and resource types, the limit is %d", n, maxEnvironments), "a policy is checked for each of them")
		}
	}
	s.pairFieldActions(report)
	s.readSensitive()
}

// actionAncestors returns all groups an action is in.
func (s *Set) actionAncestors(uid cedar.EntityUID) []cedar.EntityUID {
	seen := map[cedar.EntityUID]bool{}
	var out []cedar.EntityUID
	var walk func(cedar.EntityUID)
	walk = func(u cedar.EntityUID) {
		for p := range s.schema.Actions[u].Entity.Parents.All() {
			if !seen[p] {
				seen[p] = true
				out = append(out, p)
				walk(p)
			}
		}
	}
	walk(uid)
	return out
}
