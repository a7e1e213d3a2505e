package store

import (
	"context"
	"crypto/sha256"
	"errors"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
)

// Bundle is one published version of a bundle.
type Bundle struct {
	Name string
	// Version counts the publishes of this bundle, from 1.
	Version int64
	// Digest identifies the content.
	Digest        string
	Description   string
	Owners        []string
	OnForbidError string
	Namespaces    []string
	Schema        string // Cedar schema text
	Fields        string // the field catalogue: JSON of []engine.Field, not the text of fields.yaml
	Manifest      []byte // the file bundle.yaml, nil if there is none; a publish takes it from its Files
	PolicyCount   int32  `db:"policies"`
	PublishedBy   string
	PublishedAt   time.Time // set by the database
	// Message is what its publisher said about it.
	Message string
	// Change is the id of the change that it was published from; "": none.
	Change string
	// RollbackOf is the version that it restores; 0: it is no rollback.
	RollbackOf int64
	// Approvals is how many approvals the next change of the bundle needs.
	Approvals int32
	// Rules are those that the next publish meets besides those of Manifest, as JSON; "": none. The store
	// does not read them.
	Rules string
	// BreakGlass is why it was published past rules; "": it was not. A publish takes it from what its Rules
	// return.
	BreakGlass string
	// Since is the revision that published this version.
	Since int64
	// Policies are in order of id.
	Policies []Policy `db:"-"`
}

// Policy is one policy of a bundle.
type Policy struct {
	Bundle string
	ID     string // unique in the bundle
	File   string // path in the bundle's folder
	Line   int    // where it starts, from 1
	Text   string
	Since  int64 // the revision that wrote this text
}

// File is a file of the folder that a bundle was published from.
type File struct {
	Path    string
	Content []byte
}

// Publish replaces one bundle.
type Publish struct {
	// Bundle is the new state. Version, PolicyCount, PublishedBy, PublishedAt and
	// every Since are filled in by the store, as is Policy.Bundle.
	Bundle Bundle
	// Files are the files it was made from.
	Files []File
	// Caller publishes it.
	Caller string
	// BaseRevision is the [DB.PolicyRevision] that it was checked against: 0 if there was
	// no bundle.
	BaseRevision int64
	// EntitiesRevision is the revision of the entities that it was checked against.
	EntitiesRevision int64
	// At is the position of both revisions, if its number is not 0. If the database does
	// not have it, as after a failover, the error is [ErrOtherHistory].
	At Position
	// Recheck, if not nil, is called with the live entities that changed after
	// EntitiesRevision, under the revision lock: all writers wait for it. Its error
	// refuses the publish, and is returned wrapped.
	Recheck func(changed []Entity) error
	// Rules, if not nil, is called under the revision lock with the state of the bundle and of the
	// change that Bundle.Change names. What it returns is written as the revision after that of the
	// publish; the store fills in the version of the change. Its error refuses the publish.
	Rules func(PolicyState) (PolicyWrite, error)
	// Once, if not nil, makes the publish happen once.
	Once *Once[Published]
}

// Published is the result of a publish.
type Published struct {
	// Revision is the revision of the publish, and Mark the mark of the revision.
	Revision int64
	Mark     uuid.UUID
	// Version is the new version of the bundle, published at At.
	Version int64
	At      time.Time
}

