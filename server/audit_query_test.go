package server_test

import (
	"context"
	"encoding/binary"
	"fmt"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cedarpost/cedarpost/auditlog"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
)

// recordedAt returns a decision for the log, made at a time.
func recordedAt(at time.Time, change func(*store.Decision)) store.Decision {
	id := uuid.Must(uuid.NewV7())
	binary.BigEndian.PutUint64(id[:8], uint64(at.UnixMilli())<<16|0x7000)
	d := store.Decision{
		ID: id, At: at.UTC().Truncate(time.Millisecond), Revision: 1, Caller: "shop", Server: "test",
		Principal: store.UID{Type: "User", ID: "ann"}, Action: store.UID{Type: "Action", ID: "view"}, Resource: store.UID{Type: "Doc", ID: "1"},
		Allowed: true, Policies: []string{"docs/all"},
	}
	if change != nil {
		change(&d)
	}
	return server.Recorded(d, "")
}

// mustLog appends one batch.
func mustLog(t testing.TB, s *servertest.Server, decisions ...store.Decision) {
	t.Helper()
	w := s.DB.NewLogWriter("test", auditlog.Strict, 0)
	defer w.Close()
	if _, err := w.Append(t.Context(), decisions, nil); err != nil {
		t.Fatal(err)
	}
}

// A filter without an index may cover a day at most. The refusal names the filter.
func TestQueriesAreBounded(t *testing.T) {
	s := servertest.New(t)
	now := time.Now()
	at := func(ago time.Duration) *timestamppb.Timestamp { return timestamppb.New(now.Add(-ago)) }
	const day = 24 * time.Hour
	type request = cedarpostv1.QueryDecisionsRequest
	ann := servertest.UID(`User::"ann"`)
	for _, c := range []struct {
		name    string
		query   *request
		refused string // how the message begins
		counted string // how the message of CountDecisions begins
	}{
		{"nothing", &request{}, "", "filter:"},
		{"a day", &request{From: at(day)}, "", ""},
		{"two days", &request{From: at(2 * day)}, "", "filter:"},
		{"until yesterday", &request{To: at(day)}, "", "filter:"},
		{"a principal", &request{Principal: ann}, "", ""},
		{"a resource", &request{Resource: ann}, "", ""},
		{"a request", &request{RequestId: "r"}, "", ""},
		{"denials", &request{Decision: cedarpostv1.Decision_DENY}, "", ""},
		{"field denials", &request{DeniedAt: cedarpostv1.DeniedAt_FIELD}, "", ""},
		{"an action", &request{Action: ann}, "action:", "filter:"},
		{"a policy", &request{Policy: &cedarpostv1.PolicyRef{Bundle: "b", Id: "p"}}, "policy:", "filter:"},
		{"a caller", &request{Caller: "shop"}, "caller:", "filter:"},
		{"a trace", &request{TraceId: "t"}, "trace_id:", "filter:"},
		{"a revision", &request{Revision: 3}, "revision:", "filter:"},
		{"a field", &request{Field: "total"}, "field:", "filter:"},
		{"who saw a field", &request{PermittedField: "total"}, "permitted_field:", "filter:"},
		{"who did not", &request{DeniedField: "total"}, "denied_field:", "filter:"},
		{"what was allowed", &request{Decision: cedarpostv1.Decision_ALLOW}, "decision:", "filter:"},
		{"a caller in a day", &request{Caller: "shop", From: at(day)}, "", ""},
		{"a caller in a day of last week", &request{Caller: "shop", From: at(8 * day), To: at(7 * day)}, "", ""},
		{"a caller in two days", &request{Caller: "shop", From: at(8 * day), To: at(6 * day)}, "caller:", "filter:"},
		{"a caller until now", &request{Caller: "shop", From: at(day + 2*time.Minute)}, "caller:", "filter:"},
		{"a caller before now", &request{Caller: "shop", To: at(0)}, "caller:", "filter:"},
		{"a caller's denials", &request{Caller: "shop", Decision: cedarpostv1.Decision_DENY}, "", ""},
		{"no time at all", &request{From: at(0), To: at(day)}, "from:", "from:"},
		{"a masked value", &request{MaskedValue: `"x"`}, "masked_value:", "filter:"},
		{"a masked value with a member twice", &request{MaskedValue: `{"pin":"x","pin":"y"}`, From: at(day)}, `masked_value: member "pin" is twice`, `masked_value: member "pin" is twice`},
		{"a masked value in a day", &request{MaskedValue: `"x"`, From: at(day)}, "", ""},
	} {
		_, err := s.Audit.QueryDecisions(t.Context(), c.query)
		refused(t, c.name, err, c.refused)
		_, err = s.Audit.CountDecisions(t.Context(), &cedarpostv1.CountDecisionsRequest{Filter: c.query, Group: cedarpostv1.CountDecisionsRequest_ACTION})
		refused(t, c.name+" counted", err, c.counted)
	}
	bad := &timestamppb.Timestamp{Nanos: -1}
	_, err := s.Audit.QueryEvents(t.Context(), &cedarpostv1.QueryEventsRequest{To: bad})
	refused(t, "a time that is none", err, "to:")
}

