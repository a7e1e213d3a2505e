package enforce

import (
	"context"
	"sync/atomic"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
)

type resultKey struct{}

// Held is where the result of a request is kept for its handler. A call that streams
// gets one for each message.
type Held struct {
	result atomic.Pointer[cedarpost.Result]
}

// Hold makes a context with room for a result.
func Hold(ctx context.Context) (context.Context, *Held) {
	h := &Held{}
	return context.WithValue(ctx, resultKey{}, h), h
}

// Set puts the result there.
func (h *Held) Set(r cedarpost.Result) { h.result.Store(&r) }

// Get returns the result. It is the zero value, which denies, as long as there is none.
func (h *Held) Get() cedarpost.Result {
	if r := h.result.Load(); r != nil {
		return *r
	}
	return cedarpost.Result{}
}

// Result returns the result that let the request of ctx through; the zero value, which
// denies, on a public route. Of a call that streams it is that of the newest message.
func Result(ctx context.Context) cedarpost.Result {
	if h, ok := ctx.Value(resultKey{}).(*Held); ok {
		return h.Get()
	}
	return cedarpost.Result{}
}
