package store

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/cedarpost/cedarpost/auditlog"
)

// StateRoot commits to all that is stored at a revision. docs/audit.md defines the bytes.
type StateRoot struct {
	Revision int64
	Root     tlog.Hash
	// Entities, Bundles and Keys are their numbers.
	Entities, Bundles, Keys int64
}

// oneSnapshot are the options of a transaction that reads, and sees one moment all the
// time.
var oneSnapshot = pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}

// unhurried lifts the timeouts of a transaction.
const unhurried = "set local statement_timeout = 0; set local idle_in_transaction_session_timeout = 0"

// WriteStateRoot records the state root of the newest revision, unless the log has one of
// today (UTC). It reports whether the log has one afterwards, which is false while
// another server computes it. makeEvent makes the record.
//
// It reads the state with the rights of an auditor, in memory that does not grow with it.
func (db *DB) WriteStateRoot(ctx context.Context, makeEvent func(context.Context, StateRoot) (Event, error)) (there bool, err error) {
	defer wrap(&err, "record state root")
	if there, err = db.hasStateRoot(ctx); err != nil || there {
		return there, err
	}
	_, err = db.Lead(ctx, stateRootLock, func(ctx context.Context, _ func(context.Context) error) error {
		if there, err = db.hasStateRoot(ctx); err != nil || there {
			return err
		}
		var root StateRoot
		var at Position
		err := pgx.BeginTxFunc(ctx, db.audit, oneSnapshot, func(tx pgx.Tx) (err error) {
			if _, err := tx.Exec(ctx, unhurried); err != nil {
				return err
			}
			rows, _ := tx.Query(ctx, selectPosition)
			if at, err = scanPosition(rows); err == nil {
				root, err = readStateRoot(ctx, tx, at.Number)
			}
			return err
		})
		if err != nil {
			return err
		}
		e, err := makeEvent(ctx, root)
		if err != nil {
			return err
		}
		// After a failover in between, the revision can have another content.
		var batch pgx.Batch
		checkPosition(&batch, at, ErrOtherHistory)
		db.changes.queue(&batch, e)
		err = pgx.BeginTxFunc(ctx, db.admin, readCommitted, func(tx pgx.Tx) error { return tx.SendBatch(ctx, &batch).Close() })
		there = err == nil
		return err
	})
	return there, err
}

func (db *DB) hasStateRoot(ctx context.Context) (there bool, err error) {
	err = db.audit.QueryRow(ctx, `
		select exists (
			select from events r
			where kind = 'state_root' and at >= date_trunc('day', now() at time zone 'UTC') at time zone 'UTC'
			  and at < (date_trunc('day', now() at time zone 'UTC') + interval '1 day') at time zone 'UTC'
			  and `+ofBatch+`)`).Scan(&there)
	return there, err
}

// readStateRoot computes the state root of a revision.
func readStateRoot(ctx context.Context, tx pgx.Tx, revision int64) (s StateRoot, err error) {
	s.Revision = revision
	var tree auditlog.RootBuilder
	add := func(values ...any) { tree.Add(auditlog.Hash(jsonLine(values...))) }
	rows, err := tx.Query(ctx, `
		select type, id, attrs, tags, parents
		from entities
		where since <= $1 and (until is null or until > $1)
		order by type, id`, pgx.QueryExecModeCacheDescribe, revision)
	if err != nil {
		return s, err
	}
	defer rows.Close()
	for rows.Next() {
		var r storedEntity
		if err := rows.Scan(&r.Type, &r.ID, &r.Attrs, &r.Tags, &r.Parents); err != nil {
			return s, err
		}
		values, err := r.values()
		if err != nil {
			return s, err
		}
		add(append([]any{KindEntity}, values...)...)
		s.Entities++
	}
	if err := rows.Err(); err != nil {
		return s, err
	}

	rows, _ = tx.Query(ctx, `
		select name from bundles
		where since <= $1 and (until is null or until > $1)
		order by name`, revision)
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return s, err
	}
	for _, name := range names {
		b, err := readStoredBundle(ctx, tx, name, revision)
		if err != nil {
			return s, err
		}
		add(KindBundle, name, hex.EncodeToString(b.Stored))
		s.Bundles++
	}

	keys, err := readStoredKeys(ctx, tx)
	if err != nil {
		return s, err
	}
	for _, k := range keys {
		if k.Since <= revision && (!k.Revoked || k.Until != nil && *k.Until > revision) {
			add(append([]any{KindKey}, keyValues(k.ID, k.Name, k.hash, k.ExpiresAt)...)...)
			s.Keys++
		}
	}
	s.Root = tree.Root()
	return s, nil
}

