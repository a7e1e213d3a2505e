// Package cedarpostconnect puts checks between Connect and the handlers of a program. Each
// procedure says what has to be allowed, and a handler gets a message only after that was
// allowed. It works on messages, so it is the same for Connect, gRPC and gRPC-Web, and for
// streaming calls.
package cedarpostconnect

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/enforce"
)

// Interceptor checks the calls of a server. Pass its Intercept to [connect.NewServer] as the
// last interceptor, so that nothing changes a message after its check:
//
//	server := connect.NewServer(authenticate, interceptor.Intercept)
type Interceptor struct {
	guard   *enforce.Guard
	routes  map[string]*compiled
	recheck time.Duration
}

// recheck is how old a check may be when an answer is sent. It is the default of how old a
// kept answer may be, so that a revoked right ends streams as it ends other calls.
const recheck = cedarpost.DefaultMaxStaleness

// New makes an interceptor from routes by procedure: "/shop.v1.OrderService/GetOrder". A
// procedure without a route is refused. Call [Interceptor.Verify] once the server has its
// handlers.
func New(guard *enforce.Guard, routes map[string]Route) (*Interceptor, error) {
	if guard == nil {
		return nil, errors.New("cedarpostconnect: no guard")
	}
	i := &Interceptor{guard: guard, routes: map[string]*compiled{}, recheck: recheck}
	for procedure, route := range routes {
		c, err := compile(route)
		if err != nil {
			return nil, fmt.Errorf("cedarpostconnect: %s: %w", procedure, err)
		}
		i.routes[procedure] = c
	}
	return i, nil
}

// Verify compares the routes with a server: each of its procedures needs a route, each route
// needs a procedure, and the fields that a route reads must be in the message. Its error
// names all problems; a program with one must not start.
func (i *Interceptor) Verify(server *connect.Server) error {
	var wrong []error
	served := map[string]bool{}
	for spec := range server.Specs() {
		served[spec.Procedure] = true
		c, ok := i.routes[spec.Procedure]
		if !ok {
			wrong = append(wrong, fmt.Errorf("cedarpostconnect: %s has no route; if it needs no check, say why in Public", spec.Procedure))
			continue
		}
		if err := c.verify(spec); err != nil {
			wrong = append(wrong, fmt.Errorf("cedarpostconnect: %s: %w", spec.Procedure, err))
		}
	}
	for _, procedure := range slices.Sorted(maps.Keys(i.routes)) {
		if !served[procedure] {
			wrong = append(wrong, fmt.Errorf("cedarpostconnect: there is a route for %s, which the server does not serve", procedure))
		}
	}
	return errors.Join(wrong...)
}

// Intercept is the [connect.ServerInterceptor].
func (i *Interceptor) Intercept(next connect.ServerFunc) connect.ServerFunc {
	return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) error {
		c, ok := i.routes[spec.Procedure]
		if !ok {
			name := spec.Procedure
			if spec.Schema == nil { // the server has no such procedure, so the client made up the name
				name = "no procedure"
			}
			return toError(ctx, i.guard.Unmapped(name), false)
		}
		ctx, held := enforce.Hold(ctx)
		if c.Public != "" {
			i.guard.Public()
			return next(ctx, spec, stream)
		}
		s := &checked{ctx: ctx, guard: i.guard, route: c, procedure: spec.Procedure, inner: stream, held: held, recheck: i.recheck, before: metadataOf(ctx)}
		if c.Filter && spec.StreamType&connect.StreamTypeClient != 0 {
			return toError(ctx, s.fault(errFilter), false)
		}
		return s.end(next(ctx, spec, s))
	}
}

// Result returns the decision on the newest message of the call of ctx. On a public route it
// is the zero value, which denies. It is [enforce.Result].
func Result(ctx context.Context) cedarpost.Result { return enforce.Result(ctx) }
