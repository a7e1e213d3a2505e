package server

import (
	"context"
	"time"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/store"
)

const (
	maxExports = 16 // at once
	// One read gets at most so many batches, and at least one, whatever its size.
	exportBatches = 256
	exportRows    = 1000
	exportBytes   = 2 << 20 // of records
	exportPoll    = time.Second
	// exportLeeway is how long an export that follows waits after its end for batches of
	// servers that are slow or whose clocks are behind.
	exportLeeway = 2 * decisionlog.RecordTimeout
)

// ExportDecisions implements cedarpost.v1.AuditService. Between two reads it holds
// neither a connection nor a transaction, so a slow caller does not block other calls.
func (s *auditService) ExportDecisions(ctx context.Context, req *cedarpostv1.ExportDecisionsRequest, stream cedarpostv1connect.AuditServiceExportDecisionsServerStream) error {
	leave, ok := s.exports.enter(callerFrom(ctx))
	if !ok {
		return connect.Errorf(connect.CodeResourceExhausted, "%d exports of this caller, or %d of all, are under way already; try again later", maxExports/2, maxExports)
	}
	defer leave()
	x := &export{db: s.db, next: req.GetFromLeaf(), follow: req.GetFollow(), rows: exportRows / 8, gone: map[time.Time]bool{}}
	var err error
	if x.from, x.to, err = timeRange(req.GetFrom(), req.GetTo()); err != nil {
		return err
	}
	if err := x.begin(ctx); err != nil {
		return err
	}
	for recorded := false; ; recorded = true {
		batches, err := x.read(ctx)
		if err != nil {
			return err
		}
		if !recorded {
			if err := s.recorder.RecordLogRead(ctx, cedarpostv1connect.AuditServiceExportDecisionsProcedure, req, -1); err != nil {
				return err
			}
			// It can take long until there is a batch to send.
			if err := stream.SendHeaders(); err != nil {
				return err
			}
		}
		for _, b := range batches {
			if isClosed(s.stopping) {
				return errExportStopped(b.Leaf)
			}
			if err := s.stillExports(ctx); err != nil {
				return err
			}
			msg, err := x.message(ctx, b)
			if err != nil {
				return err
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
				return ctx.Err() // nil would mean that everything was sent
			case <-s.stopping:
			case <-time.After(exportPoll):
			}
		}
		if isClosed(s.stopping) {
			return errExportStopped(x.next)
		}
		if err := s.stillExports(ctx); err != nil {
			return err
		}
	}
}

// stillExports returns why the caller may not go on with its export, or nil. It can read slowly.
func (s *auditService) stillExports(ctx context.Context) error {
	if s.gate == nil {
		return nil
	}
	return s.gate.stillMay(ctx, cedarpostv1connect.AuditServiceExportDecisionsProcedure)
}

// errExportStopped ends an export when the server stops. nil would mean that everything was
// sent.
func errExportStopped(next int64) error {
	return connect.Errorf(connect.CodeUnavailable, "the server is stopping; go on from leaf %d", next)
}

// export is the state of one stream.
type export struct {
	db       *store.DB
	from, to time.Time // zero: not given
	follow   bool

	next  int64 // the leaf to read next
	end   int64 // the leaf to end before, unless it follows
	rows  int   // that the next read may have, unless one batch has more
	begun bool  // a batch with rows from `from` on was read
	idle  bool  // the last read reached the end of the log
	ended bool  // nothing remains to be sent

	gone map[time.Time]bool // days that are known to be gone
}

// begin finds where to start. Without follow, the end is where the log ends now: if the
// log grows faster than it is read, the export would not end otherwise.
func (x *export) begin(ctx context.Context) (err error) {
	ctx, cancel := context.WithTimeout(ctx, adminTimeout)
	defer cancel()
	if err := x.findEnd(ctx); err != nil {
		return err
	}
	if x.from.IsZero() {
		x.begun = true
		return nil
	}
	x.next, err = x.db.FindBatch(ctx, x.next, x.from)
	return err
}

