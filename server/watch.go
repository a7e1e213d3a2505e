package server

import (
	"context"
	"time"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
)

var (
	errTooSlow      = connect.NewError(connect.CodeResourceExhausted, "this watcher does not keep up with what changes; begin anew")
	errWatchStopped = connect.NewError(connect.CodeUnavailable, "the server is stopping; watch another one")
	errKeyGone      = connect.NewError(connect.CodeUnauthenticated, "the API key of this watcher was revoked")
)

// Watch implements cedarpost.v1.AuthorizationService. A server that is stale goes on
// telling what it knows: how old that is, a watcher learns from GetRevision.
func (s *authorizationService) Watch(ctx context.Context, req *cedarpostv1.WatchRequest, stream cedarpostv1connect.AuthorizationServiceWatchServerStream) error {
	hub := s.follower.hub
	select {
	case hub.places <- struct{}{}:
		defer func() { <-hub.places }()
	default:
		return connect.Errorf(connect.CodeResourceExhausted, "%d callers watch this server already", cap(hub.places))
	}
	began, number, err := s.beginWatch(ctx, req.GetAfter())
	if err != nil {
		return err
	}
	if err := stream.Send(began.message); err != nil {
		return err
	}
	last := began.message.Revision // that the watcher was told of
	idle := time.NewTimer(s.heartbeat)
	defer idle.Stop()
	for {
		events, next, moved, ok := hub.next(number)
		switch {
		case s.stops():
			return errWatchStopped
		case !s.follower.snap.Load().names[callerFrom(ctx)]:
			return errKeyGone
		case !ok:
			s.metric.watchCuts.Inc()
			newest, _, _ := hub.newest()
			_ = stream.Send(newBreak(newest).from(last.Number)) // the error says so too
			return errTooSlow
		}
		for _, e := range events {
			if s.stops() {
				return errWatchStopped
			}
			if err := stream.Send(e.from(last.Number)); err != nil {
				return err
			}
			last = e.message.Revision
		}
		if number = next; len(events) > 0 {
			idle.Reset(s.heartbeat)
			continue
		}
		select {
		case <-moved:
		case <-idle.C:
			if err := stream.Send(&cedarpostv1.WatchResponse{After: last.Number, Revision: last}); err != nil {
				return err
			}
			idle.Reset(s.heartbeat)
		case <-s.stopping:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// beginWatch returns the first message of a watch, and the number of the event after it.
func (s *authorizationService) beginWatch(ctx context.Context, after *cedarpostv1.Revision) (first *watchEvent, next int64, err error) {
	hub := s.follower.hub
	if after == nil {
		here, next, _ := hub.newest()
		return watchEventOf(here.Number, here, nil, false), next, nil
	}
	p, err := parseToken(after.GetToken())
	if err != nil {
		return nil, 0, connect.Errorf(connect.CodeInvalidArgument, "after: %s", err)
	}
	if here, _, _ := hub.newest(); here.SameHistory(p.at) && here.Number < p.at.Number {
		s.follower.wake()
		wait, cancel := context.WithTimeout(ctx, freshWait)
		hub.await(wait, p.at)
		cancel()
	}
	return hub.resume(ctx, p)
}

func (s *authorizationService) stops() bool {
	select {
	case <-s.stopping:
		return true
	default:
		return false
	}
}
