package decisionlog

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/server/wire"
	"github.com/cedarpost/cedarpost/store"
)

// HistoryVerified counts which parts of the stored history were compared with the log.
type HistoryVerified struct {
	// Oldest and Newest are the first and the last revision that can be read.
	Oldest, Newest int64
	// Base is the revision that the verification begins at: the one of the first state root,
	// or 0, the empty database. It is -1 if there is no base.
	Base int64
	// Entities and Bundles count the versions in the base, and each version that a revision
	// after Oldest wrote. Keys counts the API keys in use.
	Entities, Bundles, Keys int64
	// Revisions is how many revisions were compared with their events. NotProvable is how
	// many were not, because their events were dropped with their days, or because the log
	// began after them.
	Revisions, NotProvable int64
}

// historyCheck compares the stored entities, bundles and keys with the events of their
// changes, which it gets in the order of the log. It reads one snapshot of the database, and
// has only one revision in memory at a time.
type historyCheck struct {
	db     *store.DB
	h      *store.History
	report func(what string)
	done   HistoryVerified

	next *store.StoredRevision // the next revision with rows; nil at the end
	keys map[string]*auditedKey

	seen    int64 // the revision of the last event of a change; -1 before the first one
	dropped int64 // batches after that event whose rows are missing
	gone    bool  // rows of any batch are missing
	highest int64 // the highest revision that an event names
	early   int64 // the last revision before the first event of a change

	base    *store.StateRoot // recomputed from the stored data
	badRoot bool             // the log has another root for it
	// uncovered is the newest revision whose event has no digest of what it stored; 0 if a
	// state root covers it.
	uncovered     int64
	uncoveredWhat string
}

// auditedKey is an API key, and whether an event was found that adds it.
type auditedKey struct {
	store.StoredKey
	proven  bool
	revoked bool // an event says so
}

// newHistoryCheck opens a snapshot of the stored history. The caller must read the end of the
// log afterwards, so that the log has the event of each revision in the snapshot.
func newHistoryCheck(ctx context.Context, db *store.DB, report func(what string)) (_ *historyCheck, err error) {
	h, err := db.OpenHistory(ctx)
	if err != nil {
		return nil, err
	}
	c := &historyCheck{db: db, h: h, report: report, keys: map[string]*auditedKey{}, seen: -1}
	c.done.Oldest, c.done.Newest, c.done.Base = h.Oldest, h.Newest, -1
	keys, err := h.Keys(ctx)
	for _, k := range keys {
		c.keys[k.ID] = &auditedKey{StoredKey: k}
	}
	if err == nil {
		c.next, err = h.Next(ctx)
	}
	if err != nil {
		h.Close()
		return nil, err
	}
	return c, nil
}

func (c *historyCheck) fault(format string, args ...any) { c.report(fmt.Sprintf(format, args...)) }

// missing counts batches whose rows are missing because their day was dropped.
func (c *historyCheck) missing(batches int64) {
	c.dropped += batches
	c.gone = true
}

// event handles the next event of the log. Its record is verified already.
func (c *historyCheck) event(ctx context.Context, leaf int64, rec *cedarpostv1.EventRecord) error {
	switch d := rec.Detail.(type) {
	case *cedarpostv1.EventRecord_Change:
		return c.change(ctx, leaf, rec, d.Change)
	case *cedarpostv1.EventRecord_StateRoot:
		return c.root(ctx, leaf, rec, d.StateRoot)
	}
	return nil
}

// changeKind returns the kind of data that a change is about.
func changeKind(d *cedarpostv1.Change) string {
	switch {
	case d.EntityCount > 0:
		return store.KindEntity
	case d.Version > 0:
		return store.KindBundle
	}
	return store.KindKey
}

