package server_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cedarpost/cedarpost/auditlog"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
)

// exportTo reads an export to its end.
func exportTo(t *testing.T, s *servertest.Server, req *cedarpostv1.ExportDecisionsRequest) (batches []*cedarpostv1.ExportDecisionsResponse) {
	t.Helper()
	stream, err := s.Audit.ExportDecisions(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	for {
		b, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			return batches
		}
		if err != nil {
			t.Fatal(err)
		}
		batches = append(batches, b)
	}
}

// An export has each batch of the log at its place, with its rows and the header that proves
// them.
func TestExport(t *testing.T) {
	s := servertest.New(t)
	s.MustLoadShop()
	var asked []string
	for i := range 40 {
		res, err := s.Authorization.Authorize(t.Context(), servertest.AskShop([]string{"bob", "carol"}[i%2], "ViewOrder", "42", true))
		if err != nil {
			t.Fatal(err)
		}
		asked = append(asked, res.DecisionId)
	}
	var got []string
	read := func(b *cedarpostv1.ExportDecisionsResponse) {
		h, err := auditlog.ParseHeader(b.Header)
		if err != nil || h.Rows != len(b.Entries) {
			t.Errorf("leaf %d has %d rows, its header says %+v, %v", b.Leaf, len(b.Entries), h, err)
		}
		for _, e := range b.Entries {
			if d := e.GetDecision(); d != nil {
				got = append(got, d.DecisionId)
			}
		}
	}
	batches := exportTo(t, s, &cedarpostv1.ExportDecisionsRequest{})
	for i, b := range batches {
		if b.Leaf != int64(i) {
			t.Errorf("leaf %d comes as number %d", b.Leaf, i)
		}
		read(b)
	}
	if fmt.Sprint(got) != fmt.Sprint(asked) {
		t.Errorf("exported %v, want %v", got, asked)
	}
	// It goes on where another one ended. It contains the record of the first export, too.
	last := batches[len(batches)-1].Leaf
	rest := exportTo(t, s, &cedarpostv1.ExportDecisionsRequest{FromLeaf: last + 1})
	if len(rest) != 1 || rest[0].Leaf != last+1 || rest[0].Entries[0].GetEvent().GetLogRead().GetRows() != -1 {
		t.Errorf("after leaf %d: %v", last, rest)
	}
}

func TestExportOfATime(t *testing.T) {
	s := servertest.New(t)
	// Leaves 0 and 1 are the events of the first grants and the first key, at the current time. These follow.
	today := time.Now().UTC().Truncate(24 * time.Hour).Add(48 * time.Hour)
	for _, hours := range []time.Duration{-20, -10, -11, -2, -1} {
		mustLog(t, s, recordedAt(today.Add(hours*time.Hour), nil))
	}
	for _, c := range []struct {
		from, to int
		leaf     int64
		want     string
	}{
		{-100, -1, 0, "[0 1 2 3 4 5]"},
		{-10, -1, 0, "[3 4 5]"},
		{-10, -1, 4, "[5]"},
		{-100, -1, 4, "[4 5]"},
		{-15, -2, 0, "[3 4]"},
		{-9, -2, 0, "[]"},
		{-100, -50, 0, "[]"},
	} {
		leaves := []int64{}
		for _, b := range exportTo(t, s, &cedarpostv1.ExportDecisionsRequest{
			FromLeaf: c.leaf, From: timestamppb.New(today.Add(time.Duration(c.from) * time.Hour)), To: timestamppb.New(today.Add(time.Duration(c.to) * time.Hour)),
		}) {
			if b.Leaf <= 6 { // later batches record these reads
				leaves = append(leaves, b.Leaf)
			}
		}
		if fmt.Sprint(leaves) != c.want {
			t.Errorf("from %d to %d, leaf %d: %v, want %s", c.from, c.to, c.leaf, leaves, c.want)
		}
	}
	stream, err := s.Audit.ExportDecisions(t.Context(), &cedarpostv1.ExportDecisionsRequest{
		From: timestamppb.New(today), To: timestamppb.New(today)})
	if err == nil {
		_, err = stream.Receive()
	}
	if connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("no time at all: %v", err)
	}
}