// findEnd sets the end to the current end of the log, or to the last batch of the time asked for.
func (x *export) findEnd(ctx context.Context) (err error) {
	if x.end, err = x.db.NextLeaf(ctx); err != nil || x.to.IsZero() {
		return err
	}
	// Times do not grow from batch to batch: clocks differ, and are set back.
	end, err := x.db.EndOf(ctx, x.from, x.to)
	x.end = min(x.end, end)
	return err
}

// read returns the next batches with their rows. Their number is bounded.
func (x *export) read(ctx context.Context) ([]store.Batch, error) {
	ctx, cancel := context.WithTimeout(ctx, adminTimeout)
	defer cancel()
	if x.follow && !x.to.IsZero() && time.Now().After(x.to.Add(exportLeeway)) {
		x.follow = false // read to the current end of the log, and then end
		if err := x.findEnd(ctx); err != nil {
			return nil, err
		}
	}
	all, err := x.db.Batches(ctx, x.next, exportBatches)
	if err != nil {
		return nil, err
	}
	x.idle = len(all) == 0
	var some []store.Batch
	rows := 0
	for _, b := range all {
		if !x.follow && b.Leaf >= x.end {
			x.ended = true
			break
		}
		if late := !x.to.IsZero() && !b.FirstAt.IsZero() && !b.FirstAt.Before(x.to); late {
			if len(some) == 0 {
				x.next = b.Leaf + 1
			}
			continue
		}
		if rows += b.Rows; rows > x.rows && len(some) > 0 {
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
	x.rows = min(2*x.rows, exportRows)
	if n < len(some) { // Postgres has read rows that had no room
		x.ended = false
		x.rows = max(x.rows/4, 1)
	}
	x.next = some[n-1].Leaf + 1
	return some[:n], nil
}

// message returns a batch in its form on the wire, each row at its place. A row that is not
// in the database is marked as missing, unless the whole day is gone.
func (x *export) message(ctx context.Context, b store.Batch) (*cedarpostv1.ExportDecisionsResponse, error) {
	out := &cedarpostv1.ExportDecisionsResponse{Leaf: b.Leaf, Header: b.Header}
	if len(b.Entries) == 0 && b.Rows > 0 {
		if gone, err := x.dayGone(ctx, b.Day); gone || err != nil {
			return out, err
		}
	}
	// The number of rows comes from the database. This service never writes so many.
	const most = 1 << 16
	out.Entries = make([]*cedarpostv1.LogEntry, min(max(b.Rows, 0), most))
	for _, e := range b.Entries {
		if e.Pos < 0 || e.Pos >= len(out.Entries) || out.Entries[e.Pos] != nil {
			out.Entries = append(out.Entries, odd(e)) // a row that the header does not count
			continue
		}
		out.Entries[e.Pos] = decisionlog.ReadEntry(e)
	}
	for i, e := range out.Entries {
		if e == nil {
			out.Entries[i] = &cedarpostv1.LogEntry{Entry: &cedarpostv1.LogEntry_Missing{Missing: "the row is not in the database"}}
		}
	}
	return out, nil
}

// odd returns the entry of a row that has no place in its batch.
func odd(e store.Entry) *cedarpostv1.LogEntry {
	const damage = "another row has its place in the batch, or the batch has no such place"
	id, at := e.ID.String(), timestamppb.New(e.At)
	if e.Event {
		return &cedarpostv1.LogEntry{Entry: &cedarpostv1.LogEntry_Event{Event: &cedarpostv1.EventRecord{EventId: id, Time: at, Damaged: damage}}}
	}
	return &cedarpostv1.LogEntry{Entry: &cedarpostv1.LogEntry_Decision{Decision: &cedarpostv1.DecisionRecord{DecisionId: id, Time: at, Damaged: damage}}}
}

// dayGone reports whether a day is not in the database any more. A verification of the log
// finds whether retention dropped it.
func (x *export) dayGone(ctx context.Context, day time.Time) (bool, error) {
	if x.gone[day] {
		return true, nil
	}
	ctx, cancel := context.WithTimeout(ctx, adminTimeout)
	defer cancel()
	gone, err := x.db.DayGone(ctx, day)
	if gone {
		x.gone[day] = true
	}
	return gone, err
}
