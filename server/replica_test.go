package server_test

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/types/known/structpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/servertest"
)

func atLeast(r *cedarpostv1.Revision) *cedarpostv1.Consistency {
	return &cedarpostv1.Consistency{Requirement: &cedarpostv1.Consistency_AtLeastAsFresh{AtLeastAsFresh: r}}
}

func fully() *cedarpostv1.Consistency {
	return &cedarpostv1.Consistency{Requirement: &cedarpostv1.Consistency_FullyConsistent{FullyConsistent: true}}
}

// reads asks in one call whether users may read papers. A question is "user paper"; its answer
// is A or D.
func reads(t testing.TB, s *servertest.Server, c *cedarpostv1.Consistency, questions ...string) (answers string, revision int64, err error) {
	req := &cedarpostv1.AuthorizeBatchRequest{Consistency: c}
	for _, q := range questions {
		user, paper, _ := strings.Cut(q, " ")
		req.Checks = append(req.Checks, &cedarpostv1.AuthorizeRequest{
			Principal: servertest.UID(`Doc::User::"` + user + `"`), Action: servertest.UID(`Doc::Action::"Read"`),
			Resource: servertest.UID(`Doc::Paper::"` + paper + `"`),
		})
	}
	res, err := s.Authorization.AuthorizeBatch(t.Context(), req)
	if err != nil {
		return "", 0, err
	}
	for _, r := range res.Results {
		answers += r.GetResponse().GetDecision().String()[:1]
	}
	return answers, res.Revision.Number, nil
}

// patiently is reads that tries again if the server is unavailable, for up to a minute.
func patiently(t testing.TB, s *servertest.Server, c *cedarpostv1.Consistency, questions ...string) (answers string, revision int64) {
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
		answers, revision, err := reads(t, s, c, questions...)
		if err == nil {
			return answers, revision
		}
		if code := connect.CodeOf(err); code != connect.CodeUnavailable && code != connect.CodeDeadlineExceeded {
			t.Errorf("got %v, want unavailable", err)
			return "", 0
		}
	}
	t.Errorf("unavailable for a minute")
	return "", 0
}

// shaken is a proxy to a database with delays of up to most.
func shaken(t testing.TB, databaseURL string, seed uint64, most time.Duration) *servertest.Proxy {
	t.Helper()
	p := servertest.NewProxy(t, databaseURL)
	draw := rand.New(rand.NewPCG(seed, 0))
	p.Delay(func() time.Duration { return time.Duration(draw.Int64N(int64(most))) })
	return p
}

func paper(t testing.TB, id, readers string) *cedarpostv1.Entity {
	return servertest.Entity(t, fmt.Sprintf(`{"uid":{"type":"Doc::Paper","id":%q},"attrs":{"readers":{"type":"Doc::Group","id":%q}}}`, id, readers))
}

// No answer is between the two states before and after a write: each answer is that of its
// revision.
func TestMoveIsNeverSeenHalf(t *testing.T) {
	// Not parallel: its callers leave no processor time to other tests.
	moveAround(t, 60)
}

// TestSoakMoveIsNeverSeenHalf is the long form.
func TestSoakMoveIsNeverSeenHalf(t *testing.T) {
	servertest.Soak(t)
	moveAround(t, 3000)
}

func moveAround(t *testing.T, moves int) {
	tight := docServer(t, func(c *server.Config) { c.CacheBytes = 2500 }) // so small that it evicts all the time
	slow := servertest.On(t, shaken(t, tight.URL, 1, 3*time.Millisecond).URL())
	// One of each two questions is allowed: ann is on one side herself, carl by his team, and
	// the papers x and y change sides.
	questions := []string{"ann l", "ann r", "carl l", "carl r", "bob x", "bob y"}
	first := tight.MustPut(
		paper(t, "l", "left"), paper(t, "r", "right"), paper(t, "x", "left"), paper(t, "y", "right"),
		servertest.DocUser(t, "ann", "left"), servertest.DocUser(t, "bob", "left"), servertest.DocUser(t, "carl", "team"),
		servertest.Entity(t, `{"uid":{"type":"Doc::Group","id":"team"},"parents":[{"type":"Doc::Group","id":"left"}]}`))
	at := func(revision int64) string { return [2]string{"ADADAD", "DADADA"}[(revision-first.Number)%2] }

	var newest atomic.Pointer[cedarpostv1.Revision]
	newest.Store(first)
	var done atomic.Bool
	var wg sync.WaitGroup
	for r := range 4 {
		s := []*servertest.Server{tight, slow}[r%2]
		wg.Go(func() {
			last := first.Number
			for i := 0; i < 20 || !done.Load(); i++ {
				answers, revision := patiently(t, s, []*cedarpostv1.Consistency{atLeast(newest.Load()), fully(), nil}[i%3], questions...)
				if revision < last {
					t.Errorf("revision %d after %d", revision, last)
				} else if answers != at(revision) {
					t.Errorf("%s at revision %d, want %s", answers, revision, at(revision))
				}
				if t.Failed() {
					return
				}
				last = revision
			}
		})
	}
	sides := [2]string{"left", "right"}
	for i := range moves {
		from, to := sides[i%2], sides[(i+1)%2]
		if t.Failed() {
			break
		}
		res, err := servertest.Write(t, []*servertest.Server{tight, slow}[i/3%2],
			leave(`Doc::User::"ann"`, from), join(`Doc::User::"ann"`, to),
			setReaders("x", to), setReaders("y", from),
			join(`Doc::Group::"team"`, to), leave(`Doc::Group::"team"`, from))
		if err != nil || res.Revision.Number != first.Number+int64(i)+1 {
			t.Errorf("move %d: %v, %v", i, res, err)
			break
		}
		newest.Store(res.Revision)
	}
	done.Store(true)
	wg.Wait()
}