// PublishBundle replaces the live bundle of that name, as one revision. Policies and
// files that did not change keep their rows. The error is [ErrPolicyChanged] if any
// bundle was published after BaseRevision, and [ErrRepeated] if there is an answer for the key of
// Once already.
func (db *DB) PublishBundle(ctx context.Context, p Publish) (made Published, err error) {
	defer wrap(&err, "publish bundle")
	err = db.inTurn(ctx, func(tx pgx.Tx) error {
		// Compare before the lock is taken. If recheck finds that the policies are still
		// at BaseRevision, they were at BaseRevision here too.
		policies, err := comparePolicies(ctx, tx, p.Bundle)
		if err != nil {
			return err
		}
		files, err := compareFiles(ctx, tx, p.Bundle.Name, p.Files)
		if err != nil {
			return err
		}
		if made.Revision, err = nextRevision(ctx, tx, p.Caller); err != nil {
			return err
		}
		if made.Mark, err = readMark(ctx, tx, made.Revision); err != nil {
			return err
		}
		if err := recheck(ctx, tx, p); err != nil {
			return err
		}
		var besides PolicyWrite
		if p.Rules != nil {
			state, err := readPolicyState(ctx, tx, p.Bundle.Name, p.Bundle.Change)
			if err != nil {
				return err
			}
			if besides, err = p.Rules(state); err != nil {
				return err
			}
		}
		p.Bundle.BreakGlass = ""
		if besides.BreakGlass != nil {
			p.Bundle.BreakGlass = besides.BreakGlass.Reason
		}
		var before []byte
		if before, err = insertBundle(ctx, tx, p, &made); err != nil {
			return err
		}
		if err := writePolicies(ctx, tx, made.Revision, p.Bundle.Name, policies); err != nil {
			return err
		}
		if err := writeFiles(ctx, tx, made.Revision, p.Bundle.Name, files); err != nil {
			return err
		}
		if err := addEntry(ctx, tx, made.Revision, KindBundle, p.Bundle.Name); err != nil {
			return err
		}
		stored, err := readStoredBundle(ctx, tx, p.Bundle.Name, made.Revision)
		if err != nil {
			return err
		}
		err = db.changes.send(ctx, tx, Changed{
			Revision: made.Revision, Caller: p.Caller, Kind: KindBundle, ID: p.Bundle.Name, Version: made.Version,
			Before: before, After: []byte(p.Bundle.Digest), Stored: stored.Stored, Reason: p.Bundle.Message,
		})
		if err != nil {
			return err
		}
		if besides.BreakGlass != nil {
			err := db.changes.send(ctx, tx, Changed{
				Revision: made.Revision, Caller: p.Caller, Kind: KindBreakGlass, ID: p.Bundle.Name, Version: made.Version,
				Reason: besides.BreakGlass.Reason, Rules: besides.BreakGlass.Rules, OfChange: p.Bundle.Change,
			})
			if err != nil {
				return err
			}
		}
		if besides.Change != nil {
			besides.Change.Version = made.Version
		}
		if _, err := db.writePolicyState(ctx, tx, p.Caller, p.Bundle.Name, besides); err != nil {
			return err
		}
		return p.Once.keep(ctx, tx, p.Caller, made)
	})
	if err != nil {
		return Published{}, err
	}
	return made, nil
}

// recheck makes sure, under the lock, that what the publish was checked against has not
// changed.
func recheck(ctx context.Context, tx pgx.Tx, p Publish) error {
	var newest int64
	err := tx.QueryRow(ctx, selectNewestPublish).Scan(&newest)
	if err != nil {
		return err
	}
	if newest != p.BaseRevision {
		return ErrPolicyChanged
	}
	var batch pgx.Batch
	checkPosition(&batch, p.At, ErrOtherHistory)
	if err := tx.SendBatch(ctx, &batch).Close(); err != nil {
		return err
	}
	if p.Recheck == nil {
		return nil
	}
	const query = `
		select e.type, e.id, e.attrs, e.tags, e.parents, e.since
		from (select distinct type, id from revision_entries where revision > $1 and kind = 'entity') changed
		join entities e on e.type = changed.type and e.id = changed.id and e.until is null`
	rows, _ := tx.Query(ctx, query, p.EntitiesRevision)
	changed, err := pgx.CollectRows(rows, scanEntity)
	if err != nil {
		return err
	}
	return p.Recheck(changed)
}

// selectNewestPublish reads the revision of the newest change to any bundle.
const selectNewestPublish = "select coalesce(greatest(max(since), max(until)), 0) from bundles"

