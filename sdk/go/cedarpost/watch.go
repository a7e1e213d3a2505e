package cedarpost

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"time"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
)

const (
	watchBackoff    = 20 * time.Millisecond // doubled up to maxWatchBackoff
	maxWatchBackoff = 2 * time.Second
	// firstWait bounds the wait for the first message. A server sends it at once, but a
	// proxy may hold it back forever.
	firstWait = 10 * time.Second
	minRenew  = 10 * time.Millisecond
)

var (
	errStuck  = errors.New("the watch stays behind the newest revision of the service")
	errSilent = errors.New("the watch does not begin")
)

// watch tells the cache of all changes until ctx ends. After a watch breaks, the next one
// goes on from the same revision at any server.
func (c *Client) watch(ctx context.Context) {
	for wait := watchBackoff; ctx.Err() == nil; {
		worked, err := c.follow(ctx)
		if ctx.Err() != nil {
			return
		}
		switch connect.CodeOf(err) {
		case connect.CodeUnauthenticated, connect.CodePermissionDenied:
			c.cache.forget() // a client that may not ask may not reuse answers
		case connect.CodeInvalidArgument, connect.CodeAborted:
			c.cache.forget() // the token is of another database or history
		}
		// A client that is too slow, or at a server that is behind, would soon break again.
		if worked && connect.CodeOf(err) != connect.CodeResourceExhausted && !errors.Is(err, errStuck) {
			wait = watchBackoff
		}
		level := slog.LevelWarn
		if wait > watchBackoff {
			level = slog.LevelDebug // the same problem goes on
		}
		c.cfg.Log.Log(ctx, level, "cedarpost: the watch of changes broke", "err", err)
		sleep(ctx, about(wait))
		wait = min(2*wait, maxWatchBackoff)
	}
}

// follow watches one server until the watch ends. worked says whether the watch began.
func (c *Client) follow(ctx context.Context) (worked bool, err error) {
	p := c.servers.pickWatch()
	if p == nil {
		return false, c.servers.allOpen()
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	c.cut.Store(&cancel)
	silent := time.AfterFunc(firstWait, func() { cancel(errSilent) })
	defer silent.Stop()
	req := &cedarpostv1.WatchRequest{}
	if after := c.cache.reached(); after != "" {
		req.After = &cedarpostv1.Revision{Token: after}
	}
	stream, err := p.client.Watch(ctx, req)
	if err != nil {
		return false, err
	}
	defer func() { _ = stream.Close() }()
	for ; ; worked = true {
		m, err := stream.Receive()
		if cause := context.Cause(ctx); cause != nil {
			return worked, cause
		}
		if err != nil {
			return worked, err
		}
		c.cache.apply(m)
		if !worked {
			silent.Stop()
			signal(c.begun)
		}
	}
}

// renew keeps the lease until ctx ends: it asks for the newest revision after each half of
// the bound, when a watch begins, and soon again after an error.
func (c *Client) renew(ctx context.Context) {
	for {
		wait := c.cfg.MaxStaleness / 2
		if err := c.prove(ctx, wait); err != nil {
			wait /= 5
		}
		wait = max(wait, minRenew)
		if c.cache.behind(c.cfg.MaxStaleness / 3) {
			// The connection is dead, or the server is behind. Another server may do better.
			c.cutWatch(errStuck)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(about(wait)):
		case <-c.begun:
		}
	}
}

// prove asks once for the newest revision.
func (c *Client) prove(ctx context.Context, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var sent instant // when the attempt began that is answered
	var reached string
	var revision *cedarpostv1.Revision
	err := c.servers.call(ctx, func(ctx context.Context, client cedarpostv1connect.AuthorizationServiceClient) error {
		sent, reached = c.cfg.clock(), c.cache.reached()
		r, err := client.GetRevision(ctx, &cedarpostv1.GetRevisionRequest{})
		revision = r.GetRevision()
		return err
	})
	if err == nil && c.cache.prove(revision, sent, reached) {
		c.seen.forget()
		c.cutWatch(errHistory)
	}
	return err
}

// cutWatch ends the watch under way. watch then begins another one.
func (c *Client) cutWatch(why error) {
	if cut := c.cut.Load(); cut != nil {
		(*cut)(why)
	}
}

// about returns a random time between half of d and d, so that many clients do not call at
// the same moment.
func about(d time.Duration) time.Duration {
	return d/2 + rand.N(d/2+1) //nolint:gosec // not secret
}

// signal puts a value into a channel with room for one, unless it has one already.
func signal(ch chan struct{}) {
	select {
	case ch <- struct{}{}:
	default:
	}
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