func join(uid, group string) *cedarpostv1.EntityOperation {
	return &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_AddParents{AddParents: parent(uid, group)}}
}

func leave(uid, group string) *cedarpostv1.EntityOperation {
	return &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_RemoveParents{RemoveParents: parent(uid, group)}}
}

func parent(uid, group string) *cedarpostv1.ChangeParents {
	return &cedarpostv1.ChangeParents{Uid: servertest.UID(uid), Parents: []*cedarpostv1.EntityUid{servertest.UID(`Doc::Group::"` + group + `"`)}}
}

func setReaders(paper, group string) *cedarpostv1.EntityOperation {
	readers, _ := structpb.NewValue(map[string]any{"type": "Doc::Group", "id": group})
	return &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_SetAttributes{SetAttributes: &cedarpostv1.SetAttributes{
		Uid: servertest.UID(`Doc::Paper::"` + paper + `"`), Attrs: &structpb.Struct{Fields: map[string]*structpb.Value{"readers": readers}},
	}}}
}

// A caller that writes through one server and asks another one sees its write.
func TestReadYourWrites(t *testing.T) {
	// Not parallel: its callers leave no processor time to other tests.
	readYourWrites(t, func(round int) bool { return round < 25 })
}

// TestSoakReadYourWrites is the long form.
func TestSoakReadYourWrites(t *testing.T) {
	servertest.Soak(t)
	end := time.Now().Add(time.Minute)
	readYourWrites(t, func(int) bool { return time.Now().Before(end) })
}

func readYourWrites(t *testing.T, goOn func(round int) bool) {
	near := docServer(t, func(c *server.Config) { c.CacheBytes = 5000 })
	far := servertest.On(t, shaken(t, near.URL, 2, 2*time.Millisecond).URL())
	servers := []*servertest.Server{near, far}
	near.MustPut(paper(t, "p", "staff"))
	var wg sync.WaitGroup
	for w := range 10 {
		wg.Go(func() {
			draw := rand.New(rand.NewPCG(3, uint64(w)))
			id := fmt.Sprint("u", w)
			var seen [2]int64 // by server
			for round := 0; goOn(round) && !t.Failed(); round++ {
				groups, want := []string{"staff"}, "A"
				if draw.IntN(2) == 0 {
					groups, want = nil, "D"
				}
				res, err := servertest.Write(t, servers[draw.IntN(2)], put(servertest.DocUser(t, id, groups...)))
				if err != nil {
					t.Error(err)
					return
				}
				for range 3 {
					c := atLeast(res.Revision)
					if draw.IntN(4) == 0 {
						c = fully()
					}
					at := draw.IntN(2)
					got, revision := patiently(t, servers[at], c, id+" p")
					if got != want || revision < res.Revision.Number {
						t.Errorf("%s at revision %d, want %s, which was written at %d", got, revision, want, res.Revision.Number)
					}
					if revision < seen[at] {
						t.Errorf("revision %d after %d on one server", revision, seen[at])
					}
					seen[at] = revision
				}
			}
		})
	}
	wg.Wait()
}

// After many writes through several servers, all of them give the same answers, which are
// those of a server that has just started.
func TestServersConverge(t *testing.T) {
	// Not parallel: its callers leave no processor time to other tests.
	const n = 3
	servers := []*servertest.Server{docServer(t)}
	for i := range n - 1 {
		servers = append(servers, servertest.On(t, shaken(t, servers[0].URL, uint64(i), 3*time.Millisecond).URL()))
	}
	servers[0].MustPut(paper(t, "p", "staff"), paper(t, "q", "lab"))
	var questions []string
	for i := range 10 {
		questions = append(questions, fmt.Sprintf("u%d p", i), fmt.Sprintf("u%d q", i))
	}
	var wg sync.WaitGroup
	for w, s := range servers {
		wg.Go(func() {
			draw := rand.New(rand.NewPCG(4, uint64(w)))
			for range 20 {
				var groups []string
				for _, g := range []string{"staff", "lab"} {
					if draw.IntN(2) == 0 {
						groups = append(groups, g)
					}
				}
				if _, err := servertest.Write(t, s, put(servertest.DocUser(t, fmt.Sprint("u", draw.IntN(10)), groups...))); err != nil {
					t.Error(err)
				}
				patiently(t, servers[draw.IntN(n)], nil, questions...) // warms the cache
			}
		})
	}
	wg.Wait()
	want, newest := patiently(t, servertest.On(t, servers[0].URL), fully(), questions...)
	for i, s := range servers {
		servertest.Eventually(t, fmt.Sprintf("server %d is there by itself", i), func() bool {
			got, revision := patiently(t, s, nil, questions...)
			if revision >= newest && got != want {
				t.Errorf("server %d: %s, want %s", i, got, want)
			}
			return revision >= newest || t.Failed()
		})
		if got, _ := patiently(t, s, fully(), questions...); got != want {
			t.Errorf("server %d: %s, want %s", i, got, want)
		}
	}
}
