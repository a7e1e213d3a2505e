package server

import (
	"fmt"
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go"

	"github.com/cedarpost/cedarpost/internal/entityuid"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/snapshot"
	"github.com/cedarpost/cedarpost/store"
)

// maxGrantWarnings bounds the warnings about one grant.
const maxGrantWarnings = 10

// canonicalActions writes actions as Cedar prints them, because rights compare their texts. It leaves
// those that it cannot read to [access.CheckGrant].
func canonicalActions(actions []string) []string {
	out := slices.Clone(actions)
	for i, text := range out {
		if typ, id, err := entityuid.Parse(text); err == nil {
			out[i] = cedar.NewEntityUID(cedar.EntityType(typ), cedar.String(id)).String()
		}
	}
	return out
}

// grantWarnings returns sentences about what grants name and the snapshot does not have. A grant may
// be stored before its bundle is published, so these are no errors; often they are misspellings. They
// tell nothing about other bundles than those of the grants, unless the caller may list grants there:
// what is of another bundle, and what is of none, have the same warning.
func grantWarnings(s *snapshot.Snapshot, r *access.Rights, grants ...store.Grant) (list []string) {
	var known []cedar.EntityUID
	for _, g := range grants {
		first := len(list)
		warn := func(format string, args ...any) {
			if text := fmt.Sprintf(format, args...); len(list)-first < maxGrantWarnings && !slices.Contains(list, text) {
				list = append(list, text)
			}
		}
		switch err := access.CheckCallerName(g.Caller); {
		case strings.Contains(g.Caller, ":"), err == nil:
		case g.Caller == access.RecoverName:
			warn("%v", err)
		default:
			warn("no caller can have the name %q: that of an API key has letters, digits, dots, hyphens and underscores, and other names have a colon, as whoami prints them", g.Caller)
		}
		if _, ok := s.Bundle(g.Bundle); !ok && g.Bundle != access.AllBundles {
			warn("no bundle %s is published", g.Bundle)
		}
		if len(g.Actions) > 0 && known == nil {
			known = s.Set.Actions()
		}
		for _, text := range g.Actions {
			typ, id, _ := entityuid.Parse(text)
			uid := cedar.NewEntityUID(cedar.EntityType(typ), cedar.String(id))
			switch of, exists := s.Set.Owner(uid.Type), slices.Contains(known, uid); {
			case exists && (g.Bundle == access.AllBundles || of == g.Bundle):
			case exists && r.May(listGrants, access.Target{Bundle: of}):
				warn("the action %s is of the bundle %s, so a grant for %s does not permit it", text, of, g.Bundle)
			case g.Bundle == access.AllBundles:
				warn("no published schema has the action %s, or it is a group of actions", text)
			default:
				warn("the bundle %s has no action %s, or it is a group of actions", g.Bundle, text)
			}
		}
		for _, typ := range g.EntityTypes {
			of := s.Set.Owner(cedar.EntityType(typ))
			switch exists := of != engine.Admin && slices.Contains(s.Set.EntityTypes(of), typ); {
			case exists && (g.Bundle == access.AllBundles || of == g.Bundle):
			case exists && r.May(listGrants, access.Target{Bundle: of}):
				warn("the entity type %s is of the bundle %s, so a grant for %s does not cover it", typ, of, g.Bundle)
			case g.Bundle == access.AllBundles:
				warn("no published schema has the entity type %s", typ)
			default:
				warn("the bundle %s has no entity type %s", g.Bundle, typ)
			}
		}
	}
	return list
}
