package server

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cedarpost/cedarpost/internal/pause"
	"github.com/cedarpost/cedarpost/store"
)

const (
	useResolution = time.Hour // to which the last use of a key is stored
	usesEvery     = time.Minute
)

// keyUses notes when each API key was used last. It is stored to the hour, so that a busy key costs
// one write in an hour.
type keyUses struct {
	last sync.Map // id of a key → *keyUse; their number is bounded by that of the keys
}

type keyUse struct {
	hour   atomic.Int64 // of the last use, as Unix time
	stored atomic.Int64
}

func newKeyUses() *keyUses { return &keyUses{} }

// note notes a use. id is "" for a caller without an API key.
func (u *keyUses) note(id string, now time.Time) {
	if id == "" {
		return
	}
	hour := now.Unix() - now.Unix()%int64(useResolution/time.Second)
	v, ok := u.last.Load(id)
	if !ok {
		v, _ = u.last.LoadOrStore(id, &keyUse{})
	}
	if use := v.(*keyUse); use.hour.Load() < hour {
		use.hour.Store(hour)
	}
}

// store stores the uses that are not stored yet.
func (u *keyUses) store(ctx context.Context, db *store.DB) error {
	var list []store.KeyUse
	var noted []*keyUse
	u.last.Range(func(id, v any) bool {
		use := v.(*keyUse)
		if hour := use.hour.Load(); use.stored.Load() < hour {
			list = append(list, store.KeyUse{ID: id.(string), At: time.Unix(hour, 0)})
			noted = append(noted, use)
		}
		return true
	})
	if len(list) == 0 {
		return nil
	}
	if err := db.NoteKeyUses(ctx, list); err != nil {
		return err
	}
	for i, use := range noted {
		use.stored.Store(list[i].At.Unix())
	}
	return nil
}

// storeKeyUses stores when keys were used, until ctx ends, and then once more.
func (s *Server) storeKeyUses(ctx context.Context) {
	for ctx.Err() == nil {
		pause.For(ctx, usesEvery)
		bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), adminTimeout)
		err := s.gate.uses.store(bounded, s.cfg.DB)
		cancel()
		if err != nil {
			s.cfg.Log.Warn("the uses of API keys are not stored yet", "err", err)
		}
	}
}
