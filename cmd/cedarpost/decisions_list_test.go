package main

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// A filter that needs a time is explained in the flags of the command line.
func TestErrorsInFlags(t *testing.T) {
	refused := func(name string) error {
		return (&peer{}).explain(connect.NewError(connect.CodeInvalidArgument, name+": has to read all decisions of a time: give from, and to (absent: now) at most 24 hours later; or principal").WithRemote())
	}
	for name, want := range map[string]string{
		"action": "--action has to read", "trace_id": "--trace-id has to read", "filter": "this command has to read",
		"a caller with a right to some bundles only": "a caller with a right to some bundles only has to read",
	} {
		err := inFlags(refused(name))
		if code, ok := errors.AsType[*exitError](err); !ok || code.code != codeUsage || !strings.HasPrefix(err.Error(), want) ||
			!strings.Contains(err.Error(), "give --since, and --until (default: now) at most 24 hours later") {
			t.Errorf("%s: %v", name, err)
		}
	}
	other := connect.NewError(connect.CodeInvalidArgument, "action: no such type")
	if err := inFlags(other); !errors.Is(err, other) || err.Error() != other.Error() {
		t.Error(err)
	}
}

// The filters of --follow, which the client applies, match as those of a query.
func TestMatches(t *testing.T) {
	type request = cedarpostv1.QueryDecisionsRequest
	at := timestamppb.New(time.Date(2026, 3, 4, 5, 6, 7, 890e6, time.UTC))
	uidOf := func(typ, id string) *cedarpostv1.EntityUid { return &cedarpostv1.EntityUid{Type: typ, Id: id} }
	decision := &cedarpostv1.DecisionRecord{
		Time: at, Revision: 7, Caller: "shop", RequestId: "req-1", TraceId: "4bf92f3577b34da6a3ce929d0e0e4736",
		Principal: uidOf("Shop::User", "bob"), Action: uidOf("Shop::Action", "ViewOrder"), Resource: uidOf("Shop::Order", "42"),
		Decision: cedarpostv1.Decision_ALLOW, Fields: &cedarpostv1.Fields{Permitted: []string{"id"}, Denied: []string{"internal.notes"}},
		DeterminingPolicies: []*cedarpostv1.PolicyRef{{Bundle: "shop", Id: "owner-views"}, {Bundle: "shop", Id: "owner-fields"}},
	}
	before, after := timestamppb.New(at.AsTime().Add(-time.Millisecond)), timestamppb.New(at.AsTime().Add(time.Millisecond))
	for name, c := range map[string]struct{ yes, no *request }{
		"from":      {&request{From: at}, &request{From: after}},
		"to":        {&request{To: after}, &request{To: at}},
		"period":    {&request{From: before, To: after}, &request{From: after, To: after}},
		"principal": {&request{Principal: uidOf("Shop::User", "bob")}, &request{Principal: uidOf("Shop::User", "ann")}},
		"action":    {&request{Action: uidOf("Shop::Action", "ViewOrder")}, &request{Action: uidOf("Action", "ViewOrder")}},
		"resource":  {&request{Resource: uidOf("Shop::Order", "42")}, &request{Resource: uidOf("Shop::Order", "4")}},
		"decision":  {&request{Decision: cedarpostv1.Decision_ALLOW}, &request{Decision: cedarpostv1.Decision_DENY}},
		"denied at": {&request{}, &request{DeniedAt: cedarpostv1.DeniedAt_OBJECT}},
		"policy":    {&request{Policy: &cedarpostv1.PolicyRef{Bundle: "shop", Id: "owner-fields"}}, &request{Policy: &cedarpostv1.PolicyRef{Bundle: "shop"}}},
		"caller":    {&request{Caller: "shop"}, &request{Caller: "sho"}},
		"request":   {&request{RequestId: "req-1"}, &request{RequestId: "req"}},
		"trace":     {&request{TraceId: "4bf92f3577b34da6a3ce929d0e0e4736"}, &request{TraceId: "4"}},
		"revision":  {&request{Revision: 7}, &request{Revision: 8}},
		"field":     {&request{Field: "internal.notes"}, &request{Field: "internal"}},
		"permitted": {&request{PermittedField: "id"}, &request{PermittedField: "internal.notes"}},
		"denied":    {&request{DeniedField: "internal.notes"}, &request{DeniedField: "id"}},
		"both":      {&request{Caller: "shop", Field: "id"}, &request{Caller: "shop", Field: "total"}},
	} {
		if !matches(c.yes, decision) || matches(c.no, decision) {
			t.Errorf("%s: %v, %v", name, matches(c.yes, decision), matches(c.no, decision))
		}
	}
}

// testListFollow: --follow shows new decisions soon.
func testListFollow(sh *shell) func(*testing.T) {
	return func(t *testing.T) {
		out := &syncBuffer{}
		since := time.Now().UTC().Format(time.RFC3339Nano)
		cmd := exec.Command(binary, "decisions", "--follow", "--denied-at", "function", "--since", since)
		cmd.Env, cmd.Stdout, cmd.Stderr = sh.env, out, out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			sh.exits(t, 5, nil, ask("DeleteOrder", "42")...)
			sh.exits(t, 0, nil, ask("ViewOrder", "42")...)
		}
		deadline := time.Now().Add(2 * time.Minute)
		for strings.Count(out.String(), "FUNCTION") < 3 && time.Now().Before(deadline) {
			time.Sleep(50 * time.Millisecond)
		}
		_ = cmd.Process.Signal(os.Interrupt)
		err := cmd.Wait()
		if text := out.String(); err != nil || strings.Count(text, "FUNCTION") != 3 || strings.Contains(text, "ALLOW") {
			t.Errorf("%v\n%s", err, text)
		}
	}
}

// testListGoesOn: a list that ends before its end says how to go on, and the parts are the whole.
func testListGoesOn(t *testing.T, sh *shell) {
	t.Helper()
	list := func(args ...string) result {
		return sh.exits(t, 0, nil, append([]string{"decisions", "list", "--decision", "ALLOW", "-o", "json"}, args...)...)
	}
	first := list("--since", "12h", "--limit", "2")
	_, hint, ok := strings.Cut(first.err, "lists all, and ")
	again, _, more := strings.Cut(hint, " goes on here")
	if !ok || !more || len(lines(first.out)) != 2 {
		t.Fatalf("%s\n%s", first.out, first.err)
	}
	rest := list(append(strings.Fields(again), "--limit", "0")...)
	all := list("--limit", "0", "--since", strings.Fields(again)[3])
	if first.out+rest.out != all.out || rest.err != "" || len(lines(rest.out)) < 2 {
		t.Errorf("%s and then\n%s of\n%s\n%s", first.out, rest.out, all.out, rest.err)
	}
	sh.exits(t, 2, says("--after cannot be given with --follow"), "decisions", "--follow", "--after", "x")
	sh.exits(t, 2, says("--after: no such token"), "decisions", "--after", "no token", "--since", "1h")
}
