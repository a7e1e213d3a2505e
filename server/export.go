package server

import (
	"context"
	"fmt"
	"time"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/store"
)

const (
	maxExports    = 16  // under way at once
	exportBatches = 256 // batches of one read,
	exportRows    = 1000
	exportBytes   = 8 << 20 // of their records; one batch alone may have more
	exportPoll    = time.Second
)

// ExportDecisions implements cedarpost.v1.AuditService. Between two reads it holds
// neither a connection nor a transaction, so a slow reader is in nobody's way.
func (s *auditService) ExportDecisions(ctx context.Context, req *cedarpostv1.ExportDecisionsRequest, stream cedarpostv1connect.AuditServiceExportDecisionsServerStream) error {
	select {
	case s.exports <- struct{}{}:
		defer func() { <-s.exports }()
	default:
		return connect.Errorf(connect.CodeResourceExhausted, "%d exports are under way already; try again later", maxExports)
	}
	x := &export{db: s.db, next: req.GetFromLeaf(), follow: req.GetFollow()}
	var err error
	if x.from, x.to, err = timeRange(req.GetFrom(), req.GetTo()); err != nil {
		return err
	}
	if err := x.begin(ctx); err != nil {
		return readError(err)
	}
	for recorded := false; ; recorded = true {
		batches, err := x.read(ctx)
		if err != nil {
			return readError(err)
		}
		if !recorded {
			if err := s.events.read(ctx, cedarpostv1connect.AuditServiceExportDecisionsProcedure, req, -1); err != nil {
				return publicError(err)
			}
			// The first batch can be long in coming.
			if err := stream.SendHeaders(); err != nil {
				return err
			}
		}
		for _, b := range batches {
			if s.stops() {
				return errExportStopped(b.Leaf)
			}
			msg, err := batchToProto(b)
			if err != nil {
				return publicError(err)
			}
			if err := stream.Send(msg); err != nil {
				return err
			}
		}
		switch {
		case x.ended:
			return nil
		case x.idle:
			select {
			case <-ctx.Done():
				return nil // the caller hung up
			case <-s.stopping:
			case <-time.After(exportPoll):
			}
		}
		if s.stops() {
			return errExportStopped(x.next)
		}
	}
}

func (s *auditService) stops() bool {
	select {
	case <-s.stopping:
		return true
	default:
		return false
	}
}

// errExportStopped is an error, for an end without one means that all was sent.
func errExportStopped(next int64) error {
	return connect.Errorf(connect.CodeUnavailable, "the server is stopping; go on from leaf %d", next)
}

// export is how far one stream is.
type export struct {
	db       *store.DB
	from, to time.Time // zero: not given
	follow   bool

	next  int64 // leaf to read next
	end   int64 // leaf to end before, unless it follows
	begun bool  // a batch with rows from `from` on was seen
	idle  bool  // the last read came to the end of the log
	ended bool  // nothing more is to come
}

// begin finds where to start. Without follow, the end is where the log ends now:
// one that grows faster than it is read would have none.
func (x *export) begin(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(ctx, adminTimeout)
	defer cancel()
	if x.end, err = x.db.NextLeaf(ctx); err != nil {
		return err
	}
	if x.from.IsZero() {
		x.begun = true
		return nil
	}
	x.next, err = x.db.FindBatch(ctx, x.next, x.from)
	return err
}

// read reads on, a bounded number of batches with their rows.
func (x *export) read(ctx context.Context) ([]store.Batch, error) {
	ctx, cancel := context.WithTimeout(ctx, adminTimeout)
	defer cancel()
	all, err := x.db.Batches(ctx, x.next, exportBatches)
	if err != nil {
		return nil, err
	}
	x.idle = len(all) == 0
	var some []store.Batch
	rows := 0
	for _, b := range all {
		if !x.follow && b.Leaf >= x.end || !x.to.IsZero() && !b.FirstAt.IsZero() && !b.FirstAt.Before(x.to) {
			x.ended = true
			break
		}
		if rows += b.Rows; rows > exportRows && len(some) > 0 {
			break
		}
		x.begun = x.begun || !b.LastAt.Before(x.from)
		if x.begun {
			some = append(some, b)
		} else {
			x.next = b.Leaf + 1
		}
	}
	x.ended = x.ended || x.idle && !x.follow
	if len(some) == 0 {
		return nil, nil
	}
	n, err := x.db.ReadEntries(ctx, some, exportBytes)
	if err != nil {
		return nil, err
	}
	if n < len(some) {
		x.ended = false
	}
	x.next = some[n-1].Leaf + 1
	return some[:n], nil
}

// batchToProto puts a batch on the wire.
func batchToProto(b store.Batch) (*cedarpostv1.ExportDecisionsResponse, error) {
	out := &cedarpostv1.ExportDecisionsResponse{Leaf: b.Leaf, Header: b.Header, Entries: make([]*cedarpostv1.LogEntry, len(b.Entries))}
	for i, e := range b.Entries {
		var err error
		if e.Event {
			rec := &cedarpostv1.EventRecord{}
			err = proto.Unmarshal(e.Record, rec)
			out.Entries[i] = &cedarpostv1.LogEntry{Entry: &cedarpostv1.LogEntry_Event{Event: rec}}
		} else {
			rec := &cedarpostv1.DecisionRecord{}
			err = proto.Unmarshal(e.Record, rec)
			out.Entries[i] = &cedarpostv1.LogEntry{Entry: &cedarpostv1.LogEntry_Decision{Decision: rec}}
		}
		if err != nil {
			return nil, fmt.Errorf("record %d of leaf %d: %w", i, b.Leaf, err)
		}
	}
	return out, nil
}
