package server

import (
	"context"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cedarpost/cedarpost/internal/pause"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/store"
)

const (
	presentEvery = 3 * time.Second
	// presentLook is how often a server looks whether it has applied a publish since it last said what it
	// has applied. It looks at its own memory.
	presentLook = 200 * time.Millisecond
	// presentLonger is for how long a server counts as live after its snapshot is too old to decide by.
	presentLonger  = 30 * time.Second
	presentTimeout = 5 * time.Second
)

// present says in the database that this server runs, and what it has applied. It returns the newest
// publish in that.
func (s *Server) present(ctx context.Context) (policies int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, presentTimeout)
	defer cancel()
	now := s.follower.Latest()
	err = s.cfg.DB.NoteServer(ctx, store.LiveServer{ID: s.id, Name: s.cfg.Name, Version: s.cfg.Start.Version}, now.Position, s.cfg.MaxStaleness+presentLonger)
	return now.PolicyRevision, err
}

// keepPresent says every few seconds that this server runs, and at once when it has applied a publish,
// until ctx ends. Then it says that the server has ended.
func (s *Server) keepPresent(ctx context.Context) {
	failed := false
	for ctx.Err() == nil {
		policies, err := s.present(ctx)
		if err != nil && !failed && ctx.Err() == nil {
			s.cfg.Log.Warn("this server cannot say what it has applied, and is not listed as live for the time", "err", err)
		}
		failed = err != nil
		for until := time.Now().Add(presentEvery); ctx.Err() == nil && time.Now().Before(until); {
			pause.For(ctx, presentLook)
			if !failed && s.follower.Latest().PolicyRevision != policies {
				break
			}
		}
	}
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	if err := s.cfg.DB.ForgetServer(bounded, s.id); err != nil {
		s.cfg.Log.Warn("this server stays listed as live for a while", "err", err)
	}
}

// serversAt lists the live servers, and which of them have applied a revision.
func (s *policyService) serversAt(ctx context.Context, revision int64) (out []*cedarpostv1.LiveServer, err error) {
	list, err := s.db.LiveServers(ctx)
	for _, l := range list {
		out = append(out, &cedarpostv1.LiveServer{
			Name: l.Name, Id: l.ID.String(), Version: l.Version, Applied: l.Revision >= revision, Revision: l.Revision, SeenAt: timestamppb.New(l.SeenAt),
		})
	}
	return out, err
}
