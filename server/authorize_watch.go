package server

import (
	"context"
	"time"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
)

var (
	errWatchStopped = connect.NewError(connect.CodeUnavailable, "the server is stopping; watch another one")
	errKeyGone      = connect.NewError(connect.CodeUnauthenticated, "the API key or the certificate of this call was revoked, or has ended")
)

// Watch implements cedarpost.v1.AuthorizationService. A server whose snapshot is stale goes
// on sending. A watcher calls GetRevision to learn how far the server is behind.
func (s *authorizationService) Watch(ctx context.Context, req *cedarpostv1.WatchRequest, stream cedarpostv1connect.AuthorizationServiceWatchServerStream) error {
	leave, ok := s.watchers.enter(callerFrom(ctx))
	if !ok {
		return connect.NewError(connect.CodeResourceExhausted, "this caller watches this server too many times already, or all places are taken; end other watches first")
	}
	defer leave()
	if isClosed(s.stopping) { // before the first message, which tells the watcher that the watch works
		return errWatchStopped
	}
	w, first, err := s.follower.Watch(ctx, req.GetAfter())
	if err != nil {
		return err
	}
	defer w.Leave()
	if err := stream.Send(first); err != nil {
		return err
	}
	idle := time.NewTimer(s.heartbeat)
	defer idle.Stop()
	for {
		if isClosed(s.stopping) {
			return errWatchStopped
		}
		if err := s.gate.stillMay(ctx, cedarpostv1connect.AuthorizationServiceWatchProcedure); err != nil {
			return err
		}
		messages, tooSlow := w.Messages()
		for _, m := range messages {
			if isClosed(s.stopping) {
				return errWatchStopped
			}
			if err := stream.Send(m); err != nil && tooSlow == nil {
				return err
			}
		}
		if tooSlow != nil {
			return tooSlow
		}
		if len(messages) > 0 {
			idle.Reset(s.heartbeat)
			continue
		}
		select {
		case <-w.Moved:
		case <-idle.C:
			if err := stream.Send(w.Heartbeat()); err != nil {
				return err
			}
			idle.Reset(s.heartbeat)
		case <-s.stopping:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// isClosed reports whether a channel that nobody sends to is closed.
func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
