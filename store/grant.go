package store

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
)

// GrantType is the entity type of grants. No bundle may declare its namespace, so only
// [DB.ChangeAccess] writes entities of it.
const GrantType = OwnNamespace + "::Grant"

// OwnNamespace is the namespace of the service's own entities.
const OwnNamespace = "Cedarpost"

// Grant gives a caller a role. There is at most one grant of a role in a bundle to a caller.
type Grant struct {
	// Caller is the unique name of the caller.
	Caller string
	// Role is the name of a role.
	Role string
	// Bundle is the name of a bundle, or "*".
	Bundle string
	// Actions narrows the grant to these actions, as Cedar text; nil: all.
	Actions []string
	// EntityTypes narrows the grant to these types; nil: all.
	EntityTypes []string
	// ChecksPerSecond is how many checks the caller may ask each server in a second; 0: no number
	// of its own.
	ChecksPerSecond int32
	// ExpiresAt is when the grant ends, to the microsecond; nil: never.
	ExpiresAt *time.Time
	// GrantedBy is the caller that stored this state of the grant.
	GrantedBy string
	// Since is the revision that stored it; set by the store.
	Since int64
}

// Live reports whether the grant has not ended at a time.
func (g Grant) Live(now time.Time) bool { return g.ExpiresAt == nil || now.Before(*g.ExpiresAt) }

// Key returns what identifies a grant.
func (g Grant) Key() GrantKey { return GrantKey{g.Caller, g.Role, g.Bundle} }

// GrantKey identifies a grant.
type GrantKey struct{ Caller, Role, Bundle string }

func (k GrantKey) compare(o GrantKey) int {
	return slices.Compare([]string{k.Caller, k.Role, k.Bundle}, []string{o.Caller, o.Role, o.Bundle})
}

// uid returns the entity of a grant. Neither roles nor bundles have a space in their names.
func (k GrantKey) uid() UID { return UID{GrantType, k.Role + " " + k.Bundle + " " + k.Caller} }

// callerOfGrant returns the caller of the grant with an entity.
func callerOfGrant(u UID) string {
	if parts := strings.SplitN(u.ID, " ", 3); u.Type == GrantType && len(parts) == 3 {
		return parts[2]
	}
	return ""
}

// CallerOfGrants returns the caller whose grants some entities are, or "" if they are not all grants
// of one caller.
func CallerOfGrants(list []UID) string {
	if len(list) == 0 {
		return ""
	}
	caller := callerOfGrant(list[0])
	if slices.ContainsFunc(list, func(u UID) bool { return callerOfGrant(u) != caller }) {
		return ""
	}
	return caller
}

// grantAttrs are the attributes of the entity of a grant.
type grantAttrs struct {
	Caller      string   `json:"caller"`
	Role        string   `json:"role"`
	Bundle      string   `json:"bundle"`
	Actions     []string `json:"actions,omitempty"`
	EntityTypes []string `json:"entity_types,omitempty"`
	ExpiresAt   string   `json:"expires_at,omitempty"` // RFC 3339
	GrantedBy   string   `json:"granted_by"`
	PerSecond   int32    `json:"checks_per_second,omitempty"`
}

// GrantAttributes are the names of the attributes of the entity of a grant.
func GrantAttributes() []string {
	return []string{"caller", "role", "bundle", "actions", "entity_types", "expires_at", "granted_by", "checks_per_second"}
}

func (g Grant) entity() (Entity, error) {
	a := grantAttrs{g.Caller, g.Role, g.Bundle, g.Actions, g.EntityTypes, "", g.GrantedBy, g.ChecksPerSecond}
	if g.ExpiresAt != nil {
		a.ExpiresAt = g.ExpiresAt.UTC().Format(time.RFC3339Nano)
	}
	attrs, err := json.Marshal(a)
	return Entity{UID: g.Key().uid(), Attrs: attrs}, err
}

// grantOf reads the entity of a grant.
func grantOf(e Entity) (Grant, error) {
	var a grantAttrs
	err := json.Unmarshal(e.Attrs, &a)
	g := Grant{Caller: a.Caller, Role: a.Role, Bundle: a.Bundle, Actions: a.Actions, EntityTypes: a.EntityTypes, ChecksPerSecond: a.PerSecond, GrantedBy: a.GrantedBy, Since: e.Since}
	if err == nil && a.ExpiresAt != "" {
		var at time.Time
		at, err = time.Parse(time.RFC3339Nano, a.ExpiresAt)
		g.ExpiresAt = &at
	}
	if err == nil && g.Key().uid() != e.UID {
		err = errors.New("its attributes are of another grant")
	}
	return g, err
}

// readGrants reads the live grants, in order of caller, role and bundle. They can have expired. An
// entity that is no grant, because somebody wrote it by hand, gives no right.
func readGrants(ctx context.Context, q querier) ([]Grant, error) {
	rows, _ := q.Query(ctx, `
		select type, id, attrs, tags, parents, since
		from entities
		where type = $1 and until is null`, GrantType)
	entities, err := pgx.CollectRows(rows, scanEntity)
	if err != nil {
		return nil, err
	}
	grants := make([]Grant, 0, len(entities))
	for _, e := range entities {
		if g, err := grantOf(e); err == nil {
			grants = append(grants, g)
		}
	}
	slices.SortFunc(grants, func(a, b Grant) int { return a.Key().compare(b.Key()) })
	return grants, nil
}

