package decisionlog

import "context"

// Call is what records tell about the RPC that caused them.
type Call struct {
	// Caller is the name of the authenticated caller.
	Caller string
	// TraceID is the W3C trace id of the call, or "".
	TraceID string
	// Procedure is the path of the RPC, like "/cedarpost.v1.EntityService/WriteEntities".
	Procedure string
}

type callKey struct{}

// WithCall returns a context for the work of a call. Records that are made with it name the
// call.
func WithCall(ctx context.Context, c Call) context.Context {
	return context.WithValue(ctx, callKey{}, c)
}

// callFrom returns the call of a context; the zero value if it has none.
func callFrom(ctx context.Context) Call {
	c, _ := ctx.Value(callKey{}).(Call)
	return c
}
