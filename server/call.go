package server

import "context"

// call is what the log records about the call that caused a record.
type call struct {
	// Caller is the name of the authenticated caller.
	Caller string
	// TraceID is the W3C trace id of the call, or "".
	TraceID string
	// Procedure is the RPC, like "/cedarpost.v1.EntityService/WriteEntities".
	Procedure string
}

type callKey struct{}

// withCall returns a context whose records name a call.
func withCall(ctx context.Context, c call) context.Context {
	return context.WithValue(ctx, callKey{}, c)
}

// callFrom returns the call of a context; the zero value if it has none.
func callFrom(ctx context.Context) call {
	c, _ := ctx.Value(callKey{}).(call)
	return c
}
