package store

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"

	"github.com/jackc/pgx/v5"
)

// History is all that is stored at one moment, for an auditor who compares it with the
// log. It uses a connection until it is closed.
type History struct {
	tx pgx.Tx
	// Oldest is the first revision that can be read, Newest the last.
	Oldest, Newest int64

	page []storedRow // read, and not returned yet
	end  bool        // there are no more pages
}

// StoredRevision is what a revision changed, according to the stored rows.
type StoredRevision struct {
	Revision int64
	// Before is the digest over the entities that it replaced or removed, and After that
	// over the entities that it wrote, as in [Changed]. Nil stands for no entities.
	Before, After []byte
	// Written is the number of entities that it wrote.
	Written int64
	// Entities are the entities that it changed, at most [StoredNames].
	Entities []UID
	// Bundles have a version, a policy or a file that begins or ends at the revision.
	// Keys are those that it added.
	Bundles, Keys []string
}

// StoredNames bounds the entities that a [StoredRevision] names.
const StoredNames = 100

// storedPage is the number of rows that are read at once.
const storedPage = 100

// The sides of a revision, in the order in which they are read.
const (
	sideBefore = iota
	sideAfter
	sideBundle
	sideKey
)

type storedRow struct {
	storedEntity
	revision int64
	side     int
}

// OpenHistory begins to read. What is committed later is not in it. So if the caller
// reads the log after it, the log has the event of each revision in it.
func (db *DB) OpenHistory(ctx context.Context) (_ *History, err error) {
	defer wrap(&err, "read stored history")
	tx, err := db.audit.BeginTx(ctx, oneSnapshot)
	if err != nil {
		return nil, err
	}
	h := &History{tx: tx}
	defer func() {
		if err != nil {
			h.Close()
		}
	}()
	if _, err := tx.Exec(ctx, unhurried); err != nil {
		return nil, err
	}
	err = tx.QueryRow(ctx, "select oldest, n from history, revision").Scan(&h.Oldest, &h.Newest)
	if err != nil {
		return nil, err
	}
	// The rows of a revision follow each other. The database sorts them, on disk if
	// necessary.
	_, err = tx.Exec(ctx, fmt.Sprintf(`
		declare stored no scroll cursor for
		select revision, side, type, id, attrs, tags, parents
		from (
			select until as revision, %[1]d as side, type, id, attrs, tags, parents from entities where until > %[5]d
			union all
			select since, %[2]d, type, id, attrs, tags, parents from entities where since > %[5]d or since <= 0
			union all
			select revision, %[3]d, '', name, '{}', '{}', '{}'
			from (
				select since as revision, name from bundles union select until, name from bundles
				union select since, bundle from policies union select until, bundle from policies
				union select since, bundle from bundle_files union select until, bundle from bundle_files
			) as published
			where revision is not null
			union all
			select since, %[4]d, '', id, '{}', '{}', '{}' from audited_keys() where since > %[5]d
		) as stored
		order by revision, side, type collate "C", id collate "C"`,
		sideBefore, sideAfter, sideBundle, sideKey, h.Oldest))
	return h, err
}

// Close ends the read.
func (h *History) Close() { _ = h.tx.Rollback(context.Background()) } // it only reads

// Next returns the next revision that rows name, in order, or nil at the end. Up to
// Oldest, a revision has bundles only, because they are never swept. A revision can be
// newer than Newest or older than the first one if rows were tampered with: no write of
// the service makes such rows.
func (h *History) Next(ctx context.Context) (r *StoredRevision, err error) {
	defer wrap(&err, "read stored history")
	var sums [2]hash.Hash
	for {
		row, err := h.peek(ctx)
		if err != nil {
			return nil, err
		}
		if row == nil || r != nil && row.revision != r.Revision {
			break
		}
		h.page = h.page[1:]
		if r == nil {
			r = &StoredRevision{Revision: row.revision}
		}
		switch row.side {
		case sideBundle:
			r.Bundles = append(r.Bundles, row.ID)
		case sideKey:
			r.Keys = append(r.Keys, row.ID)
		default:
			values, err := row.values()
			if err != nil {
				return nil, err
			}
			if sums[row.side] == nil {
				sums[row.side] = sha256.New()
			}
			sums[row.side].Write(jsonLine(values...))
			r.name(row)
		}
	}
	if r != nil {
		for side, into := range []*[]byte{&r.Before, &r.After} {
			if sums[side] != nil {
				*into = sums[side].Sum(nil)
			}
		}
	}
	return r, nil
}

func (r *StoredRevision) name(row *storedRow) {
	if row.side == sideAfter {
		r.Written++
	}
	uid := UID{row.Type, row.ID}
	for _, known := range r.Entities {
		if known == uid {
			return
		}
	}
	if len(r.Entities) < StoredNames {
		r.Entities = append(r.Entities, uid)
	}
}

// peek returns the next row, or nil at the end.
func (h *History) peek(ctx context.Context) (*storedRow, error) {
	if len(h.page) == 0 && !h.end {
		// FETCH cannot be prepared, because each cursor is a new one.
		rows, _ := h.tx.Query(ctx, fmt.Sprintf("fetch forward %d from stored", storedPage), pgx.QueryExecModeSimpleProtocol)
		page, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (r storedRow, err error) {
			err = row.Scan(&r.revision, &r.side, &r.Type, &r.ID, &r.Attrs, &r.Tags, &r.Parents)
			return r, err
		})
		if err != nil {
			return nil, err
		}
		h.page, h.end = page, len(page) < storedPage
	}
	if len(h.page) == 0 {
		return nil, nil
	}
	return &h.page[0], nil
}

// StateRoot computes the state root of a revision, which must not be below Oldest.
func (h *History) StateRoot(ctx context.Context, revision int64) (_ StateRoot, err error) {
	defer wrap(&err, "compute state root")
	return readStateRoot(ctx, h.tx, revision)
}

// Bundle reads what is stored of a bundle at a revision. The error is [ErrNotFound]
// if there is none.
func (h *History) Bundle(ctx context.Context, name string, revision int64) (_ StoredBundle, err error) {
	defer wrap(&err, "read stored bundle")
	return readStoredBundle(ctx, h.tx, name, revision)
}

// BundleBefore reads the digest of the version of a bundle that ended at a revision. It
// is "" if there is none.
func (h *History) BundleBefore(ctx context.Context, name string, revision int64) (digest string, err error) {
	defer wrap(&err, "read stored bundle")
	err = h.tx.QueryRow(ctx, "select digest from bundles where name = $1 and until = $2 order by since desc limit 1",
		name, revision).Scan(&digest)
	if errors.Is(err, pgx.ErrNoRows) {
		err = nil
	}
	return digest, err
}

// Keys reads all API keys, by id.
func (h *History) Keys(ctx context.Context) (_ []StoredKey, err error) {
	defer wrap(&err, "read stored keys")
	return readStoredKeys(ctx, h.tx)
}

// NewestRevision reads the newest revision with the rights of an auditor.
func (db *DB) NewestRevision(ctx context.Context) (n int64, err error) {
	defer wrap(&err, "read revision")
	err = db.audit.QueryRow(ctx, "select n from revision").Scan(&n)
	return n, err
}
