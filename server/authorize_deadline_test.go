package server_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// hurriedly posts a call with a deadline in its header, and returns the body of the answer. The
// client itself has no deadline, so the answer is that of the server.
func hurriedly(t *testing.T, s *servertest.Server, procedure, timeout string, stream bool, messages ...proto.Message) string {
	t.Helper()
	url, kind := s.Admin, "application/json"
	if strings.Contains(procedure, "AuthorizationService") {
		url = s.API
	}
	if stream {
		kind = "application/connect+json"
	}
	var body bytes.Buffer
	for _, m := range messages {
		b, err := protojson.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if stream {
			body.Write(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(b))))
		}
		body.Write(b)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url+procedure, &body)
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{"Content-Type": kind, "Authorization": "Bearer " + s.Token, "Connect-Protocol-Version": "1", "Connect-Timeout-Ms": timeout} {
		if value != "" {
			req.Header.Set(name, value)
		}
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// watchedLog keeps the lines of the log of a server that are about failed calls.
type watchedLog struct {
	mu    sync.Mutex
	lines []string
}

func (l *watchedLog) option(c *server.Config) {
	c.MaxStaleness = 10 * time.Minute // the test blocks the database
	c.Log = slog.New(slog.NewTextHandler(logTo(func(line string) {
		if strings.Contains(line, "call failed") {
			l.mu.Lock()
			defer l.mu.Unlock()
			l.lines = append(l.lines, line)
		}
	}), nil))
}

func (l *watchedLog) failures() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lines
}

// If the deadline of the caller ends, the error is not a failure of the service, wherever in the
// call that happens. The test blocks the database, so that the call cannot end in another way.
func TestDeadlineOfTheCaller(t *testing.T) {
	t.Parallel() // it takes long
	var log watchedLog
	s := servertest.New(t, log.option)
	s.MustLoadShop()
	database := servertest.NewProxy(t, s.URL)
	behind := servertest.On(t, database.URL(), log.option)
	locker := servertest.Session(t, s.URL)
	cold := func(id string) *cedarpostv1.AuthorizeRequest {
		return servertest.AskShop("bob", "ViewOrder", id, false)
	}
	if _, err := s.Authorization.Authorize(t.Context(), cold("42")); err != nil { // now its entities are cached
		t.Fatal(err)
	}
	newest := func(id string) *cedarpostv1.AuthorizeRequest {
		r := cold(id)
		r.Consistency = &cedarpostv1.Consistency{Requirement: &cedarpostv1.Consistency_FullyConsistent{FullyConsistent: true}}
		return r
	}
	database.Blackhole(true)
	ahead := cold("42")
	ahead.Consistency = &cedarpostv1.Consistency{Requirement: &cedarpostv1.Consistency_AtLeastAsFresh{AtLeastAsFresh: s.MustPut(servertest.Entity(t, `{"uid":{"type":"Shop::User","id":"new"},"attrs":{"region":"eu","suspended":false}}`))}}
	put1 := &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_Put{Put: servertest.Entity(t, `{"uid":{"type":"Shop::User","id":"zoe"},"attrs":{"region":"eu","suspended":false}}`)}}
	chunk := &cedarpostv1.ImportEntitiesRequest{Options: &cedarpostv1.ImportOptions{}, Entities: []*cedarpostv1.Entity{put1.GetPut()}}
	for _, c := range []struct {
		where, lock string
		on          *servertest.Server
		procedure   string
		stream      bool
		message     proto.Message
		says        string
	}{
		{"loading entities", "entities", s, cedarpostv1connect.AuthorizationServiceAuthorizeProcedure, false, cold("cold-1"), "no decision was given"},
		{"loading entities of a batch", "entities", s, cedarpostv1connect.AuthorizationServiceAuthorizeBatchProcedure, false,
			&cedarpostv1.AuthorizeBatchRequest{Checks: []*cedarpostv1.AuthorizeRequest{cold("cold-2"), cold("42")}}, "no decision was given"},
		{"the commit", "decisions", s, cedarpostv1connect.AuthorizationServiceAuthorizeProcedure, false, cold("42"), "no decision was given"},
		{"the newest revision", "revision", s, cedarpostv1connect.AuthorizationServiceAuthorizeProcedure, false, newest("42"), "no decision was given"},
		{"the newest revision alone", "revision", s, cedarpostv1connect.AuthorizationServiceGetRevisionProcedure, false, &cedarpostv1.GetRevisionRequest{}, ""},
		{"a revision that is not applied", "", behind, cedarpostv1connect.AuthorizationServiceAuthorizeProcedure, false, ahead, ""},
		{"a write", "revision", s, cedarpostv1connect.EntityServiceWriteEntitiesProcedure, false,
			&cedarpostv1.WriteEntitiesRequest{Operations: []*cedarpostv1.EntityOperation{put1}}, ""},
		{"an import", "revision", s, cedarpostv1connect.EntityServiceImportEntitiesProcedure, true, chunk, ""},
		{"a read of entities", "entities", s, cedarpostv1connect.EntityServiceListEntitiesProcedure, false, &cedarpostv1.ListEntitiesRequest{Type: "Shop::User"}, ""},
		{"a read of the log", "decisions", s, cedarpostv1connect.AuditServiceQueryDecisionsProcedure, false, &cedarpostv1.QueryDecisionsRequest{}, ""},
		{"a watch", "", s, cedarpostv1connect.AuthorizationServiceWatchProcedure, true, &cedarpostv1.WatchRequest{}, ""},
		{"an export that follows", "", s, cedarpostv1connect.AuditServiceExportDecisionsProcedure, true, &cedarpostv1.ExportDecisionsRequest{Follow: true}, ""},
	} {
		if c.lock != "" {
			servertest.MustExec(t, locker, "begin; lock table "+c.lock+" in access exclusive mode")
		}
		got := ""
		for _, ms := range []string{"300", "600", "1200", "1800"} { // on a busy machine the call needs longer until it waits
			if got = hurriedly(t, c.on, c.procedure, ms, c.stream, c.message); strings.Contains(got, c.says) {
				break
			}
		}
		if c.lock != "" {
			servertest.MustExec(t, locker, "rollback")
		}
		if !strings.Contains(got, `"code":"deadline_exceeded"`) || !strings.Contains(got, "deadline that the caller set has ended") || !strings.Contains(got, c.says) {
			t.Errorf("%s: %s", c.where, got)
		}
	}
	if lines := log.failures(); len(lines) > 0 {
		t.Errorf("the log has failed calls: %s", lines)
	}
	// A timeout of the server itself is a failure of the service.
	servertest.MustExec(t, locker, "begin; lock table entities in access exclusive mode")
	got := hurriedly(t, s, cedarpostv1connect.AuthorizationServiceAuthorizeProcedure, "600000", false, cold("cold-3"))
	servertest.MustExec(t, locker, "rollback")
	if !strings.Contains(got, `"code":"unavailable"`) || len(log.failures()) != 1 {
		t.Errorf("the server's own bound: %s; log %s", got, log.failures())
	}
	database.Blackhole(false)
}