// refused fails unless the message of an error begins with why. "" means no error.
func refused(t *testing.T, name string, err error, why string) {
	t.Helper()
	switch code := connect.CodeOf(err); {
	case why == "" && err != nil:
		t.Errorf("%s: %v", name, err)
	case why != "" && (err == nil || code != connect.CodeInvalidArgument && code != connect.CodeFailedPrecondition ||
		!strings.Contains(err.Error(), ": "+why)):
		t.Errorf("%s: %v, want %q", name, err, why)
	}
}

func TestQueryFilters(t *testing.T) {
	s := servertest.New(t)
	now := time.Now()
	mustLog(t, s,
		recordedAt(now, func(d *store.Decision) { d.TraceID, d.Revision, d.RequestID = "t1", 7, "one" }),
		recordedAt(now, func(d *store.Decision) { d.Fields, d.RequestID = []string{"+id", "-total"}, "two" }),
		recordedAt(now, func(d *store.Decision) { d.Allowed, d.DeniedAt, d.Policies, d.RequestID = false, 2, nil, "three" }))
	for want, q := range map[string]*cedarpostv1.QueryDecisionsRequest{
		"one":   {TraceId: "t1"},
		"one ":  {Revision: 7},
		"two":   {Field: "total"},
		"two ":  {Field: "id"},
		" two":  {PermittedField: "id"},
		" two ": {DeniedField: "total"},
		"three": {DeniedAt: cedarpostv1.DeniedAt_OBJECT},
	} {
		q.From = timestamppb.New(now.Add(-time.Hour))
		res, err := s.Audit.QueryDecisions(t.Context(), q)
		if err != nil || len(res.Decisions) != 1 || res.Decisions[0].RequestId != strings.TrimSpace(want) {
			t.Errorf("%v: %v, %v, want %s", q, res, err, want)
		}
	}

	count := func(by cedarpostv1.CountDecisionsRequest_Group) (text string) {
		res, err := s.Audit.CountDecisions(t.Context(), &cedarpostv1.CountDecisionsRequest{
			Filter: &cedarpostv1.QueryDecisionsRequest{From: timestamppb.New(now.Add(-time.Hour))}, Group: by})
		if err != nil {
			t.Fatal(err)
		}
		for _, n := range res.Counts {
			text += fmt.Sprintf("%s %d+%d, ", n.Group, n.Allowed, n.Denied)
		}
		return text + fmt.Sprint(res.Total)
	}
	for by, want := range map[cedarpostv1.CountDecisionsRequest_Group]string{
		cedarpostv1.CountDecisionsRequest_PRINCIPAL: `User::"ann" 2+1, 3`,
		cedarpostv1.CountDecisionsRequest_ACTION:    `Action::"view" 2+1, 3`,
		cedarpostv1.CountDecisionsRequest_POLICY:    `docs/all 2+0, 2`,
		cedarpostv1.CountDecisionsRequest_OUTCOME:   `ALLOW 2+0, DENY at OBJECT 0+1, 3`,
	} {
		if got := count(by); got != want {
			t.Errorf("by %s: %s, want %s", by, got, want)
		}
	}
	_, err := s.Audit.CountDecisions(t.Context(), &cedarpostv1.CountDecisionsRequest{})
	if connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("no group: %v", err)
	}
}

