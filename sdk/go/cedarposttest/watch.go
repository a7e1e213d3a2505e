package cedarposttest

import (
	"context"
	"time"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/wire"
)

// anything is the only tag here. All answers have it and all writes change it, so each
// write drops every kept answer. A server has a tag for each thing that an answer depends on.
var anything = []uint64{1}

const heartbeat = 10 * time.Second

// Watch implements cedarpost.v1.AuthorizationService.
func (s handler) Watch(ctx context.Context, req *cedarpostv1.WatchRequest, stream cedarpostv1connect.AuthorizationServiceWatchServerStream) error {
	if !s.beginWatch() {
		return errClosed
	}
	defer s.watches.Done()
	message, err := s.resume(req.GetAfter())
	if err != nil {
		return err
	}
	var told *cedarpostv1.Revision // the revision of the newest message
	idle := time.NewTimer(heartbeat)
	defer idle.Stop()
	for {
		if message != nil {
			if err := stream.Send(message); err != nil {
				return err
			}
			told = message.GetRevision()
			idle.Reset(heartbeat)
		}
		var moved <-chan struct{}
		if message, moved, err = s.after(told); err != nil {
			return err
		}
		if message != nil {
			continue
		}
		select {
		case <-moved:
		case <-idle.C:
			message = &cedarpostv1.WatchResponse{After: told.GetNumber(), Revision: told} // nothing changed
		case <-ctx.Done():
			return nil
		}
	}
}

// beginWatch counts a watch. It returns false if the service is closed.
func (s *Service) beginWatch() bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if !s.closed {
		s.watches.Add(1)
	}
	return !s.closed
}

// resume returns the first message of a watch after a revision. Without one, the watch
// begins at the newest.
func (s *Service) resume(applied *cedarpostv1.Revision) (*cedarpostv1.WatchResponse, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	here := s.revision(s.number)
	if applied == nil {
		return &cedarpostv1.WatchResponse{After: s.number, Revision: here}, nil
	}
	token, err := wire.ParseToken(applied.GetToken())
	switch {
	case err != nil:
		return nil, connect.Errorf(connect.CodeInvalidArgument, "after: %s", err)
	case token.Database != s.database, token.Timeline != timeline, token.Anchor > s.number, token.Anchor > 0 && token.Mark != s.database:
		return &cedarpostv1.WatchResponse{After: s.number, Revision: here, Reset_: true}, nil
	}
	message := &cedarpostv1.WatchResponse{After: token.Number, Revision: here}
	if token.Number < s.number {
		message.Tags = anything
	}
	return message, nil
}

// after returns the message that follows revision last. If there is none yet, moved is
// closed when there may be one. The error ends the watch.
func (s *Service) after(last *cedarpostv1.Revision) (next *cedarpostv1.WatchResponse, moved <-chan struct{}, err error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	switch {
	case s.closed:
		return nil, nil, errClosed
	case s.failure != nil:
		return nil, nil, s.failure
	case s.number > last.GetNumber():
		return &cedarpostv1.WatchResponse{After: last.GetNumber(), Revision: s.revision(s.number), Tags: anything}, nil, nil
	}
	return nil, s.moved, nil
}
