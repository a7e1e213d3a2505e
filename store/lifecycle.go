package store

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
)

// The entity types of changes of bundles, by id, and of freezes, by the name of the bundle. No bundle
// may declare their namespace, so only [DB.ChangePolicies] and [DB.PublishBundle] write them. Their
// history, events and verification are those of other entities.
const (
	ChangeType = OwnNamespace + "::Change"
	FreezeType = OwnNamespace + "::BundleFreeze"
)

// The values of [BundleChange.State].
const (
	ChangeOpen      = "open"
	ChangePublished = "published"
	ChangeDiscarded = "discarded"
)

// BundleChange is a proposed new state of a bundle.
type BundleChange struct {
	// ID is the name of the bundle, a hyphen, and Number.
	ID     string `json:"-"`
	Bundle string `json:"bundle"`
	Number int64  `json:"number"`
	Title  string `json:"title"`
	Reason string `json:"reason,omitempty"`
	State  string `json:"state"`
	// BaseVersion is the version that the edits apply to; 0: the bundle is new.
	BaseVersion int64 `json:"base_version"`
	// Digest is that of the bundle with the edits.
	Digest string `json:"digest"`
	// Authors are the callers that made or edited it, the first one first.
	Authors   []string  `json:"authors"`
	CreatedAt time.Time `json:"created_at"`
	UpdatedAt time.Time `json:"updated_at"`
	// Approvals and Declines count for the digest that they name. An edit removes the approvals.
	Approvals []Verdict `json:"approvals,omitempty"`
	Declines  []Verdict `json:"declines,omitempty"`
	// Reports are the complete reports of its impact, the newest last.
	Reports []ReportRef `json:"reports,omitempty"`
	// Shadow says how it is evaluated beside the live bundle; nil: it is not.
	Shadow *Shadow `json:"shadow,omitempty"`
	// Version is the version that it was published as; 0: none.
	Version int64 `json:"version,omitempty"`
	// Rules are those of bundle.yaml with the edits, as JSON; nil: none. The store does not read them.
	Rules json.RawMessage `json:"rules,omitempty"`
	// Source is where its author says that the files come from.
	Source string `json:"source,omitempty"`
	// Since is the revision that stored this state; set by the store.
	Since int64 `json:"-"`
}

// Verdict is what a caller decided about a change.
type Verdict struct {
	Caller string    `json:"caller"`
	Digest string    `json:"digest"` // of the change as the caller has seen it
	Reason string    `json:"reason,omitempty"`
	At     time.Time `json:"at"`
	// Report is the id of the report of the impact that the caller has seen; "": none.
	Report string `json:"report,omitempty"`
}

// ReportRef names a complete report of the impact of a change, and says what the rules for publishing
// depend on.
type ReportRef struct {
	ID     string `json:"id"`
	SHA256 string `json:"sha256"` // of the report as it is stored, in hexadecimal
	Digest string `json:"digest"` // of the change that was analyzed
	// LiveVersion is the version that it was compared with.
	LiveVersion int64     `json:"live_version"`
	Caller      string    `json:"caller"`
	At          time.Time `json:"at"`
	// From and To are the time that was analyzed, and Sample is the share of its decisions.
	From   time.Time `json:"from"`
	To     time.Time `json:"to"`
	Sample float64   `json:"sample"`
	// Narrowed says that a filter left out decisions.
	Narrowed  bool  `json:"narrowed,omitempty"`
	Decisions int32 `json:"decisions"`
	Unknown   int32 `json:"unknown"`
}

// Shadow is the evaluation of a change beside the live bundle.
type Shadow struct {
	Report string    `json:"report"` // its id
	Digest string    `json:"digest"` // of the change that is evaluated
	Caller string    `json:"caller"`
	Until  time.Time `json:"until"`
}

// ChangeEdit is a file that a change puts or removes.
type ChangeEdit struct {
	Path    string
	Removed bool
	Content []byte // nil if Removed
}