// insertBundle ends the live version and inserts the new one. It sets the version and the time in
// made, and returns the digest of the version that it ended.
func insertBundle(ctx context.Context, tx pgx.Tx, p Publish, made *Published) (before []byte, err error) {
	b := p.Bundle
	const closing = "update bundles set until = $1 where name = $2 and until is null returning convert_to(digest, 'UTF8')"
	err = tx.QueryRow(ctx, closing, made.Revision, b.Name).Scan(&before)
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return nil, err
	}
	const query = `
		insert into bundles (name, version, digest, description, owners, on_forbid_error, namespaces,
		                     schema, fields, policies, published_by, since, message, change, rollback_of, approvals,
		                     rules, break_glass, ruled)
		values ($1, (select coalesce(max(version), 0) + 1 from bundles where name = $1),
		        $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18)
		returning version, published_at`
	err = tx.QueryRow(ctx, query, b.Name, b.Digest, b.Description, orEmpty(b.Owners), b.OnForbidError,
		orEmpty(b.Namespaces), b.Schema, b.Fields, len(b.Policies), p.Caller, made.Revision,
		b.Message, b.Change, b.RollbackOf, b.Approvals, b.Rules, b.BreakGlass, p.Rules != nil).Scan(&made.Version, &made.At)
	return before, err
}

// difference is what a publish changes: the keys of the live rows to end, and the rows to
// insert. A row that changed is in both.
type difference[T any] struct {
	gone []string
	come []T
}

func comparePolicies(ctx context.Context, tx pgx.Tx, b Bundle) (diff difference[Policy], err error) {
	type row struct {
		File string
		Line int
		Sum  [sha256.Size]byte
	}
	live := map[string]row{}
	rows, _ := tx.Query(ctx, `
		select id, file, line, sha256(convert_to(text, 'UTF8'))
		from policies
		where bundle = $1 and until is null`, b.Name)
	var id string
	var r row
	var sum []byte
	_, err = pgx.ForEachRow(rows, []any{&id, &r.File, &r.Line, &sum}, func() error {
		r.Sum = [sha256.Size]byte(sum)
		live[id] = r
		return nil
	})
	for _, p := range b.Policies {
		if was, ok := live[p.ID]; !ok || was != (row{p.File, p.Line, sha256.Sum256([]byte(p.Text))}) {
			diff.come = append(diff.come, p)
			continue
		}
		delete(live, p.ID)
	}
	for id := range live {
		diff.gone = append(diff.gone, id)
	}
	return diff, err
}

func writePolicies(ctx context.Context, tx pgx.Tx, n int64, bundle string, diff difference[Policy]) error {
	_, err := tx.Exec(ctx, "update policies set until = $1 where bundle = $2 and id = any($3) and until is null",
		n, bundle, diff.gone)
	if err != nil {
		return err
	}
	_, err = tx.CopyFrom(ctx, pgx.Identifier{"policies"}, []string{"bundle", "id", "file", "line", "text", "since"},
		pgx.CopyFromSlice(len(diff.come), func(i int) ([]any, error) {
			p := &diff.come[i]
			return []any{bundle, p.ID, p.File, p.Line, p.Text, n}, nil
		}))
	return err
}

func compareFiles(ctx context.Context, tx pgx.Tx, bundle string, files []File) (diff difference[File], err error) {
	live := map[string][sha256.Size]byte{}
	rows, _ := tx.Query(ctx, `
		select path, sha256(content)
		from bundle_files
		where bundle = $1 and until is null`, bundle)
	var path string
	var sum []byte
	_, err = pgx.ForEachRow(rows, []any{&path, &sum}, func() error {
		live[path] = [sha256.Size]byte(sum)
		return nil
	})
	for _, f := range files {
		if was, ok := live[f.Path]; !ok || was != sha256.Sum256(f.Content) {
			diff.come = append(diff.come, f)
			continue
		}
		delete(live, f.Path)
	}
	for path := range live {
		diff.gone = append(diff.gone, path)
	}
	return diff, err
}

func writeFiles(ctx context.Context, tx pgx.Tx, n int64, bundle string, diff difference[File]) error {
	_, err := tx.Exec(ctx, "update bundle_files set until = $1 where bundle = $2 and path = any($3) and until is null",
		n, bundle, diff.gone)
	if err != nil {
		return err
	}
	_, err = tx.CopyFrom(ctx, pgx.Identifier{"bundle_files"}, []string{"bundle", "path", "content", "since"},
		pgx.CopyFromSlice(len(diff.come), func(i int) ([]any, error) {
			f := &diff.come[i]
			content := f.Content
			if content == nil {
				content = []byte{} // an empty file is not null
			}
			return []any{bundle, f.Path, content, n}, nil
		}))
	return err
}