// storedEntity is a row of entities. It can also hold values that no write of this
// package stores.
type storedEntity struct {
	Type, ID    string
	Attrs, Tags []byte
	Parents     []*string
}

// values returns the values of the entity's line. For a parent without a space, or null,
// the line differs from that of every entity that this package writes.
func (r storedEntity) values() ([]any, error) {
	e := Entity{UID: UID{r.Type, r.ID}, Attrs: r.Attrs, Tags: r.Tags}
	values, err := canonical(&e)
	if err != nil {
		return nil, err
	}
	parents := make([]any, len(r.Parents))
	for i, p := range r.Parents {
		if p == nil {
			continue
		}
		if typ, id, ok := strings.Cut(*p, " "); ok {
			parents[i] = [2]string{typ, id}
		} else {
			parents[i] = *p
		}
	}
	return append(values[:4], parents), nil
}

// StoredBundle is what is stored of a bundle at a revision.
type StoredBundle struct {
	// Since is the revision that published Version.
	Since, Version int64
	Digest         string
	// Stored is the SHA-256 over all that is stored of it.
	Stored []byte
}

// readStoredBundle reads the bundle that was live at a revision. The error is
// [ErrNotFound] if there was none.
func readStoredBundle(ctx context.Context, tx pgx.Tx, name string, revision int64) (b StoredBundle, err error) {
	var description, onForbidError, schema, fields, publishedBy string
	var owners, namespaces []string
	var policies, approvals int32
	var message, change, rules, breakGlass string
	var rollbackOf int64
	err = tx.QueryRow(ctx, `
		select since, version, digest, description, owners, on_forbid_error, namespaces, schema, fields, policies, published_by,
		       message, change, rollback_of, approvals, rules, break_glass
		from bundles
		where name = $1 and since <= $2 and (until is null or until > $2)
		order by since desc limit 1`, name, revision).Scan(
		&b.Since, &b.Version, &b.Digest, &description, &owners, &onForbidError, &namespaces, &schema, &fields, &policies, &publishedBy,
		&message, &change, &rollbackOf, &approvals, &rules, &breakGlass)
	if err != nil {
		return b, notFound(err)
	}
	sum := sha256.New()
	add := func(values ...any) { sum.Write(jsonLine(values...)) }
	add("bundle", name, b.Version, b.Digest, description, orEmpty(owners), onForbidError, orEmpty(namespaces), schema, fields, policies, publishedBy)
	if message != "" || change != "" || rollbackOf != 0 || approvals != 0 { // events from before there were these have no such line
		add("published", message, change, rollbackOf, approvals)
	}
	if rules != "" || breakGlass != "" { // as above
		add("rules", rules, breakGlass)
	}
	rows, _ := tx.Query(ctx, `
		select id, file, line, text
		from policies
		where bundle = $1 and since <= $2 and (until is null or until > $2)
		order by id, since`, name, revision)
	var id, file, text string
	var line int32
	_, err = pgx.ForEachRow(rows, []any{&id, &file, &line, &text}, func() error {
		add("policy", id, file, line, text)
		return nil
	})
	if err != nil {
		return b, err
	}
	rows, _ = tx.Query(ctx, `
		select path, sha256(content)
		from bundle_files
		where bundle = $1 and since <= $2 and (until is null or until > $2)
		order by path, since`, name, revision)
	var hash []byte
	_, err = pgx.ForEachRow(rows, []any{&file, &hash}, func() error {
		add("file", file, hex.EncodeToString(hash))
		return nil
	})
	b.Stored = sum.Sum(nil)
	return b, err
}

// StoredKey is what an auditor can read of an API key.
type StoredKey struct {
	ID, Name string
	// ExpiresAt is when it ends; nil: never.
	ExpiresAt *time.Time
	Revoked   bool
	// Until is the revision that revoked it; nil if none did.
	Until *int64
	// Since is the revision that added it, or 0: older versions did not store it, and the
	// sweep may have removed that revision.
	Since int64
	// Digest is the digest in the event that added the key.
	Digest []byte
	hash   []byte // the SHA-256 of the stored hash
}

// readStoredKeys reads all keys, by id.
func readStoredKeys(ctx context.Context, tx pgx.Tx) ([]StoredKey, error) {
	rows, _ := tx.Query(ctx, `select id, name, expires_at, revoked, since, until, hash from audited_keys() order by id collate "C"`)
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (k StoredKey, err error) {
		err = row.Scan(&k.ID, &k.Name, &k.ExpiresAt, &k.Revoked, &k.Since, &k.Until, &k.hash)
		sum := sha256.Sum256(keyLine(k.ID, k.Name, k.hash, k.ExpiresAt))
		k.Digest = sum[:]
		return k, err
	})
}