// BundleFreeze keeps a bundle as it is.
type BundleFreeze struct {
	Caller string    `json:"caller"`
	Reason string    `json:"reason"`
	At     time.Time `json:"at"`
}

// PolicyState is what the rules for publishing depend on, read under the revision lock.
type PolicyState struct {
	Freeze *BundleFreeze // nil: the bundle is not frozen
	Change *BundleChange // the change that the write names; nil: there is none
	// NextChange is the number of the next change of the bundle, and OpenChanges how many are open.
	NextChange, OpenChanges int64
}

// PolicyWrite is what a write does besides publishing. The zero value does nothing.
type PolicyWrite struct {
	Change *BundleChange // is stored in place of the change with its id
	// Edits are stored in place of those of the same paths. Unedited are paths whose edits are removed.
	Edits    []ChangeEdit
	Unedited []string
	Freeze   *BundleFreeze // freezes the bundle, or replaces its freeze
	Unfreeze bool
	// BreakGlass says that a publish is made past rules; nil: it is not.
	BreakGlass *BreakGlass
	// Reason is what the caller said; it is recorded.
	Reason string
	// Once, if not nil, makes the write happen once. A publish has its own.
	Once *Once[Changes]
}

// BreakGlass is a publish past rules.
type BreakGlass struct {
	Reason string   // as its caller said
	Rules  []string // that were in the way, in words
}

func (c BundleChange) entity() (Entity, error) {
	attrs, err := json.Marshal(c)
	return Entity{UID: UID{ChangeType, c.ID}, Attrs: attrs}, err
}

func scanBundleChange(row pgx.CollectableRow) (c BundleChange, err error) {
	var id string
	var attrs []byte
	var since int64
	if err = row.Scan(&id, &attrs, &since); err == nil {
		err = json.Unmarshal(attrs, &c)
	}
	c.ID, c.Since = id, since
	return c, err
}

// ChangePolicies calls fn with the state of a bundle and of one of its changes, under the revision
// lock, and commits what fn returns as one revision. So fn decides on what is stored when the write is
// committed. If fn or the commit fails, nothing is stored. change may be "". caller is recorded. The
// error is [ErrRepeated] if there is an answer for the key of Once already.
func (db *DB) ChangePolicies(ctx context.Context, caller, bundle, change string, fn func(PolicyState) (PolicyWrite, error)) (made Changes, err error) {
	defer wrap(&err, "change the state of a bundle")
	err = db.inTurn(ctx, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "select from revision for update"); err != nil { // as in ChangeAccess
			return err
		}
		state, err := readPolicyState(ctx, tx, bundle, change)
		if err != nil {
			return err
		}
		w, err := fn(state)
		if err != nil {
			return err
		}
		if made.Changed, err = db.writePolicyState(ctx, tx, caller, bundle, w); err != nil {
			return err
		}
		if err := tx.QueryRow(ctx, "select n from revision").Scan(&made.Revision); err != nil {
			return err
		}
		if made.Mark, err = readMark(ctx, tx, made.Revision); err != nil {
			return err
		}
		return w.Once.keep(ctx, tx, caller, made)
	})
	if err != nil {
		return Changes{}, err
	}
	return made, nil
}

const selectChange = "select id, attrs, since from entities where type = '" + ChangeType + "' and until is null"

// readPolicyState reads the state of a bundle and of one of its changes in the transaction that holds
// the lock.
func readPolicyState(ctx context.Context, tx pgx.Tx, bundle, change string) (s PolicyState, err error) {
	if s.Freeze, err = readFreeze(ctx, tx, bundle); err != nil {
		return s, err
	}
	if change != "" {
		c, err := readChange(ctx, tx, change)
		if err == nil {
			s.Change = &c
		} else if !errors.Is(err, ErrNotFound) {
			return s, err
		}
	}
	err = tx.QueryRow(ctx, `
		select coalesce(max((attrs ->> 'number')::bigint), 0) + 1, count(*) filter (where attrs ->> 'state' = 'open')
		from entities
		where type = '`+ChangeType+`' and until is null and attrs ->> 'bundle' = $1`, bundle).Scan(&s.NextChange, &s.OpenChanges)
	return s, err
}

