// Package cedarpostconnect stands between Connect and the handlers of a service: each
// procedure says what has to be allowed, and no handler sees a message before that
// message was checked. It works on the messages themselves, so it is the same for
// Connect, gRPC and gRPC-Web, and for calls that stream.
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

// Interceptor checks the calls of a server. Its Intercept goes into
// [connect.NewServer], last, so that nothing changes a message after it was checked:
//
//	server := connect.NewServer(authenticate, interceptor.Intercept)
type Interceptor struct {
	guard   *enforce.Guard
	routes  map[string]*compiled
	recheck time.Duration
}

// recheck is how old a check may be when an answer is sent. It is what a client's cache
// may be old, so that a revoked right ends a stream as it ends everything else.
const recheck = 5 * time.Second

// New makes an interceptor of routes by procedure: "/shop.v1.OrderService/GetOrder".
// What is not among them is refused. Call [Interceptor.Verify] once the server has its
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

// Verify compares the routes with what a server serves: each of its procedures needs a
// route, each route a procedure, and what a route takes from a message has to be there.
// Its error names all that is wrong; a service with one must not start.
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
			if spec.Schema == nil { // the server does not have it: the name is the client's own
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

// Result returns what was decided for the newest message of the call of ctx; on a
// public route the zero value, which denies. It is [enforce.Result].
func Result(ctx context.Context) cedarpost.Result { return enforce.Result(ctx) }
