package server_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect/v2"
	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/server/wire"
)

// One caller that opens watches without end gets half of the places. Another one can still watch.
func TestAttackWatchesOfOneCaller(t *testing.T) {
	const most = 20
	s := servertest.New(t, server.Watchers(most))
	attacker := cedarpostv1connect.NewAuthorizationServiceClient(s.Client(s.API, tenant(t, s)))
	watch := func(c cedarpostv1connect.AuthorizationServiceClient) error {
		stream, err := c.Watch(t.Context(), &cedarpostv1.WatchRequest{})
		if err != nil {
			return err
		}
		_, err = stream.Receive()
		return err
	}
	seen := honest(t, asks(t, s))
	const calls = 2 * most
	open := 0
	for range calls {
		if err := watch(attacker); err == nil {
			open++
		} else {
			servertest.WantCode(t, err, connect.CodeResourceExhausted, "this caller watches")
		}
	}
	for range most / 2 {
		if err := watch(s.Authorization); err != nil {
			t.Errorf("another caller: %v", err)
		}
	}
	t.Logf("%d watches of one caller: %d of %d places taken, another caller opened %d; %s", calls, open, most, most/2, seen())
	if open != most/2 {
		t.Errorf("%d watches are open, want %d", open, most/2)
	}
}

// One caller that follows the log with exports that never end gets half of the places. Another one
// can still export.
func TestAttackExportsOfOneCaller(t *testing.T) {
	s := servertest.New(t)
	attacker := cedarpostv1connect.NewAuditServiceClient(s.Client(s.Admin, tenant(t, s)))
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	follow := func(c cedarpostv1connect.AuditServiceClient) error {
		stream, err := c.ExportDecisions(ctx, &cedarpostv1.ExportDecisionsRequest{Follow: true})
		if err != nil {
			return err
		}
		_, err = stream.Receive()
		return err
	}
	const calls = 2 * server.MaxExports
	open := 0
	for range calls {
		if err := follow(attacker); err == nil {
			open++
		} else {
			servertest.WantCode(t, err, connect.CodeResourceExhausted, "exports of this caller")
		}
	}
	for range server.MaxExports / 2 {
		if err := follow(s.Audit); err != nil {
			t.Errorf("another caller: %v", err)
		}
	}
	t.Logf("%d exports of one caller: %d of %d places taken, another caller opened %d", calls, open, server.MaxExports, server.MaxExports/2)
	if open != server.MaxExports/2 {
		t.Errorf("%d exports are under way, want %d", open, server.MaxExports/2)
	}
}

// A token that a caller made up makes a line that names the caller, and does not hide the line
// about another caller, whose token is of a lost revision.
func TestAttackForgedRevision(t *testing.T) {
	var log lines
	s := servertest.New(t, logLines(&log))
	got, err := s.Authorization.GetRevision(t.Context(), &cedarpostv1.GetRevisionRequest{})
	if err != nil {
		t.Fatal(err)
	}
	token, err := wire.ParseToken(got.Revision.Token)
	if err != nil {
		t.Fatal(err)
	}
	token.Number, token.Anchor = 1<<63-1, 1<<63-1
	ask := func(c *connect.Client) {
		_, err := cedarpostv1connect.NewEntityServiceClient(c).ListEntities(t.Context(), &cedarpostv1.ListEntitiesRequest{At: token.Revision()})
		servertest.WantCode(t, err, connect.CodeAborted, "does not have")
	}
	attacker := s.Client(s.Admin, tenant(t, s))
	const calls = 5
	for range calls {
		ask(attacker)
	}
	ask(s.Client(s.Admin, s.Token))
	s.Stop()
	forged, other := log.count("caller=tenant token="), log.count("caller=bootstrap token=")
	t.Logf("%d forged tokens of one caller: %d lines that name it, %d of another caller", calls, forged, other)
	if forged != 1 || other != 1 || log.count("or the caller made the token up") != 2 {
		t.Errorf("%d lines name the attacker, %d the other caller", forged, other)
	}
}

