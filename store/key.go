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
	// Name is the caller that has the key. A caller can have several.
	Name string
	// Hash is the SHA-256 of the secret, 32 bytes.
	Hash []byte
	// CreatedAt is set by the database.
	CreatedAt time.Time
	// ExpiresAt is when the key ends, to the microsecond; nil: never.
	ExpiresAt *time.Time
}

// Live reports whether the key has not ended at a time.
func (k Key) Live(now time.Time) bool { return k.ExpiresAt == nil || now.Before(*k.ExpiresAt) }

// readKeys reads the keys that are not revoked, by id. They can have expired.
func readKeys(ctx context.Context, q querier) ([]Key, error) {
	rows, _ := q.Query(ctx, `
		select id, name, hash, created_at, expires_at
		from api_keys
		where revoked_at is null
		order by id`)
	return pgx.CollectRows(rows, pgx.RowToStructByName[Key])
}

// Keys reads the keys that are not revoked, by id. They can have expired.
func (db *DB) Keys(ctx context.Context) (_ []Key, err error) {
	defer wrap(&err, "read API keys")
	return readKeys(ctx, db.admin)
}

// CreateKey stores a key in a revision of its own.
func (db *DB) CreateKey(ctx context.Context, key Key, caller string) (err error) {
	defer wrap(&err, "create API key")
	return db.inTurn(ctx, func(tx pgx.Tx) error { return db.addKey(ctx, tx, &key, caller) })
}

// addKey stores a key in the next revision, and sets its CreatedAt.
func (db *DB) addKey(ctx context.Context, tx pgx.Tx, key *Key, caller string) error {
	if err := db.changeKey(ctx, tx, caller, func(n int64, digest []byte) Changed {
		return Changed{Revision: n, Caller: caller, Kind: KindKey, ID: key.ID, KeyCaller: key.Name, After: digest}
	}, *key); err != nil {
		return err
	}
	if _, err := tx.Exec(ctx, "select add_api_key($1, $2, $3, $4, (select n from revision))", key.ID, key.Name, key.Hash, key.ExpiresAt); err != nil {
		return err
	}
	return tx.QueryRow(ctx, "select created_at from api_keys where id = $1", key.ID).Scan(&key.CreatedAt)
}

// revokeKey ends a key in the next revision.
func (db *DB) revokeKey(ctx context.Context, tx pgx.Tx, key Key, caller string) error {
	if err := db.changeKey(ctx, tx, caller, func(n int64, digest []byte) Changed {
		return Changed{Revision: n, Caller: caller, Kind: KindKey, ID: key.ID, KeyCaller: key.Name, Before: digest}
	}, key); err != nil {
		return err
	}
	_, err := tx.Exec(ctx, "select revoke_api_key($1, (select n from revision))", key.ID)
	return err
}

// changeKey makes the next revision, and records the event of a key before the key is changed,
// as the database demands.
func (db *DB) changeKey(ctx context.Context, tx pgx.Tx, caller string, changed func(n int64, digest []byte) Changed, key Key) error {
	n, err := nextRevision(ctx, tx, caller)
	if err != nil {
		return err
	}
	if err := addEntry(ctx, tx, n, KindKey, key.ID); err != nil {
		return err
	}
	hash := sha256.Sum256(key.Hash)
	digest := sha256.Sum256(keyLine(key.ID, key.Name, hash[:], key.ExpiresAt))
	return db.changes.send(ctx, tx, changed(n, digest[:]))
}

// keyLine is the line that the digest of a key is made of. hash is the SHA-256 of the
// stored hash. A key without an end has a line without one, as before keys could have ends.
func keyLine(id, name string, hash []byte, expires *time.Time) []byte {
	return jsonLine(keyValues(id, name, hash, expires)...)
}

func keyValues(id, name string, hash []byte, expires *time.Time) []any {
	values := []any{id, name, hex.EncodeToString(hash)}
	if expires != nil {
		values = append(values, expires.UTC().Format(time.RFC3339Nano))
	}
	return values
}

// KeyUse says when a key was used last.
type KeyUse struct {
	ID string
	At time.Time
}

// NoteKeyUses stores that keys were used, unless it is known that they were used later.
func (db *DB) NoteKeyUses(ctx context.Context, uses []KeyUse) (err error) {
	defer wrap(&err, "note the uses of API keys")
	ids, times := make([]string, len(uses)), make([]time.Time, len(uses))
	for i, u := range uses {
		ids[i], times[i] = u.ID, u.At
	}
	// In a fixed order, so that two servers do not wait for each other.
	_, err = db.admin.Exec(ctx, `
		insert into key_uses (id, at)
		select id, at from unnest($1::text[], $2::timestamptz[]) as used (id, at) order by id
		on conflict (id) do update set at = excluded.at where key_uses.at < excluded.at`, ids, times)
	return err
}

// KeyUses reads when each key was used last, by id.
func (db *DB) KeyUses(ctx context.Context) (_ map[string]time.Time, err error) {
	defer wrap(&err, "read the uses of API keys")
	rows, _ := db.admin.Query(ctx, "select id, at from key_uses")
	list, err := pgx.CollectRows(rows, pgx.RowToStructByName[KeyUse])
	uses := make(map[string]time.Time, len(list))
	for _, u := range list {
		uses[u.ID] = u.At
	}
	return uses, err
}