// A caller that hangs up is not a failure of the service either.
func TestCallerHangsUp(t *testing.T) {
	var log watchedLog
	s := servertest.New(t, log.option)
	s.MustLoadShop()
	locker := servertest.Session(t, s.URL)
	servertest.MustExec(t, locker, "begin; lock table decisions in access exclusive mode")
	hungUp := func(procedure string) bool {
		return strings.Contains(servertest.Metrics(t, s), `cedarpost_calls_total{code="canceled",procedure="`+procedure+`"} 1`)
	}
	in, hangUp := context.WithCancel(t.Context())
	defer hangUp()
	go func() { _, _ = s.Authorization.Authorize(in, servertest.AskShop("bob", "ViewOrder", "42", false)) }()
	servertest.Eventually(t, "the commit waits", func() bool { return waiting(t, servertest.Session(t, s.URL)) > 0 })
	hangUp()
	servertest.Eventually(t, "the call is over", func() bool { return hungUp(cedarpostv1connect.AuthorizationServiceAuthorizeProcedure) })
	servertest.MustExec(t, locker, "rollback")

	in, hangUp = context.WithCancel(t.Context())
	defer hangUp()
	stream, err := s.Authorization.Watch(in, &cedarpostv1.WatchRequest{})
	if err == nil {
		_, err = stream.Receive()
	}
	if err != nil {
		t.Fatal(err)
	}
	hangUp()
	servertest.Eventually(t, "the watch is over", func() bool { return hungUp(cedarpostv1connect.AuthorizationServiceWatchProcedure) })
	if lines := log.failures(); len(lines) > 0 {
		t.Errorf("the log has failed calls: %s", lines)
	}
}
