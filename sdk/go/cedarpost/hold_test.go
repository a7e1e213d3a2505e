package cedarpost

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"weak"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// A caller that gave up may reuse the parts of its check while its question has yet to
// be sent in a batch.
func TestCallerReusesItsCheckAfterGivingUp(t *testing.T) {
	asked := make(chan *cedarpostv1.AuthorizeRequest, 1)
	c := (&strange{batch: func(_ context.Context, req *cedarpostv1.AuthorizeBatchRequest) (*cedarpostv1.AuthorizeBatchResponse, error) {
		asked <- req.GetChecks()[0]
		return nil, errNoSuch
	}}).serve(t, uncached, func(cfg *Config) { cfg.Coalesce = true })
	taken, gaveUp := make(chan struct{}), make(chan struct{})
	send := c.batches.send
	c.batches.send = func(ctx context.Context, list []*cedarpostv1.AuthorizeRequest, fresh []string, fully bool) ([]*cedarpostv1.AuthorizeBatchResult, error) {
		close(taken)
		<-gaveUp
		return send(ctx, list, fresh, fully)
	}
	check := hitCheck
	check.AllFields, check.Fields = false, []string{"status", "total"}
	check.Context = map[string]any{"tags": []string{"a", "b"}}
	check.Entities = []Entity{{UID: UID("Shop::Cart", "1"), Attrs: map[string]any{"n": 1}, Parents: []EntityUID{UID("Shop::Store", "main")}}}
	want, err := request(&check)
	if err != nil {
		t.Fatal(err)
	}
	want = proto.CloneOf(want)
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-taken
		cancel()
	}()
	if _, err := c.Authorize(ctx, check); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	reused := make(chan struct{})
	go func() { // while the question is sent
		defer close(reused)
		for i := range 1000 {
			check.Fields[i%2] = "internal.margin"
			check.Context["tags"].([]string)[i%2] = "c"
			check.Entities[0].Attrs["n"] = i
			check.Entities[0].Parents[0].ID = "other"
			check.Entities[0].UID.ID = "2"
		}
	}()
	<-reused
	close(gaveUp)
	if got := <-asked; !proto.Equal(got, want) {
		t.Errorf("%v was sent, and %v was asked", got, want)
	}
}

// Uses that cannot be reported do not keep answers in memory, which can be many times
// as large.
func TestUsesDoNotHoldAnswers(t *testing.T) {
	r := newReporter()
	away := true
	l := newLedger()
	l.fail = func() string { return map[bool]string{true: "away"}[away] }
	r.send = l.send
	const answers = 300
	var kept []weak.Pointer[cedarpostv1.AuthorizeResponse]
	for i := range answers {
		res := allow(int64(i))
		res.Errors = []*cedarpostv1.PolicyError{{Message: strings.Repeat("x", 10<<10)}}
		e := entryOf(res)
		kept = append(kept, weak.Make(res))
		r.use(e, realClock())
		r.use(e, realClock())
		if i%100 == 0 && r.flush(t.Context()) == nil {
			t.Fatal("it is away")
		}
	}
	runtime.GC()
	held := slices.DeleteFunc(kept, func(p weak.Pointer[cedarpostv1.AuthorizeResponse]) bool { return p.Value() == nil })
	if len(held) > 0 {
		t.Errorf("%d of %d answers are held", len(held), answers)
	}
	if away = false; r.flush(t.Context()) != nil || r.reported.Load() != 2*answers || r.unreported.Load() != 0 {
		t.Errorf("%d reported, %d bytes wait", r.reported.Load(), r.unreported.Load())
	}
}

// Uses that wait take at most about as much memory as is counted for them.
func TestUnreportedUsesAreBoundedInMemory(t *testing.T) {
	r := newReporter()
	r.send = func(context.Context, *cedarpostv1.ReportReuseRequest) (*cedarpostv1.ReportReuseResponse, error) {
		return nil, connect.NewError(connect.CodeUnavailable, "away")
	}
	before, n := heapAlloc(), 0
	for ; r.use(entryOf(&cedarpostv1.AuthorizeResponse{DecisionId: fmt.Sprintf("%036d", n), Errors: []*cedarpostv1.PolicyError{{Message: strings.Repeat("x", 1000)}}}), realClock()); n++ {
		if n%1000 == 0 {
			_ = r.flush(t.Context())
		}
	}
	if taken := heapAlloc() - before; taken > maxUnreported || n < 50_000 {
		t.Errorf("uses of %d answers take %d KiB, of %d", n, taken>>10, maxUnreported>>10)
	}
	runtime.KeepAlive(r)
}

// The ids of a check that failed open can be parts of a large request, which must not
// stay in memory.
func TestFailOpensDoNotHoldRequests(t *testing.T) {
	r := newReporter()
	check := hitCheck
	check.FailOpen = "reads may go on"
	before := heapAlloc()
	check.Resource.ID = strings.Repeat("x", 1<<20)[:10]
	r.letThrough(&check, connect.CodeUnavailable, realClock())
	check = Check{} // the caller no longer needs it
	if grown := heapAlloc() - before; grown > 1<<19 {
		t.Errorf("%d KiB are held", grown>>10)
	}
	runtime.KeepAlive(r)
}

func heapAlloc() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}