func (c *historyCheck) change(ctx context.Context, leaf int64, rec *cedarpostv1.EventRecord, d *cedarpostv1.Change) error {
	r := rec.Revision
	c.highest = max(c.highest, r)
	if r > c.h.Newest {
		return nil // committed after the snapshot
	}
	if r <= max(c.seen, 0) {
		c.fault("revision %d: batch %d has another event of it, or one that is out of order: %s", r, leaf, eventText(rec, d))
		return nil
	}
	if err := c.gap(ctx, r); err != nil {
		return err
	}
	c.seen, c.dropped = r, 0
	var rows store.StoredRevision
	if c.next != nil && c.next.Revision == r {
		rows = *c.next
		var err error
		if c.next, err = c.h.Next(ctx); err != nil {
			return err
		}
	}
	kind := changeKind(d)
	if kind == store.KindKey {
		c.key(rec, d)
	}
	if r > c.h.Oldest {
		c.done.Revisions++
		c.done.Entities += rows.Written
		c.entities(rec, d, rows)
	}
	// Bundles are never swept, so all revisions are compared.
	for _, name := range rows.Bundles {
		if kind != store.KindBundle || name != rec.Subject {
			c.fault("revision %d: rows of bundle %s begin or end at it, and its event is of %s", r, name, eventText(rec, d))
		}
	}
	for _, id := range rows.Keys {
		if kind != store.KindKey || id != rec.Subject {
			c.fault("revision %d: API key %s is stored as added by it, and its event is of %s", r, id, eventText(rec, d))
		}
	}
	if kind == store.KindBundle {
		return c.bundle(ctx, rec, d)
	}
	return nil
}

// eventText returns what an event is about, for a fault.
func eventText(rec *cedarpostv1.EventRecord, d *cedarpostv1.Change) string {
	kind := changeKind(d)
	if kind != store.KindEntity {
		return kind + " " + rec.Subject
	}
	names := make([]string, len(d.Entities))
	for i, uid := range d.Entities {
		names[i] = wire.UID(uid).String()
	}
	return "entities " + namesText(names, int(d.EntityCount))
}

// namesText lists the first few of some names.
func namesText(names []string, total int) string {
	const most = 5
	names = names[:min(len(names), most)]
	text := strings.Join(names, ", ")
	if total > len(names) {
		text += fmt.Sprintf(" and %d more", total-len(names))
	}
	return text
}

func uidNames(uids []store.UID) []string {
	names := make([]string, len(uids))
	for i, uid := range uids {
		names[i] = wire.UID(stored.ToProto(uid)).String()
	}
	return names
}

// entities compares the versions of entities that a revision ended and began with the digests
// in its event.
func (c *historyCheck) entities(rec *cedarpostv1.EventRecord, d *cedarpostv1.Change, rows store.StoredRevision) {
	var before, after []byte
	if changeKind(d) == store.KindEntity {
		before, after = d.Before, d.After
	}
	if bytes.Equal(rows.Before, before) && bytes.Equal(rows.After, after) {
		return
	}
	// If the event lists all of its entities, the fault can name the others.
	if int(d.EntityCount) == len(d.Entities) && len(rows.Entities) < store.StoredNames {
		strange := slices.Clone(rows.Entities)
		strange = slices.DeleteFunc(strange, func(uid store.UID) bool {
			return slices.ContainsFunc(d.Entities, func(e *cedarpostv1.EntityUid) bool { return stored.FromProto(e) == uid })
		})
		if len(strange) > 0 {
			c.fault("revision %d: %s: a row begins or ends at it, and its event is of %s",
				rec.Revision, namesText(uidNames(strange), len(strange)), eventText(rec, d))
			return
		}
	}
	if !bytes.Equal(rows.Before, before) {
		c.fault("revision %d: the versions that it replaced or removed differ from the log: %s", rec.Revision, eventText(rec, d))
	}
	if !bytes.Equal(rows.After, after) {
		c.fault("revision %d: the versions that it wrote differ from the log: %s", rec.Revision, eventText(rec, d))
	}
}

