package server

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cedarpost/cedarpost/auditlog"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

func newDecision(t *testing.T, bytes int) store.Decision {
	t.Helper()
	id := uuid.Must(uuid.NewV7())
	at := time.Unix(id.Time().UnixTime()).UTC().Truncate(time.Millisecond)
	return Recorded(store.Decision{ID: id, At: at, Caller: "shop", Policies: []string{}, Allowed: true}, strings.Repeat("x", bytes))
}

// An export whose caller does not read is ended, and delays nothing else.
func TestSlowReaderOfAnExport(t *testing.T) {
	t.Parallel() // it waits most of the time
	times := defaultTimeouts
	// Much longer than a machine under load needs for a message.
	times.message, times.discard = 6*time.Second, 100*time.Millisecond
	db, clients, _, _ := hurriedServer(t, times)
	w := db.NewLogWriter("s", auditlog.Strict, 0)
	defer w.Close()
	const batches, size = 24, 128 << 10 // more than the buffers of both sides
	for range batches {
		if _, err := w.Append(t.Context(), []store.Decision{newDecision(t, size)}, nil); err != nil {
			t.Fatal(err)
		}
	}
	for i, c := range clients {
		t.Run(wires[i].name, func(t *testing.T) {
			t.Parallel()
			stream, err := cedarpostv1connect.NewAuditServiceClient(c).ExportDecisions(t.Context(), &cedarpostv1.ExportDecisionsRequest{})
			if err != nil {
				t.Fatal(err)
			}
			// It reads slowly at first, for longer than one message may take.
			for range 4 {
				if _, err := stream.Receive(); err != nil {
					t.Fatal(err)
				}
				time.Sleep(times.message / 3)
			}
			time.Sleep(3 * times.message / 2)
			received := 4
			for err == nil {
				if _, err = stream.Receive(); err == nil {
					received++
				}
			}
			if received >= batches || errors.Is(err, io.EOF) {
				t.Errorf("received %d of %d batches, then %v", received, batches, err)
			}
		})
	}
}

// The value that a query looks for is hashed. Neither the recorded reads nor page tokens contain
// it, not even in a form that could be guessed.
func TestMaskedValueIsNotKept(t *testing.T) {
	db := storetest.Open(t)
	r := runRecorder(t, decisionlog.Config{DB: db, Name: "s", Mode: auditlog.Strict, Log: slog.New(slog.DiscardHandler)})
	s := newAuditService(db, r, nil)
	const secret = `"123-45-6789"`
	hash, err := r.MaskedHash(secret)
	if err != nil {
		t.Fatal(err)
	}
	var rows []store.Decision
	for i := range 3 {
		d := newDecision(t, 0)
		if d.Masked = [][]byte{{1}, hash}; i == 2 {
			d.Masked = [][]byte{{2}}
		}
		rows = append(rows, d)
	}
	if err := r.Record(t.Context(), rows, nil); err != nil {
		t.Fatal(err)
	}
	q := &cedarpostv1.QueryDecisionsRequest{MaskedValue: secret, From: timestamppb.New(time.Now().Add(-time.Hour)), PageSize: 1}
	res, err := s.QueryDecisions(t.Context(), q)
	if err != nil || len(res.Decisions) != 1 || res.Decisions[0].DecisionId != rows[1].ID.String() {
		t.Fatal(res, err)
	}
	q.PageToken = res.NextPageToken
	if res, err = s.QueryDecisions(t.Context(), q); err != nil || len(res.Decisions) != 1 || res.NextPageToken != "" {
		t.Fatal(res, err)
	}
	counts, err := s.CountDecisions(t.Context(), &cedarpostv1.CountDecisionsRequest{Filter: q, Group: cedarpostv1.CountDecisionsRequest_OUTCOME})
	if err != nil || counts.Total != 2 {
		t.Error(counts, err)
	}
	events, err := db.QueryEvents(t.Context(), store.EventQuery{Limit: 10})
	if err != nil || len(events) != 3 {
		t.Fatal(events, err)
	}
	for _, e := range events {
		if bytes.Contains(e.Record, []byte("6789")) || !bytes.Contains(e.Record, []byte("hash ")) {
			t.Errorf("recorded: %q", e.Record)
		}
	}
	// The page token depends on the keyed hash, not on the value.
	s.recorder = runRecorder(t, decisionlog.Config{DB: db, Name: "s", Mode: auditlog.Strict, Log: slog.New(slog.DiscardHandler)})
	if _, err := s.QueryDecisions(t.Context(), q); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("with another key: %v", err)
	}
}