// PolicyRevision reads the revision of the newest change to any bundle, at or before the
// given revision. It is 0 if there was none.
func (db *DB) PolicyRevision(ctx context.Context, revision int64) (n int64, err error) {
	defer wrap(&err, "read policy revision")
	return readPolicyRevision(ctx, db.pool, revision)
}

func readPolicyRevision(ctx context.Context, q querier, revision int64) (n int64, err error) {
	const query = `
		select coalesce(max(greatest(since, case when until <= $1 then until end)), 0)
		from bundles
		where since <= $1`
	err = q.QueryRow(ctx, query, revision).Scan(&n)
	return n, err
}

// Bundles reads the bundles that were live at the revision, by name, with their policies
// and without their files.
func (db *DB) Bundles(ctx context.Context, revision int64) (_ []Bundle, err error) {
	defer wrap(&err, "read bundles")
	return readBundles(ctx, db.pool, revision)
}

func readBundles(ctx context.Context, q querier, revision int64) ([]Bundle, error) {
	rows, _ := q.Query(ctx, `
		select b.name, b.version, b.digest, b.description, b.owners, b.on_forbid_error, b.namespaces, b.schema, b.fields,
		       f.content as manifest, b.policies, b.published_by, b.published_at, b.since, b.message, b.change, b.rollback_of, b.approvals,
		       b.rules, b.break_glass
		from bundles b
		left join bundle_files f on f.bundle = b.name and f.path = 'bundle.yaml' and f.since <= $1 and (f.until is null or f.until > $1)
		where b.since <= $1 and (b.until is null or b.until > $1)
		order by b.name`, revision)
	bundles, err := pgx.CollectRows(rows, pgx.RowToStructByName[Bundle])
	if err != nil {
		return nil, err
	}
	// The two reads agree without a transaction, because a revision never changes.
	rows, _ = q.Query(ctx, `
		select bundle, id, file, line, text, since
		from policies
		where since <= $1 and (until is null or until > $1)
		order by bundle, id`, revision)
	policies, err := pgx.CollectRows(rows, pgx.RowToStructByName[Policy])
	if err != nil {
		return nil, err
	}
	for i := range bundles {
		n := 0
		for n < len(policies) && policies[n].Bundle == bundles[i].Name {
			n++
		}
		bundles[i].Policies, policies = policies[:n:n], policies[n:]
	}
	return bundles, nil
}

// BundleFiles lists the files of a bundle as they were at the revision, by path, with their
// sizes. There are none if the bundle was not live at it.
func (db *DB) BundleFiles(ctx context.Context, revision int64, name string) (_ []FileSize, err error) {
	defer wrap(&err, "list bundle files")
	rows, _ := db.admin.Query(ctx, `
		select path, octet_length(content) as bytes
		from bundle_files
		where bundle = $2 and since <= $1 and (until is null or until > $1)
		order by path`, revision, name)
	return pgx.CollectRows(rows, pgx.RowToStructByName[FileSize])
}

// FileSize is a file of a bundle without its content.
type FileSize struct {
	Path  string
	Bytes int
}

// ReadBundleFile reads at most n bytes of a file of a bundle, from an offset on, as it was at the
// revision. The error is [ErrNotFound] if the bundle had no such file.
func (db *DB) ReadBundleFile(ctx context.Context, revision int64, name, path string, from, n int) (data []byte, err error) {
	defer wrap(&err, "read bundle file")
	err = db.admin.QueryRow(ctx, `
		select substring(content from $4 for $5)
		from bundle_files
		where bundle = $2 and path = $3 and since <= $1 and (until is null or until > $1)`, revision, name, path, from+1, n).Scan(&data)
	return data, notFound(err)
}

// OwnersOf lists the names of the bundles that had one of some namespaces at any revision of the
// history, sorted.
func (db *DB) OwnersOf(ctx context.Context, namespaces []string) (_ []string, err error) {
	defer wrap(&err, "read who had namespaces")
	rows, _ := db.admin.Query(ctx, "select distinct name from bundles where namespaces && $1 order by name", namespaces)
	return pgx.CollectRows(rows, pgx.RowTo[string])
}