// bundle compares a stored version of a bundle with the event that published it, or with the one that
// ended it.
func (c *historyCheck) bundle(ctx context.Context, rec *cedarpostv1.EventRecord, d *cedarpostv1.Change) error {
	c.done.Bundles++
	b, err := c.h.Bundle(ctx, rec.Subject, rec.Revision)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	before, beforeErr := c.h.BundleBefore(ctx, rec.Subject, rec.Revision)
	if beforeErr != nil {
		return beforeErr
	}
	switch deleted := len(d.After) == 0; {
	case deleted && (err == nil || before != string(d.Before)):
		c.fault("revision %d: bundle %s: its deletion is not stored as the log says", rec.Revision, rec.Subject)
	case deleted:
	case err != nil || b.Since != rec.Revision:
		c.fault("revision %d: bundle %s: version %d is not stored", rec.Revision, rec.Subject, d.Version)
	case b.Version != d.Version || b.Digest != string(d.After) || len(d.Stored) > 0 && !bytes.Equal(b.Stored, d.Stored):
		c.fault("revision %d: bundle %s: version %d is not stored as the log says", rec.Revision, rec.Subject, d.Version)
	case before != string(d.Before):
		c.fault("revision %d: bundle %s: the version before %d is not stored as the log says", rec.Revision, rec.Subject, d.Version)
	case len(d.Stored) == 0:
		c.notCovered(rec.Revision, "bundle "+rec.Subject)
	}
	return nil
}

// key compares a stored API key with the event that added it, or the one that revoked it. Keys
// are never swept.
func (c *historyCheck) key(rec *cedarpostv1.EventRecord, d *cedarpostv1.Change) {
	k := c.keys[rec.Subject]
	switch {
	case k == nil:
		c.fault("revision %d: API key %s was changed by it and is not stored", rec.Revision, rec.Subject)
		return
	case len(d.Before) > 0: // revoked
		if !k.Revoked || k.Until == nil || *k.Until != rec.Revision || !bytes.Equal(k.Digest, d.Before) {
			c.fault("revision %d: API key %s is not stored as revoked by it", rec.Revision, rec.Subject)
		}
		k.revoked = true
		return
	case len(d.After) > 0 && !bytes.Equal(k.Digest, d.After):
		c.fault("revision %d: API key %s is not stored as the log says", rec.Revision, rec.Subject)
	case rec.Revision > c.h.Oldest && k.Since != rec.Revision:
		c.fault("revision %d: API key %s is stored as added by revision %d", rec.Revision, rec.Subject, k.Since)
	case len(d.After) == 0:
		c.notCovered(rec.Revision, "API key "+rec.Subject)
	}
	k.proven = true
}

// notCovered notes a change whose event has no digest of all that it stored, as events of
// older versions of the server. A state root of that revision or a later one must cover it.
func (c *historyCheck) notCovered(revision int64, what string) {
	c.uncovered, c.uncoveredWhat = revision, what
}

