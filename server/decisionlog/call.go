package decisionlog

import "context"

// Call is what the log records about the call that caused a record.
type Call struct {
	// Caller is the name of the authenticated caller.
	Caller string
	// TraceID is the W3C trace id of the call, or "".
	TraceID string
	// Procedure is the RPC, like "/cedarpost.v1.EntityService/WriteEntities".
	Procedure string
}

type callKey struct{}

// WithCall returns a context whose records name a call.
func WithCall(ctx context.Context, c Call) context.Context {
	return context.WithValue(ctx, callKey{}, c)
}

// CallFrom returns the call of a context; the zero value if it has none.
func CallFrom(ctx context.Context) Call {
	c, _ := ctx.Value(callKey{}).(Call)
	return c
}
