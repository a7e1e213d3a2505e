package server_test

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect/v2"

	"google.golang.org/protobuf/types/known/structpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// costlyPattern is a condition that takes nearly as many steps as one policy may.
var costlyPattern = `context.s like "*` + strings.Repeat("a", 280) + `b"`

// greedyBundle is a tenant's bundle whose n policies take as long as policies may.
func greedyBundle(n int) []string {
	var text strings.Builder
	for i := range n {
		// Each is about one principal type, so together they may exceed the budget.
		fmt.Fprintf(&text, "@id(\"p%d\") forbid (principal is Greedy::User, action, resource) when { %s };\n", i, costlyPattern)
	}
	return []string{
		"schema.cedarschema", `namespace Greedy { entity User; entity Doc; action Read appliesTo { principal: [User], resource: [Doc], context: { s: String } }; }`,
		"policies.cedar", text.String(),
	}
}

func greedyRequest() *cedarpostv1.AuthorizeRequest {
	r := &cedarpostv1.AuthorizeRequest{
		Principal: servertest.UID(`Greedy::User::"u"`), Action: servertest.UID(`Greedy::Action::"Read"`), Resource: servertest.UID(`Greedy::Doc::"d"`),
	}
	r.Context, _ = structpb.NewStruct(map[string]any{"s": strings.Repeat("a", engine.MaxStringBytes)})
	return r
}

// Policies that took 25 ms for one pattern, and seconds for ten policies of guardrails, are
// refused when they are published.
func TestAttackCostlyPolicies(t *testing.T) {
	s := servertest.New(t)
	s.MustLoadShop()
	long := `context.s like "*` + strings.Repeat("a", 4000) + `b"`
	for name, condition := range map[string]string{
		"one pattern":      long,
		"fifteen patterns": strings.Repeat(strings.Replace(long, strings.Repeat("a", 4000), strings.Repeat("a", 2000), 1)+" || ", 14) + "false",
		"constant sets":    "[" + strings.Repeat("[1,4],[2,3],", 4000) + "[0,5]].contains([9,9])",
	} {
		files := greedyBundle(0)
		files[3] = `@id("attack") permit (principal, action, resource) when { ` + condition + ` };`
		_, err := s.Apply("greedy", servertest.Files(files...))
		servertest.WantCode(t, err, connect.CodeInvalidArgument, "")
		if f := findings(t, err); !strings.Contains(f[0].Message, "the limit is") {
			t.Errorf("%s: %v", name, f[0])
		}
	}
}

// One tenant asks questions that take as much work as a decision may, and more, on many
// connections, with and without patience. Its calls take turns, and end when their callers have
// left. An honest caller of another tenant is served meanwhile.
func TestAttackCostlyQuestions(t *testing.T) {
	s := servertest.New(t)
	s.MustLoadShop()
	s.MustApply("greedy", greedyBundle(400)...)
	seen := honest(t, func() error {
		_, err := s.Authorization.Authorize(t.Context(), servertest.AskShop("alice", "ViewOrder", "42", true))
		return err
	})
	var attackers sync.WaitGroup
	var refused atomic.Int64
	ctx, stop := context.WithTimeout(t.Context(), 3*time.Second)
	defer stop()
	for i := range 20 {
		attackers.Go(func() {
			for ctx.Err() == nil {
				patience := time.Minute
				if i%2 == 0 {
					patience = 20 * time.Millisecond
				}
				call, leave := context.WithTimeout(ctx, patience)
				_, err := s.Authorization.Authorize(call, greedyRequest())
				leave()
				switch connect.CodeOf(err) {
				case connect.CodeFailedPrecondition:
					if strings.Contains(err.Error(), engine.ErrTooCostly.Error()) { // else its time ended before its turn
						refused.Add(1)
					}
				case connect.CodeUnavailable, connect.CodeDeadlineExceeded, connect.CodeCanceled: // its time ended first
				default:
					t.Errorf("a question beyond the budget: %v", err)
				}
			}
		})
	}
	attackers.Wait()
	t.Logf("20 attackers whose questions take %d steps and more: %s", engine.MaxDecisionCost, seen())
	waiting := regexp.MustCompile(`(?m)^cedarpost_costly_calls_waiting 0$`)
	servertest.Eventually(t, "no work is left of callers that are gone", func() bool {
		return waiting.MatchString(servertest.Metrics(t, s))
	})
	none := regexp.MustCompile(`(?m)^cedarpost_decisions_too_costly_total 0$`)
	if refused.Load() > 0 && none.MatchString(servertest.Metrics(t, s)) {
		t.Errorf("%d refused questions are not counted", refused.Load())
	}
}

// Sets whose members have equal hashes took half a second for 22 KiB. They are refused before
// they are made.
func TestAttackCollidingSets(t *testing.T) {
	s := servertest.New(t)
	s.MustApply("sets", "schema.cedarschema",
		`namespace Sets { entity User; entity Doc { sets: Set<Set<Long>> }; action Read appliesTo { principal: [User], resource: [Doc], context: { sets: Set<Set<Long>> } }; }`,
		"policies.cedar", `@id("p") permit (principal, action, resource) when { context.sets.contains([1, 2]) };`)
	colliding := func(n int) map[string]any {
		var sets []any
		for i := range n {
			sets = append(sets, []any{float64(i), float64(1_000_000 - i)})
		}
		return map[string]any{"sets": sets}
	}
	ask := func(n int) error {
		_, err := s.Authorization.Authorize(t.Context(), &cedarpostv1.AuthorizeRequest{
			Principal: servertest.UID(`Sets::User::"u"`), Action: servertest.UID(`Sets::Action::"Read"`), Resource: servertest.UID(`Sets::Doc::"d"`),
			Context: jsonStruct(t, colliding(n)),
		})
		return err
	}
	if err := ask(141); err != nil {
		t.Error(err)
	}
	servertest.WantCode(t, ask(900), connect.CodeInvalidArgument, "context.sets: 900 elements that are sets or records")
	_, err := servertest.Write(t, s, &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_Put{Put: &cedarpostv1.Entity{
		Uid: servertest.UID(`Sets::Doc::"d"`), Attrs: jsonStruct(t, colliding(900))}}})
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "900 elements that are sets or records")
}

func jsonStruct(t *testing.T, m map[string]any) *structpb.Struct {
	t.Helper()
	out, err := structpb.NewStruct(m)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// honest asks every 50 ms while an attack runs, and returns what it saw, for the log of the test.
func honest(t *testing.T, ask func() error) (seen func() string) {
	t.Helper()
	var took []time.Duration
	failed := 0
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for {
			began := time.Now()
			if ask() != nil {
				failed++
			}
			took = append(took, time.Since(began))
			select {
			case <-tick.C:
			case <-stop:
				return
			}
		}
	}()
	return func() string {
		close(stop)
		<-done
		slices.Sort(took)
		return fmt.Sprintf("an honest caller: %d calls, %d failed, p50 %v, p99 %v, max %v",
			len(took), failed, took[len(took)/2], took[len(took)*99/100], took[len(took)-1])
	}
}