// follow opens an export that follows the log, and returns what it receives.
func follow(t *testing.T, s *servertest.Server, from time.Time) (next func() (*cedarpostv1.ExportDecisionsResponse, error), hangUp func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	t.Cleanup(cancel)
	stream, err := s.Audit.ExportDecisions(ctx, &cedarpostv1.ExportDecisionsRequest{From: timestamppb.New(from), Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	return stream.Receive, cancel
}

// An export that follows gets new batches in order, up to its end. It gets an error when the
// server stops.
func TestExportFollows(t *testing.T) {
	t.Parallel() // it takes long
	s := servertest.New(t)
	first := recordedAt(time.Now(), nil)
	mustLog(t, s, first)
	next, _ := follow(t, s, time.Unix(0, 0))
	seen := int64(-1)
	until := func(want store.Decision) {
		t.Helper()
		for {
			b, err := next()
			if err != nil {
				t.Fatal(err)
			}
			if seen++; b.Leaf != seen {
				t.Fatalf("leaf %d after %d", b.Leaf, seen-1)
			}
			for _, e := range b.Entries {
				if e.GetDecision().GetDecisionId() == want.ID.String() {
					return
				}
			}
		}
	}
	until(first)
	for range 3 {
		d := recordedAt(time.Now(), nil)
		mustLog(t, s, d)
		until(d)
	}
	time.AfterFunc(100*time.Millisecond, s.Stop)
	for {
		_, err := next()
		if err == nil {
			continue
		}
		servertest.WantCode(t, err, connect.CodeUnavailable, "the server is stopping; go on from leaf")
		return
	}
}

// An export that follows from a time in the future waits for it.
func TestExportFollowsFromATimeToCome(t *testing.T) {
	t.Parallel() // it takes long
	s := servertest.New(t)
	mustLog(t, s, recordedAt(time.Now(), nil))
	next, _ := follow(t, s, time.Now().Add(time.Hour))
	later := recordedAt(time.Now().Add(2*time.Hour), nil)
	mustLog(t, s, recordedAt(time.Now(), nil))
	time.Sleep(1500 * time.Millisecond) // the export has read once
	mustLog(t, s, recordedAt(time.Now(), nil))
	mustLog(t, s, later)
	b, err := next()
	if err != nil || b.Entries[0].GetDecision().GetDecisionId() != later.ID.String() {
		t.Errorf("%v, %v", b, err)
	}
}

// The number of exports of one caller is bounded. An export whose caller hangs up does not count any more.
func TestExportsAreBounded(t *testing.T) {
	s := servertest.New(t)
	mustLog(t, s, recordedAt(time.Now(), nil))
	open := func() (hangUp func(), err error) {
		next, hangUp := follow(t, s, time.Unix(0, 0))
		_, err = next()
		return hangUp, err
	}
	hangUp, err := open()
	for range 7 {
		if err == nil {
			_, err = open()
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := open(); connect.CodeOf(err) != connect.CodeResourceExhausted {
		t.Errorf("one too many: %v", err)
	}
	hangUp()
	servertest.Eventually(t, "a free place", func() bool { _, err := open(); return err == nil })
	// An export that waits holds no connection that other calls need.
	for range 5 {
		if _, err := s.Audit.QueryDecisions(t.Context(), &cedarpostv1.QueryDecisionsRequest{}); err != nil {
			t.Error(err)
		}
	}
}

// An export works in each protocol.
func TestExportOnTheWires(t *testing.T) {
	s := servertest.New(t)
	d := recordedAt(time.Now(), nil)
	mustLog(t, s, d)
	for name, options := range map[string][]connecthttp.Option{
		"connect":  nil,
		"json":     {connecthttp.WithProtoJSON()},
		"grpc":     {connecthttp.WithGRPC()},
		"grpc-web": {connecthttp.WithGRPCWeb()},
	} {
		s.Audit = cedarpostv1connect.NewAuditServiceClient(s.Client(s.Admin, s.Token, options...))
		got := exportTo(t, s, &cedarpostv1.ExportDecisionsRequest{})
		// The first batches have the events of the grants and the key.
		if len(got) < 3 || got[2].Entries[0].GetDecision().GetDecisionId() != d.ID.String() {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// If a clock was ahead for a while and then set back, an export of a time has exactly the rows
// of that time.
func TestExportAfterTheClockWasSetBack(t *testing.T) {
	t.Parallel() // it takes long
	s := servertest.New(t)
	s.MustLoadShop()
	noon := time.Now().UTC().Truncate(day).Add(-day / 2) // yesterday
	at := noon.Add
	for _, after := range []time.Duration{0, 20 * time.Minute, 3 * time.Hour, 40 * time.Minute, 2 * day, 50 * time.Minute, 4 * time.Hour} {
		mustLog(t, s, recordedAt(at(after), nil))
	}
	for name, follow := range map[string]bool{"export": false, "follow": true} {
		var got []string
		req := &cedarpostv1.ExportDecisionsRequest{From: timestamppb.New(at(10 * time.Minute)), To: timestamppb.New(at(time.Hour)), Follow: follow}
		for _, b := range exportTo(t, s, req) {
			for _, e := range b.Entries {
				if d := e.GetDecision(); d != nil {
					got = append(got, d.Time.AsTime().Sub(noon).String())
				}
			}
		}
		if fmt.Sprint(got) != "[20m0s 40m0s 50m0s]" {
			t.Errorf("%s: %v", name, got)
		}
	}
}
