package snapshot

import (
	"context"
	"crypto/sha256"
	"errors"
	"log/slog"
	"testing"
	"time"
	"unsafe"

	"github.com/cedar-policy/cedar-go"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// A follower whose next revision was swept cannot read what changed since. It loads everything
// again, and misses nothing.
func TestFollowerOfWhatWasSwept(t *testing.T) {
	db, grow := storetest.OldHistory(t)
	storetest.WriteOp(t, db, store.Put, "a")
	f := NewFollower(Config{DB: db, Log: slog.New(slog.DiscardHandler), MaxStaleness: time.Minute, CacheBytes: 1 << 20, Metrics: prometheus.NewRegistry()})
	if err := f.CatchUp(t.Context()); err != nil {
		t.Fatal(err)
	}
	a := cedar.NewEntityUID("U", "a")
	f.cache.keep(f.snap.Load(), []loaded{{uid: a, entity: &engine.Entity{UID: a}, since: 1}})
	if _, known := f.cache.get(f.snap.Load(), a); !known {
		t.Fatal("not cached")
	}

	storetest.WriteOp(t, db, store.Delete, "a")
	key := store.Key{ID: "k", Name: "new caller", Hash: make([]byte, sha256.Size)}
	if err := db.CreateKey(t.Context(), key, "test"); err != nil {
		t.Fatal(err)
	}
	storetest.WriteOp(t, db, store.Put, "b")
	grow()
	if swept, err := db.Sweep(t.Context(), store.MinHistoryRetention); err != nil || swept.Oldest != 4 {
		t.Fatalf("%+v, %v", swept, err)
	}
	if err := f.CatchUp(t.Context()); err != nil {
		t.Fatal(err)
	}
	snap := f.snap.Load()
	if snap.Position.Number != 4 || f.oldest.Load() != 4 {
		t.Errorf("at revision %d, history begins at %d", snap.Position.Number, f.oldest.Load())
	}
	if e, known := f.cache.get(snap, a); known {
		t.Errorf("what was deleted is in the cache: %v", e)
	}
	if k, _ := snap.Key([sha256.Size]byte(key.Hash)); k.Name != key.Name {
		t.Error("a key that was made meanwhile is not known")
	}
	// From there it applies changes again.
	f.cache.keep(snap, []loaded{{uid: a}})
	storetest.WriteOp(t, db, store.Put, "c")
	if err := f.CatchUp(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, known := f.cache.get(f.snap.Load(), a); !known {
		t.Error("began anew without need")
	}
}

// before returns the current time as read before a suspension of the machine: by the wall clock
// it is that long ago, and by the monotonic clock it is now.
func before(suspended time.Duration) time.Time {
	now := time.Now()
	// In a time with a monotonic reading, the seconds are above the 30 bits of the nanoseconds.
	*(*uint64)(unsafe.Pointer(&now)) -= uint64(suspended/time.Second) << 30
	return now
}

// After a suspension of the machine the snapshot is old, although the monotonic clock did not
// move.
func TestStalenessCountsSuspension(t *testing.T) {
	f := NewFollower(Config{Log: slog.New(slog.DiscardHandler), MaxStaleness: 5 * time.Second, Metrics: prometheus.NewRegistry()})
	f.confirm(&Snapshot{}, time.Now())
	v, err := f.Current()
	if err != nil || v.Answerable() != nil {
		t.Errorf("%v, %v", err, v.Answerable())
	}
	slept := &Snapshot{}
	f.confirm(slept, before(time.Hour))
	if _, err := f.Current(); !errors.Is(err, ErrStale) {
		t.Errorf("%v after an hour", err)
	}
	// A view becomes too old while an answer is made, unless its snapshot is confirmed
	// meanwhile.
	late := View{slept, f, before(time.Hour)}
	if err := late.Answerable(); !errors.Is(err, ErrStale) {
		t.Errorf("%v of a view of an hour ago", err)
	}
	f.confirm(nil, time.Now())
	if err := late.Answerable(); err != nil {
		t.Errorf("%v though the snapshot is current", err)
	}
	f.confirm(&Snapshot{}, time.Now())
	if err := late.Answerable(); !errors.Is(err, ErrStale) {
		t.Errorf("%v of an old view of an earlier snapshot", err)
	}
	// A clock that is set back does not make the snapshot younger.
	f.confirm(&Snapshot{}, before(-time.Hour).Add(-time.Minute))
	if _, err := f.Current(); !errors.Is(err, ErrStale) {
		t.Errorf("%v after a minute", err)
	}
}

// A snapshot of another history does not have a position, whatever its number is.
func TestAtPosition(t *testing.T) {
	db := storetest.Open(t)
	f := NewFollower(Config{DB: db, Log: slog.New(slog.DiscardHandler), MaxStaleness: time.Minute, Metrics: prometheus.NewRegistry()})
	if err := f.CatchUp(t.Context()); err != nil {
		t.Fatal(err)
	}
	p, err := db.Current(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if snap, err := f.atPosition(t.Context(), p); err != nil || snap.Position != p {
		t.Errorf("%+v, %v", snap, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	p.Timeline++
	if _, err := f.atPosition(ctx, p); err == nil {
		t.Error("a snapshot of another timeline will do")
	}
	if _, err := f.AtLeast(t.Context(), p.Number); err != nil {
		t.Error(err)
	}
}