// gap handles the revisions between the last event and revision r. They have no event.
func (c *historyCheck) gap(ctx context.Context, r int64) error {
	from := max(c.seen, 0) + 1
	first, bad := max(from, c.h.Oldest+1), false
	switch n := r - first; {
	case n <= 0:
	case r-from <= c.dropped: // each event of a change is a batch by itself
		c.done.NotProvable += n
	case c.seen < 0:
		c.early = r - 1
	default:
		bad = true
		c.noEvent(first, r-1)
	}
	for c.next != nil && c.next.Revision < r {
		if bad || c.next.Revision <= 0 {
			c.without(c.next)
		}
		var err error
		if c.next, err = c.h.Next(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (c *historyCheck) noEvent(first, last int64) {
	if first == last {
		c.fault("revision %d: the log has no event of it", first)
		return
	}
	c.fault("revision %d: the log has no event of it, and none of those up to %d", first, last)
}

// without adds a fault for the rows of a revision that has no event.
func (c *historyCheck) without(rows *store.StoredRevision) {
	names := uidNames(rows.Entities)
	for _, name := range rows.Bundles {
		names = append(names, "bundle "+name)
	}
	for _, id := range rows.Keys {
		names = append(names, "API key "+id)
	}
	c.fault("revision %d: %s: a row begins or ends at it, and the log has no event of it", rows.Revision, namesText(names, len(names)))
}

// root recomputes a state root, if it can be the base or covers changes whose events have no
// digest, and compares it with its event.
func (c *historyCheck) root(ctx context.Context, leaf int64, rec *cedarpostv1.EventRecord, d *cedarpostv1.StateRoot) error {
	c.highest = max(c.highest, d.Revision)
	switch {
	case d.Revision != rec.Revision:
		c.fault("batch %d: its state root is of revision %d, and its event of %d", leaf, d.Revision, rec.Revision)
		return nil
	case d.Revision < c.h.Oldest || d.Revision > c.h.Newest:
		return nil
	case c.base != nil && (c.uncovered == 0 || c.uncovered > d.Revision):
		return nil
	}
	stored, err := c.h.StateRoot(ctx, d.Revision)
	if err != nil {
		return err
	}
	if c.base == nil {
		c.base = &stored
		c.done.Base = d.Revision
		c.done.Entities += stored.Entities
		c.done.Bundles += stored.Bundles
	}
	if c.uncovered <= d.Revision {
		c.uncovered = 0
	}
	if !bytes.Equal(stored.Root[:], d.Root) {
		c.badRoot = true
		c.fault("revision %d: the stored data does not match the state root in batch %d: %d entities, %d bundles and %d API keys are stored, the log has %d, %d and %d",
			d.Revision, leaf, stored.Entities, stored.Bundles, stored.Keys, d.Entities, d.Bundles, d.Keys)
	}
	return nil
}

// finish runs the checks that need the whole log, and returns the counts.
func (c *historyCheck) finish(ctx context.Context) (*HistoryVerified, error) {
	if err := c.gap(ctx, c.h.Newest+1); err != nil {
		return nil, err
	}
	for c.next != nil {
		c.without(c.next)
		var err error
		if c.next, err = c.h.Next(ctx); err != nil {
			return nil, err
		}
	}
	newest, err := c.db.NewestRevision(ctx)
	if err != nil {
		return nil, err
	}
	if c.highest > newest {
		c.fault("revision %d: the log has an event of it, and the newest is %d", c.highest, newest)
	}
	if c.base == nil {
		c.empty()
	}
	c.covered()
	return &c.done, nil
}

// empty makes the empty database the base, if the log is whole.
func (c *historyCheck) empty() {
	if c.h.Oldest > 0 || c.gone {
		c.fault("revision %d: the log has no state root of it or of a later revision, so what was stored then cannot be verified", c.h.Oldest)
		return
	}
	c.done.Base = 0
}

// covered adds faults for revisions and API keys that neither the base nor an event proves.
func (c *historyCheck) covered() {
	if first := c.h.Oldest + 1; first <= c.early {
		if c.base != nil && c.early <= c.base.Revision {
			c.done.NotProvable += c.early - c.h.Oldest
		} else {
			c.noEvent(first, c.early)
		}
	}
	if c.uncovered > 0 {
		c.fault("revision %d: its event does not say what it stored of %s, and no state root does", c.uncovered, c.uncoveredWhat)
	}
	var rooted []string // keys that only the base can prove
	for _, id := range slices.Sorted(maps.Keys(c.keys)) {
		k := c.keys[id]
		if k.Revoked {
			switch {
			case k.revoked:
			case k.Until == nil:
				c.fault("revision %d: API key %s, which it added, is revoked, and the log has no event of that", k.Since, id)
			case *k.Until > c.h.Oldest && *k.Until > c.early:
				c.fault("revision %d: API key %s is stored as revoked by it, and the log has no event of that", *k.Until, id)
			}
			continue
		}
		c.done.Keys++
		if k.Until != nil {
			c.fault("revision %d: API key %s is stored as revoked by it, and as not revoked", *k.Until, id)
		}
		switch {
		case k.proven || c.done.Base < 0:
		case c.base == nil || k.Since > c.base.Revision:
			c.fault("revision %d: API key %s is stored as added by it, and the log has no event of that", k.Since, id)
		default:
			rooted = append(rooted, id)
		}
	}
	if c.badRoot && len(rooted) > 0 {
		c.fault("revision %d: only the state root can prove API keys %s", c.base.Revision, namesText(rooted, len(rooted)))
	}
}