// New rows do not move the pages of a query that has begun, and the bound on time also holds for
// later pages.
func TestPagesStayPut(t *testing.T) {
	s := servertest.New(t)
	now := time.Now()
	at := func(ago time.Duration) store.Decision { return recordedAt(now.Add(-ago), nil) }
	var want []string
	for i := range 7 {
		d := at(time.Duration(i) * time.Minute)
		mustLog(t, s, d)
		want = append(want, d.ID.String())
	}
	q := &cedarpostv1.QueryDecisionsRequest{Caller: "shop", From: timestamppb.New(now.Add(-24 * time.Hour)), PageSize: 3}
	var got []string
	for {
		res, err := s.Audit.QueryDecisions(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range res.Decisions {
			got = append(got, d.DecisionId)
		}
		if q.PageToken = res.NextPageToken; q.PageToken == "" {
			break
		}
		mustLog(t, s, at(0), at(-time.Second))
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("paged %v, want %v", got, want)
	}
}

func TestQueryEvents(t *testing.T) {
	s := servertest.New(t)
	for range 5 {
		if _, err := s.Audit.GetDecision(t.Context(), &cedarpostv1.GetDecisionRequest{DecisionId: uuid.NewString()}); connect.CodeOf(err) != connect.CodeNotFound {
			t.Fatal(err)
		}
	}
	q := &cedarpostv1.QueryEventsRequest{
		Kind: cedarpostv1.EventRecord_LOG_READ, Caller: "bootstrap", Subject: "/cedarpost.v1.AuditService/GetDecision", PageSize: 2,
	}
	seen := map[string]bool{}
	for pages := 1; ; pages++ {
		res, err := s.Audit.QueryEvents(t.Context(), q)
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range res.Events {
			seen[e.EventId] = true
		}
		if q.PageToken = res.NextPageToken; q.PageToken == "" {
			if pages != 3 || len(seen) != 5 {
				t.Errorf("%d events on %d pages", len(seen), pages)
			}
			break
		}
	}
	res, err := s.Audit.QueryEvents(t.Context(), &cedarpostv1.QueryEventsRequest{Kind: cedarpostv1.EventRecord_REFUSED_RIGHT})
	if err != nil || len(res.Events) != 0 {
		t.Errorf("%v, %v", res, err)
	}
	res, err = s.Audit.QueryEvents(t.Context(), &cedarpostv1.QueryEventsRequest{PageSize: 2})
	if err != nil || len(res.Events) != 2 {
		t.Fatal(res, err)
	}
	other := &cedarpostv1.QueryEventsRequest{Caller: "bootstrap", PageToken: res.NextPageToken}
	if _, err := s.Audit.QueryEvents(t.Context(), other); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("a page token of another query: %v", err)
	}
}

// Each read of the log is recorded in the log before it is answered.
func TestReadsAreRecorded(t *testing.T) {
	s := servertest.New(t)
	d := recordedAt(time.Now(), nil)
	mustLog(t, s, d)
	day := timestamppb.New(time.Now().Add(-time.Hour))
	filter := &cedarpostv1.QueryDecisionsRequest{From: day, Caller: "shop"}
	ask := map[string]func(context.Context) error{
		"QueryDecisions": func(ctx context.Context) error { _, err := s.Audit.QueryDecisions(ctx, filter); return err },
		"GetDecision": func(ctx context.Context) error {
			_, err := s.Audit.GetDecision(ctx, &cedarpostv1.GetDecisionRequest{DecisionId: d.ID.String()})
			return err
		},
		"CountDecisions": func(ctx context.Context) error {
			_, err := s.Audit.CountDecisions(ctx, &cedarpostv1.CountDecisionsRequest{Filter: filter, Group: cedarpostv1.CountDecisionsRequest_POLICY})
			return err
		},
		"QueryEvents": func(ctx context.Context) error {
			_, err := s.Audit.QueryEvents(ctx, &cedarpostv1.QueryEventsRequest{Caller: "shop"})
			return err
		},
		"ExportDecisions": func(ctx context.Context) error {
			stream, err := s.Audit.ExportDecisions(ctx, &cedarpostv1.ExportDecisionsRequest{FromLeaf: 0})
			if err == nil {
				_, err = stream.Receive()
				_ = stream.Close()
			}
			return err
		},
	}
	rows := map[string]int64{"QueryDecisions": 1, "GetDecision": 1, "CountDecisions": 1, "QueryEvents": 0, "ExportDecisions": -1}
	for name, call := range ask {
		if err := call(t.Context()); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		procedure := "/cedarpost.v1.AuditService/" + name
		res, err := s.Audit.QueryEvents(t.Context(), &cedarpostv1.QueryEventsRequest{Subject: procedure, PageSize: 1})
		if err != nil || len(res.Events) != 1 {
			t.Fatalf("%s: %v, %v", name, res, err)
		}
		read := res.Events[0].GetLogRead()
		if read.GetProcedure() != procedure || read.GetRows() != rows[name] || !strings.HasPrefix(read.GetRequest(), "{") {
			t.Errorf("%s is recorded as %v", name, read)
		}
	}
	// A read that cannot be recorded is not answered.
	servertest.MustExec(t, servertest.Session(t, s.URL), "revoke insert on events from cedarpost_writer")
	for name, call := range ask {
		if err := call(t.Context()); connect.CodeOf(err) != connect.CodeUnavailable {
			t.Errorf("%s, not recorded: %v", name, err)
		}
	}
}