func readFreeze(ctx context.Context, q querier, bundle string) (*BundleFreeze, error) {
	var attrs []byte
	err := q.QueryRow(ctx, "select attrs from entities where type = $1 and id = $2 and until is null", FreezeType, bundle).Scan(&attrs)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, nil //nolint:nilnil // not frozen
	}
	if err != nil {
		return nil, err
	}
	f := &BundleFreeze{}
	return f, json.Unmarshal(attrs, f)
}

func readChange(ctx context.Context, q querier, id string) (BundleChange, error) {
	rows, _ := q.Query(ctx, selectChange+" and id = $1", id)
	c, err := pgx.CollectExactlyOneRow(rows, scanBundleChange)
	return c, notFound(err)
}

// writePolicyState writes a change and a freeze as the next revision, and the edits of the change.
func (db *DB) writePolicyState(ctx context.Context, tx pgx.Tx, caller, bundle string, w PolicyWrite) (changed bool, err error) {
	var ops []Op
	if w.Change != nil {
		e, err := w.Change.entity()
		if err != nil {
			return false, err
		}
		ops = append(ops, Op{Kind: Put, Entity: e})
	}
	freeze := UID{FreezeType, bundle}
	if w.Freeze != nil {
		attrs, err := json.Marshal(w.Freeze)
		if err != nil {
			return false, err
		}
		ops = append(ops, Op{Kind: Put, Entity: Entity{UID: freeze, Attrs: attrs}})
	} else if w.Unfreeze {
		ops = append(ops, Op{Kind: Delete, Entity: Entity{UID: freeze}})
	}
	if changed, err = db.writeOwn(ctx, tx, EntityWrite{Ops: ops, Caller: caller, Reason: w.Reason}); err != nil || w.Change == nil {
		return changed, err
	}
	var batch pgx.Batch
	if len(w.Unedited) > 0 {
		batch.Queue("delete from change_edits where change = $1 and path = any ($2)", w.Change.ID, w.Unedited)
	}
	for _, e := range w.Edits {
		content := e.Content
		if e.Removed {
			content = nil
		} else if content == nil {
			content = []byte{} // an empty file is not null
		}
		batch.Queue(`
			insert into change_edits (change, path, content) values ($1, $2, $3)
			on conflict (change, path) do update set content = excluded.content`, w.Change.ID, e.Path, content)
	}
	if batch.Len() > 0 {
		err = tx.SendBatch(ctx, &batch).Close()
	}
	return changed || batch.Len() > 0, err
}

// BundleChange reads a change. The error is [ErrNotFound] if there is none with the id.
func (db *DB) BundleChange(ctx context.Context, id string) (_ BundleChange, err error) {
	defer wrap(&err, "read a change")
	return readChange(ctx, db.admin, id)
}

// StoredEdit is an edit of a change as it is stored. Content is nil for a file that is left out.
type StoredEdit struct {
	ChangeEdit
	Bytes int // of the content, also if that is left out
}

// ChangeEdits reads a change and, in the same snapshot, its edits by path. It leaves out the contents of
// files over each bytes, and after total bytes. The error is [ErrNotFound] if there is no change with the
// id.
func (db *DB) ChangeEdits(ctx context.Context, id string, each, total int) (c BundleChange, edits []StoredEdit, err error) {
	defer wrap(&err, "read the edits of a change")
	err = pgx.BeginTxFunc(ctx, db.admin, oneSnapshot, func(tx pgx.Tx) error {
		if c, err = readChange(ctx, tx, id); err != nil {
			return err
		}
		rows, _ := tx.Query(ctx, `
			select path, content is null as removed, coalesce(octet_length(content), 0) as bytes,
			       case when octet_length(content) <= $2 and sum(octet_length(content)) over (order by path) <= $3 then content end as content
			from change_edits where change = $1 order by path`, id, each, total)
		edits, err = pgx.CollectRows(rows, pgx.RowToStructByName[StoredEdit])
		return err
	})
	return c, edits, err
}

