package store

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"time"

	"github.com/jackc/pgx/v5"
)

// Key is an API key that is not revoked. The secret is not in the database.
type Key struct {
	// ID names the key. It never names another one.
	ID string
	// Name is for people.
	Name string
	// Hash is the SHA-256 of the secret, 32 bytes.
	Hash []byte
	// CreatedAt is set by the database.
	CreatedAt time.Time
}

// readKeys reads the keys that are not revoked, by id.
func readKeys(ctx context.Context, q querier) ([]Key, error) {
	rows, _ := q.Query(ctx, `
		select id, name, hash, created_at
		from api_keys
		where revoked_at is null
		order by id`)
	return pgx.CollectRows(rows, pgx.RowToStructByName[Key])
}

// CreateKey stores a key in a revision of its own.
func (db *DB) CreateKey(ctx context.Context, key Key, caller string) (err error) {
	defer wrap(&err, "create API key")
	return db.inTurn(ctx, func(tx pgx.Tx) error {
		n, err := nextRevision(ctx, tx, caller)
		if err != nil {
			return err
		}
		return db.insertKey(ctx, tx, n, key, caller)
	})
}

// Bootstrap calls fn with the keys that exist, and stores the key that fn returns, if
// any. Servers that start at the same time take turns, so fn sees the key that another
// server stored. If fn or the commit fails, nothing is stored.
func (db *DB) Bootstrap(ctx context.Context, fn func(ctx context.Context, existing []Key) (*Key, error)) (err error) {
	defer wrap(&err, "bootstrap")
	return db.inTurn(ctx, func(tx pgx.Tx) error {
		// The revision lock, in a statement of its own, so that the next one sees what was
		// committed before the lock was taken.
		if _, err := tx.Exec(ctx, "select from revision for update"); err != nil {
			return err
		}
		existing, err := readKeys(ctx, tx)
		if err != nil {
			return err
		}
		key, err := fn(ctx, existing)
		if err != nil || key == nil {
			return err
		}
		n, err := nextRevision(ctx, tx, "bootstrap")
		if err != nil {
			return err
		}
		return db.insertKey(ctx, tx, n, *key, "bootstrap")
	})
}

// insertKey records the event before it adds the key, as the database demands.
func (db *DB) insertKey(ctx context.Context, tx pgx.Tx, n int64, key Key, caller string) error {
	if err := addEntry(ctx, tx, n, KindKey, key.ID); err != nil {
		return err
	}
	hash := sha256.Sum256(key.Hash)
	after := sha256.Sum256(keyLine(key.ID, key.Name, hash[:]))
	c := Changed{Revision: n, Caller: caller, Kind: KindKey, ID: key.ID, After: after[:]}
	if err := db.changes.send(ctx, tx, c); err != nil {
		return err
	}
	_, err := tx.Exec(ctx, "select add_api_key($1, $2, $3, $4)", key.ID, key.Name, key.Hash, n)
	return err
}

// keyLine is the line that the digest of a key is made of. hash is the SHA-256 of the
// stored hash.
func keyLine(id, name string, hash []byte) []byte {
	return jsonLine(id, name, hex.EncodeToString(hash))
}
