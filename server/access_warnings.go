package server

import (
	"fmt"
	"slices"
	"strings"
	"time"

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

// keyWarnings returns sentences about the rights that a new key has besides those of the call: from the
// live grants that its caller had. given are the grants of the call.
func keyWarnings(had, given []store.Grant, caller string) []string {
	var rights []string
	for _, g := range had {
		if g.Live(time.Now()) && !slices.ContainsFunc(given, func(o store.Grant) bool { return o.Key() == g.Key() }) {
			rights = append(rights, g.Role+" for "+g.Bundle)
		}
	}
	switch more := len(rights) - maxGrantWarnings; {
	case len(rights) == 0 && len(given) == 0:
		return []string{fmt.Sprintf("the caller %s has no grants, so its key has no rights yet", caller)}
	case len(rights) == 0:
		return nil
	case more > 0:
		rights = append(rights[:maxGrantWarnings], fmt.Sprintf("and %d more", more))
	}
	return []string{fmt.Sprintf("the caller %s had other grants before, and this key has their rights, too: %s", caller, strings.Join(rights, ", "))}
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
		if err := access.CheckAnyCallerName(g.Caller); err != nil {
			warn("no caller can have this name: %v", err)
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