// If there are more reports than are read, the sum of uses says that it is incomplete.
func TestManyReports(t *testing.T) {
	db := storetest.Open(t)
	r := runRecorder(t, decisionlog.Config{DB: db, Name: "s", Mode: auditlog.Strict, Log: slog.New(slog.DiscardHandler)})
	s := newAuditService(db, r, nil)
	reporter := &authorizationService{recorder: r, record: r.Record, places: access.NewPlaces(1, 0), metric: newDecisionMetrics(prometheus.NewRegistry())}
	ctx := access.WithCaller(decisionlog.WithCall(t.Context(), decisionlog.Call{Caller: "shop"}), access.Caller{Name: "shop", Kind: access.APIKey})
	rows := []store.Decision{newDecision(t, 0), newDecision(t, 0)}
	if err := r.Record(ctx, rows, nil); err != nil {
		t.Fatal(err)
	}
	for _, most := range []int{4, 3} {
		if s.reports = most; most == 4 {
			for range 4 {
				now := timestamppb.Now()
				if _, err := reporter.ReportReuse(ctx, &cedarpostv1.ReportReuseRequest{ReportId: uuid.NewString(), Reuses: []*cedarpostv1.Reuse{
					{DecisionId: rows[0].ID.String(), Hits: 2, First: now, Last: now}}}); err != nil {
					t.Fatal(err)
				}
			}
		}
		page, err := s.QueryDecisions(ctx, &cedarpostv1.QueryDecisionsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		used, other := page.Uses[rows[0].ID.String()], page.Uses[rows[1].ID.String()]
		if whole := most == 4; used.GetHits() != int64(2*most) || used.Incomplete == whole || (other == nil) != whole || !whole && !other.Incomplete {
			t.Errorf("of %d: %v, %v", most, used, other)
		}
	}
}

// The error of a read that takes too long says so. It does not say that the service is
// unavailable.
func TestReadTakesTooLong(t *testing.T) {
	s := newAuditService(storetest.Open(t), nil, nil)
	ctx, cancel := context.WithTimeout(t.Context(), 0)
	defer cancel()
	_, err := s.QueryDecisions(ctx, &cedarpostv1.QueryDecisionsRequest{})
	if err := publicError(cedarpostv1connect.AuditServiceQueryDecisionsProcedure, err); err.Code() != connect.CodeDeadlineExceeded {
		t.Errorf("got %v", err)
	}
	_, err = s.QueryEvents(ctx, &cedarpostv1.QueryEventsRequest{})
	if err := publicError(cedarpostv1connect.AuditServiceQueryEventsProcedure, err); err.Code() != connect.CodeDeadlineExceeded {
		t.Errorf("got %v", err)
	}
}

// Only the time that is still to be read is bounded, so later pages are not refused.
func TestSpanOfLaterPages(t *testing.T) {
	now := time.Now()
	q := store.DecisionQuery{Caller: "shop", From: now.Add(-25 * time.Hour)}
	if err := checkSpan(q, "caller"); err == nil {
		t.Error("25 hours are taken for a day")
	}
	q.BeforeAt = now.Add(-2 * time.Hour)
	if err := checkSpan(q, "caller"); err != nil {
		t.Error(err)
	}
}
