package server

import (
	"fmt"
	"slices"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/store"
)

// Every server holds all keys and grants in memory, and each change of them reads all under the
// revision lock. Operators of single bundles may fill half of each limit, so that an operator of all
// bundles always has room.
const (
	maxCallerGrants = 200    // of one caller, because each call goes through them
	maxGrants       = 50_000 // in all, ended ones included
	maxKeys         = 10_000 // in all that are not revoked
)

// checkChange refuses changes of keys and grants: of the rate of a grant, by a caller that is no operator
// of all bundles; those that last longer than the caller's own right to make them; and those that would
// store too many. The error names procedure.
func checkChange(procedure string, r *access.Rights, now store.Access, c store.AccessChange) error {
	if changesRate(now, c) && !r.May("PutGrant", access.Target{}) {
		return &refusedError{procedure: procedure, about: "a grant with a rate (--rate, checks_per_second), which only an operator of all bundles manages"}
	}
	if err := withinEnds(procedure, r, now, c); err != nil {
		return err
	}
	return withinBounds(r, now, c)
}

// withinEnds refuses grants and keys that end later than the grants by which the caller gives them.
// Otherwise an operator with an end could give itself, or another caller that it has the key of, the
// same right without one.
func withinEnds(procedure string, r *access.Rights, now store.Access, c store.AccessChange) error {
	refuse := func(what string, end time.Time) error {
		return &refusedError{procedure: procedure, about: fmt.Sprintf("a %s that ends later than this caller's own right to give it, which ends at %s (--expires, expires_at)", what, end.UTC().Format(time.RFC3339))}
	}
	later := func(end, limit *time.Time) bool { return limit != nil && (end == nil || end.After(*limit)) }
	for _, g := range c.Put {
		if limit := r.GivesUntil("PutGrant", access.GrantTarget(g.Bundle), g.Caller == r.Caller()); later(g.ExpiresAt, limit) {
			return refuse("grant", *limit)
		}
	}
	for _, k := range c.Add {
		about := []access.Target{{}} // what the key can be used for
		if grants := append(grantsOf(now, k.Name), c.Put...); len(grants) > 0 {
			about = about[:0]
			for _, g := range grants {
				about = append(about, access.GrantTarget(g.Bundle))
			}
		}
		for _, t := range about {
			if limit := r.GivesUntil("PutGrant", t, k.Name == r.Caller()); later(k.ExpiresAt, limit) {
				return refuse("key", *limit)
			}
		}
	}
	return nil
}

// changesRate reports whether a grant that has a rate, or is to have one, is changed or deleted.
func changesRate(now store.Access, c store.AccessChange) bool {
	return slices.ContainsFunc(c.Put, func(g store.Grant) bool { return g.ChecksPerSecond != 0 }) ||
		slices.ContainsFunc(now.Grants, func(g store.Grant) bool {
			return g.ChecksPerSecond != 0 && (slices.Contains(c.Delete, g.Key()) ||
				slices.ContainsFunc(c.Put, func(p store.Grant) bool { return p.Key() == g.Key() }))
		})
}

// withinBounds refuses a change that adds keys or grants beyond a limit.
func withinBounds(r *access.Rights, now store.Access, c store.AccessChange) error {
	grants, keys, whose := maxGrants, maxKeys, ""
	if !r.May("PutGrant", access.Target{}) {
		grants, keys, whose = grants/2, keys/2, " for operators of single bundles"
	}
	stored := make(map[store.GrantKey]bool, len(now.Grants))
	of := map[string]int{} // caller → its grants
	for _, g := range now.Grants {
		stored[g.Key()] = true
		of[g.Caller]++
	}
	added := 0
	for _, g := range c.Put {
		if stored[g.Key()] {
			continue
		}
		added++
		if of[g.Caller]++; of[g.Caller] > maxCallerGrants {
			return connect.Errorf(connect.CodeFailedPrecondition, "caller %q has %d grants, which is the limit for one caller; delete those that it does not need, or grant a role for all bundles", g.Caller, maxCallerGrants)
		}
	}
	if added > 0 && len(now.Grants)+added > grants {
		return connect.Errorf(connect.CodeFailedPrecondition, "there are %d grants, and the limit%s is %d; delete those that have ended", len(now.Grants), whose, grants)
	}
	if len(c.Add) > 0 && len(now.Keys)+len(c.Add)-len(c.Revoke) > keys {
		ended := 0
		for _, k := range now.Keys {
			if !k.Live(time.Now()) {
				ended++
			}
		}
		return connect.Errorf(connect.CodeFailedPrecondition, "there are %d API keys that are not revoked, and the limit%s is %d; revoke those that nobody uses (%d have ended)", len(now.Keys), whose, keys, ended)
	}
	return nil
}