// A report that is sent again with its id in upper case counts once.
func TestAttackReportTwice(t *testing.T) {
	s := servertest.New(t)
	s.MustLoadShop()
	d, err := s.Authorization.Authorize(t.Context(), servertest.AskShop("bob", "ViewOrder", "42", true))
	if err != nil {
		t.Fatal(err)
	}
	id := uuid.NewString()
	const hits = 7
	for _, id := range []string{id, strings.ToUpper(id), id} {
		if _, err := s.Authorization.ReportReuse(t.Context(), &cedarpostv1.ReportReuseRequest{ReportId: id, Reuses: []*cedarpostv1.Reuse{
			{DecisionId: d.DecisionId, Hits: hits, First: timestamppb.Now(), Last: timestamppb.Now()},
		}}); err != nil {
			t.Fatal(err)
		}
	}
	got, err := s.Audit.GetDecision(t.Context(), &cedarpostv1.GetDecisionRequest{DecisionId: d.DecisionId})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("one report of %d hits, sent three times in two cases: %d hits", hits, got.Uses.GetHits())
	if got.Uses.GetHits() != hits {
		t.Errorf("%d hits, want %d", got.Uses.GetHits(), hits)
	}
}

// A body that is not as long as its Content-Length, or whose chunks are malformed, makes no line
// about an error of the server.
func TestAttackBrokenBodiesFillTheLog(t *testing.T) {
	var log lines
	s := servertest.New(t, logLines(&log))
	address := strings.TrimPrefix(s.API, "http://")
	dial := func() net.Conn {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return conn
	}
	const calls = 5
	for range calls {
		// HTTP/2
		conn := dial()
		var block []byte
		for _, f := range [][2]string{
			{":method", "POST"}, {":scheme", "http"}, {":authority", "x"}, {":path", cedarpostv1connect.AuthorizationServiceAuthorizeProcedure},
			{"content-type", "application/json"}, {"authorization", "Bearer " + s.Token}, {"content-length", "1000"},
		} { // RFC 7541, section 6.2.2: a literal field that is not indexed, with a new name
			block = append(append(append(append(block, 0, byte(len(f[0]))), f[0]...), byte(len(f[1]))), f[1]...)
		}
		const headers, data, reset, settings, endStream, endHeaders = 1, 0, 3, 4, 1, 4 // RFC 9113, section 6
		frame := func(kind, flags, stream byte, payload []byte) []byte {
			return append([]byte{0, byte(len(payload) >> 8), byte(len(payload)), kind, flags, 0, 0, 0, stream}, payload...)
		}
		_, _ = conn.Write(slices.Concat([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), frame(settings, 0, 0, nil),
			frame(headers, endHeaders, 1, block), frame(data, endStream, 1, []byte("{}"))))
		for head := make([]byte, 9); ; {
			if _, err := io.ReadFull(conn, head); err != nil {
				t.Fatal(err)
			}
			if _, err := io.CopyN(io.Discard, conn, int64(head[0])<<16|int64(head[1])<<8|int64(head[2])); err != nil {
				t.Fatal(err)
			}
			if head[8] == 1 && (head[3] == reset || head[3] <= headers && head[4]&endStream != 0) {
				break
			}
		}
		// HTTP/1.1
		conn = dial()
		_, _ = fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: Bearer %s\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
			cedarpostv1connect.AuthorizationServiceAuthorizeProcedure, s.Token)
		_, _ = io.ReadAll(conn)
	}
	servertest.Eventually(t, "the calls", func() bool {
		m := servertest.Metrics(t, s)
		return strings.Contains(m, `code="invalid_argument"`)
	})
	if err := asks(t, s)(); err != nil {
		t.Errorf("an honest caller: %v", err)
	}
	s.Stop()
	written, _ := log.counted("level=ERROR")
	t.Logf("%d calls with broken bodies: %d lines about errors", 2*calls, written)
	if written != 0 {
		t.Errorf("%d lines about errors", written)
	}
}
