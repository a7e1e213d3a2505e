package store

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
)

// onceRetention is the time for which a repeated request gets the answer of the first one.
const onceRetention = 24 * time.Hour

// ErrRepeated is the error of a write whose caller has made a write with the same idempotency key
// within a day. [DB.Answered] returns the answer to that write.
var ErrRepeated = errors.New("a write with this idempotency key was made before")

// Each server counts the keys of a caller in the database before its first write with a key, and
// again after some writes. So the number of keys that are stored exceeds the limit by onceStep at
// most for each server but one.
const (
	maxOnceKeys = 100_000 // of one caller within a day
	onceStep    = 1000
	onceWait    = time.Minute // after it the keys of a caller that has too many are counted again
	maxCounted  = 10_000      // callers whose counts are kept
)

// ErrTooManyKeys refuses a write with an idempotency key whose caller has made very many of them
// within a day.
var ErrTooManyKeys = fmt.Errorf("this caller has made %d writes with an idempotency_key within a day, which is the limit; try again later, or without a key", maxOnceKeys)

// onceCounts bounds the idempotency keys of each caller.
type onceCounts struct {
	mu sync.Mutex
	of map[string]*onceCount // by caller
}

// onceCount is how many writes with a key a caller may make before its keys are counted again.
type onceCount struct {
	mu   sync.Mutex // also while they are counted
	left int
	full time.Time // they were counted then, and were too many
}

func (c *onceCounts) caller(name string) *onceCount {
	c.mu.Lock()
	defer c.mu.Unlock()
	one := c.of[name]
	if one == nil {
		if c.of == nil || len(c.of) >= maxCounted {
			c.of = map[string]*onceCount{}
		}
		one = &onceCount{}
		c.of[name] = one
	}
	return one
}

// MayKeep counts a write with an idempotency key before the caller makes it. The error is
// [ErrTooManyKeys] if the caller has too many keys that count.
func (db *DB) MayKeep(ctx context.Context, caller string) (err error) {
	defer wrap(&err, "count idempotency keys")
	c := db.onces.caller(caller)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.left == 0 {
		if !c.full.IsZero() && time.Since(c.full) < onceWait {
			return ErrTooManyKeys
		}
		var n int
		err := db.admin.QueryRow(ctx, `
			select count(*) from (
				select from idempotency_keys where caller = $1 and at >= clock_timestamp() - $2::interval limit $3) k`,
			caller, onceRetention, maxOnceKeys).Scan(&n)
		if err != nil {
			return err
		}
		c.left, c.full = min(onceStep, maxOnceKeys-n), time.Time{}
		if c.left == 0 {
			c.full = time.Now()
			return ErrTooManyKeys
		}
	}
	c.left--
	return nil
}

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
