package store

import (
	"context"
	"crypto/sha256"
	"errors"
	"time"

	"github.com/jackc/pgx/v5"
)

// onceRetention is the time for which a repeated request gets the answer of the first one.
const onceRetention = 24 * time.Hour

// ErrRepeated is the error of a write whose caller has made a write with the same idempotency key
// within a day. [DB.Answered] returns the answer to that write.
var ErrRepeated = errors.New("a write with this idempotency key was made before")

// Once makes a write happen once within a day, however often its caller sends the request. R is the
// result of the write.
type Once[R any] struct {
	// Key is the idempotency key. Each caller has keys of its own.
	Key string
	// Request is the SHA-256 of what the request asks for.
	Request [sha256.Size]byte
	// Answer returns the answer to the request. It is stored in the transaction of the write.
	Answer func(R) ([]byte, error)
}

// keep stores the answer to a write in the transaction of the write. The error is [ErrRepeated] if
// the caller has one for this key already. A nil Once keeps nothing.
func (o *Once[R]) keep(ctx context.Context, tx pgx.Tx, caller string, result R) error {
	if o == nil {
		return nil
	}
	answer, err := o.Answer(result)
	if err != nil {
		return err
	}
	tag, err := tx.Exec(ctx, `
		insert into idempotency_keys (caller, key, request, answer) values ($1, $2, $3, $4)
		on conflict (caller, key) do update
		set request = excluded.request, answer = excluded.answer, at = excluded.at
		where idempotency_keys.at < clock_timestamp() - $5::interval`,
		caller, o.Key, o.Request[:], answer, onceRetention)
	if err == nil && tag.RowsAffected() == 0 {
		err = ErrRepeated
	}
	return err
}

// Answered reads the answer to a write that a caller has made with an idempotency key, and the
// SHA-256 of what the write asked for. The error is [ErrNotFound] if there is none of the last day.
func (db *DB) Answered(ctx context.Context, caller, key string) (request [sha256.Size]byte, answer []byte, err error) {
	defer wrap(&err, "read the answer of an idempotency key")
	var sum []byte
	err = db.admin.QueryRow(ctx, `
		select request, answer from idempotency_keys
		where caller = $1 and key = $2 and at >= clock_timestamp() - $3::interval`,
		caller, key, onceRetention).Scan(&sum, &answer)
	if err != nil {
		return request, nil, notFound(err)
	}
	return [sha256.Size]byte(sum), answer, nil
}

// KeepPublished stores the answer to a publish that changed nothing. The error is [ErrRepeated] as for
// [DB.PublishBundle].
func (db *DB) KeepPublished(ctx context.Context, caller string, o *Once[Published], p Published) (err error) {
	defer wrap(&err, "store the answer of an idempotency key")
	return pgx.BeginTxFunc(ctx, db.admin, readCommitted, func(tx pgx.Tx) error { return o.keep(ctx, tx, caller, p) })
}