// Grants reads the grants of the view, in order of caller, role and bundle. They can have expired.
func (v *View) Grants(ctx context.Context) ([]Grant, error) { return readGrants(ctx, v.tx) }

// Access reads the API keys and the grants of the view.
func (v *View) Access(ctx context.Context) (Access, error) { return readAccess(ctx, v.tx) }

// Access is who may call, at one moment: the API keys that are not revoked and the grants. Both
// can have expired.
type Access struct {
	Keys   []Key
	Grants []Grant
	// Revoked are the hashes of the keys that are revoked.
	Revoked [][]byte
	// Granted is true if there is or was a grant. A database from before there were grants has none.
	Granted bool
}

// AccessChange is a change of keys and grants. Grants are changed first, then keys are revoked,
// then keys are added.
type AccessChange struct {
	Put    []Grant // replaces the grant with the same key
	Delete []GrantKey
	Revoke []Key
	Add    []Key
	// Once, if not nil, makes the change happen once, even if it changes nothing.
	Once *Once[Changes]
}

// Changes is the result of [DB.ChangeAccess].
type Changes struct {
	// Revision is the newest revision afterwards, and Mark its mark.
	Revision int64
	Mark     uuid.UUID
	// Changed is false if everything was as the change says already.
	Changed bool
	// Added are the keys that were added, as they are stored.
	Added []Key
}

// ChangeAccess calls fn with the keys and grants, under the revision lock, and commits what fn
// returns: one revision for all grants, and one for each key. So fn decides on what is stored when
// the change is committed. If fn or the commit fails, nothing is stored. caller is recorded. The error
// is [ErrRepeated] if there is an answer for the key of Once already.
func (db *DB) ChangeAccess(ctx context.Context, caller string, fn func(context.Context, Access) (AccessChange, error)) (made Changes, err error) {
	defer wrap(&err, "change API keys and grants")
	err = db.inTurn(ctx, func(tx pgx.Tx) error {
		// The revision lock, in a statement of its own, so that the next one sees what was
		// committed before the lock was taken.
		if _, err := tx.Exec(ctx, "select from revision for update"); err != nil {
			return err
		}
		now, err := readAccess(ctx, tx)
		if err != nil {
			return err
		}
		c, err := fn(ctx, now)
		if err != nil {
			return err
		}
		if made.Changed, err = db.writeGrants(ctx, tx, caller, c); err != nil {
			return err
		}
		for _, k := range c.Revoke {
			if err := db.revokeKey(ctx, tx, k, caller); err != nil {
				return err
			}
		}
		made.Added = slices.Clone(c.Add)
		for i := range made.Added {
			if err := db.addKey(ctx, tx, &made.Added[i], caller); err != nil {
				return err
			}
		}
		made.Changed = made.Changed || len(c.Revoke)+len(c.Add) > 0
		if err := tx.QueryRow(ctx, "select n from revision").Scan(&made.Revision); err != nil {
			return err
		}
		if made.Mark, err = readMark(ctx, tx, made.Revision); err != nil {
			return err
		}
		return c.Once.keep(ctx, tx, caller, made)
	})
	if err != nil {
		return Changes{}, err
	}
	return made, nil
}

func readAccess(ctx context.Context, tx pgx.Tx) (a Access, err error) {
	if a.Keys, err = readKeys(ctx, tx); err != nil {
		return a, err
	}
	if a.Grants, err = readGrants(ctx, tx); err != nil {
		return a, err
	}
	err = tx.QueryRow(ctx, `
		select exists (select from entities where type = $1),
		       array(select hash from api_keys where revoked_at is not null)`, GrantType).Scan(&a.Granted, &a.Revoked)
	return a, err
}

// writeGrants writes the grants of a change as the next revision, unless they are stored like that
// already.
func (db *DB) writeGrants(ctx context.Context, tx pgx.Tx, caller string, c AccessChange) (changed bool, err error) {
	w := EntityWrite{Caller: caller}
	for _, g := range c.Put {
		e, err := g.entity()
		if err != nil {
			return false, err
		}
		w.Ops = append(w.Ops, Op{Kind: Put, Entity: e})
	}
	for _, k := range c.Delete {
		w.Ops = append(w.Ops, Op{Kind: Delete, Entity: Entity{UID: k.uid()}})
	}
	return db.writeOwn(ctx, tx, w)
}

// writeOwn writes entities of the service's own types as the next revision, unless they are stored like
// that already. The transaction holds the revision lock.
func (db *DB) writeOwn(ctx context.Context, tx pgx.Tx, w EntityWrite) (changed bool, err error) {
	if len(w.Ops) == 0 {
		return false, nil
	}
	if err := tx.QueryRow(ctx, selectNewestPublish).Scan(&w.PolicyRevision); err != nil { // own types depend on no policy
		return false, err
	}
	n, p, err := lockAndRead(ctx, tx, w)
	if err != nil {
		return false, err
	}
	for i, op := range w.Ops {
		if err := p.apply(i, op); err != nil {
			return false, err
		}
	}
	drafts := p.changed()
	if len(drafts) == 0 {
		_, err := tx.Exec(ctx, "update revision set n = n - 1") // the number is given back
		return false, err
	}
	_, err = db.writeVersions(ctx, tx, n, w, drafts)
	return true, err
}

// IsOwnType reports whether entities or actions of a type are the service's own.
func IsOwnType(typ string) bool { return strings.HasPrefix(typ, OwnNamespace+"::") }
