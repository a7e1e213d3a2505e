package server

import (
	"context"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect/v2"
)

// bundlePlaces bounds the uploads of bundles that are in memory, and the checks of bundles. There
// is one for bundles to publish and another for dry runs, so that dry runs never keep anybody from
// publishing.
type bundlePlaces struct {
	uploads chan struct{} // holds one element for each upload
	bytes   atomic.Int64  // of all uploads
	check   chan struct{} // holds one element while a bundle is checked: that takes a whole CPU

	mu      sync.Mutex
	callers map[string]*callerPlace
}

// callerPlace is the one place of a caller.
type callerPlace struct {
	place chan struct{}
	users int // that hold it or wait for it
}

func newBundlePlaces() *bundlePlaces {
	return &bundlePlaces{uploads: make(chan struct{}, maxUploads), check: make(chan struct{}, 1), callers: map[string]*callerPlace{}}
}

// upload waits for a place for an upload of a caller, and returns the function that gives it
// back. A caller has one place, so that it cannot take those of others.
func (p *bundlePlaces) upload(ctx context.Context, caller string) (leave func(), err error) {
	p.mu.Lock()
	own := p.callers[caller]
	if own == nil {
		own = &callerPlace{place: make(chan struct{}, 1)}
		p.callers[caller] = own
	}
	own.users++
	p.mu.Unlock()
	forget := func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if own.users--; own.users == 0 {
			delete(p.callers, caller)
		}
	}
	if err := takePlace(ctx, own.place, ownUploadWait, "this caller uploads another bundle; try again when it has ended"); err != nil {
		forget()
		return nil, err
	}
	if err := takePlace(ctx, p.uploads, uploadWait, "other bundles are being uploaded; try again in a moment"); err != nil {
		<-own.place
		forget()
		return nil, err
	}
	return func() {
		<-p.uploads
		<-own.place
		forget()
	}, nil
}

// takePlace puts an element into a channel, or returns an error with a message after some time.
func takePlace(ctx context.Context, places chan struct{}, wait time.Duration, full string) error {
	timeout := time.NewTimer(wait)
	defer timeout.Stop()
	select {
	case places <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-timeout.C:
		return connect.NewError(connect.CodeResourceExhausted, full)
	}
}
