package enforce

import (
	"context"
	"sync/atomic"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
)

type resultKey struct{}

// Held keeps the result of a request for its handler. In a streaming call the result of each
// message replaces the one before.
type Held struct {
	result atomic.Pointer[cedarpost.Result]
}

// Hold makes a context with room for a result.
func Hold(ctx context.Context) (context.Context, *Held) {
	h := &Held{}
	return context.WithValue(ctx, resultKey{}, h), h
}

// Set sets the result.
func (h *Held) Set(r cedarpost.Result) { h.result.Store(&r) }

// Get returns the result. Without one it returns the zero value, which denies.
func (h *Held) Get() cedarpost.Result {
	if r := h.result.Load(); r != nil {
		return *r
	}
	return cedarpost.Result{}
}

// Result returns the result that let the request of ctx through. On a public route it is the
// zero value, which denies. In a streaming call it is the result of the newest message.
func Result(ctx context.Context) cedarpost.Result {
	if h, ok := ctx.Value(resultKey{}).(*Held); ok {
		return h.Get()
	}
	return cedarpost.Result{}
}