// BundleChangeQuery says which changes to list. The zero value of a field does not filter.
type BundleChangeQuery struct {
	Bundle, State string
	// Among are the bundles whose changes are listed; nil: all.
	Among []string
	// AfterBundle and BeforeNumber are the bundle and the number of the last change of the page before.
	AfterBundle  string
	BeforeNumber int64
	// Limit is the size of a page.
	Limit int
}

// BundleChanges reads a page of changes: by bundle, the newest first.
func (db *DB) BundleChanges(ctx context.Context, q BundleChangeQuery) (_ []BundleChange, err error) {
	defer wrap(&err, "list changes")
	rows, _ := db.admin.Query(ctx, `
		select id, attrs, since
		from (
			select id, attrs, since, attrs ->> 'bundle' collate "C" as bundle, (attrs ->> 'number')::bigint as number
			from entities
			where type = $1 and until is null
		) as changes
		where ($2 = '' or bundle = $2)
		  and ($3 = '' or attrs ->> 'state' = $3)
		  and ($4::text[] is null or bundle = any ($4))
		  and ($5 = '' or bundle > $5 or bundle = $5 and number < $6)
		order by bundle, number desc
		limit $7`, ChangeType, q.Bundle, q.State, q.Among, q.AfterBundle, q.BeforeNumber, q.Limit)
	return pgx.CollectRows(rows, scanBundleChange)
}

// BundleChangesByID reads changes by their ids. Those that are not stored are missing.
func (db *DB) BundleChangesByID(ctx context.Context, ids []string) (found map[string]BundleChange, err error) {
	defer wrap(&err, "read changes")
	rows, _ := db.admin.Query(ctx, selectChange+" and id = any ($1)", ids)
	list, err := pgx.CollectRows(rows, scanBundleChange)
	found = make(map[string]BundleChange, len(list))
	for _, c := range list {
		found[c.ID] = c
	}
	return found, err
}

// Shadows reads the changes with a shadow whose report is not complete.
func (db *DB) Shadows(ctx context.Context) (_ []BundleChange, err error) {
	defer wrap(&err, "list shadows")
	rows, _ := db.admin.Query(ctx, `
		select e.id, e.attrs, e.since
		from impact_reports r
		join entities e on e.type = '`+ChangeType+`' and e.id = r.change and e.until is null and e.attrs -> 'shadow' ->> 'report' = r.id
		where not r.complete and r.shadow
		order by e.id`)
	return pgx.CollectRows(rows, scanBundleChange)
}

// BundleFreezes reads the freezes by the name of the bundle.
func (db *DB) BundleFreezes(ctx context.Context) (_ map[string]BundleFreeze, err error) {
	defer wrap(&err, "read freezes of bundles")
	rows, _ := db.admin.Query(ctx, "select id, attrs from entities where type = $1 and until is null", FreezeType)
	list := map[string]BundleFreeze{}
	var id string
	var attrs []byte
	_, err = pgx.ForEachRow(rows, []any{&id, &attrs}, func() error {
		var f BundleFreeze
		err := json.Unmarshal(attrs, &f)
		list[id] = f
		return err
	})
	return list, err
}

// PolicyState reads the state of a bundle and of one of its changes as it is now. It can change at once.
func (db *DB) PolicyState(ctx context.Context, bundle, change string) (s PolicyState, err error) {
	defer wrap(&err, "read the state of a bundle")
	err = pgx.BeginTxFunc(ctx, db.admin, oneSnapshot, func(tx pgx.Tx) error {
		s, err = readPolicyState(ctx, tx, bundle, change)
		return err
	})
	return s, err
}
