package cedarpost_test

import (
	"errors"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"

	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// The database is replaced by an earlier state of itself, under its name. No client
// reuses answers of lost revisions for longer than its bound, whether or not the copy
// can be distinguished from the original, and whether or not it has new revisions.
func TestRestore(t *testing.T) {
	for _, way := range []struct {
		name  string
		copy  func(testing.TB, string) string
		ahead bool
	}{
		{"a copy", storetest.Clone, false},
		{"files, behind", storetest.CloneAsFiles, false},
		{"files, ahead", storetest.CloneAsFiles, true},
	} {
		t.Run(way.name, func(t *testing.T) {
			first := servertest.New(t)
			first.MustLoadShop()
			member(t, first, "alice", "support", false)
			member(t, first, "carol", "support", true)
			first.Stop()
			restored := way.copy(t, first.URL)
			s := servertest.On(t, first.URL)
			s.UseKey(first.Token) // the other key is lost with the later revisions
			clients := map[string]*cedarpost.Client{
				"with a cache":    dial(t, s),
				"without a cache": dial(t, s, func(cfg *cedarpost.Config) { cfg.CacheBytes = -1 }),
				"in batches":      dial(t, s, func(cfg *cedarpost.Config) { cfg.Coalesce = true }),
			}
			member(t, s, "alice", "support", true)
			lost := member(t, s, "carol", "support", false)
			for name, c := range clients {
				for user, want := range map[string]bool{"alice": true, "carol": false} {
					check := view(user, "42")
					check.AtLeastAsFresh = lost
					if r := mustAsk(t, c, check); r.Allowed() != want {
						t.Fatalf("%s: %s before the restore: %v", name, user, r.Allowed())
					}
				}
			}
			leased(t, clients["with a cache"])
			for _, user := range []string{"alice", "carol"} {
				eventually(t, "an answer from the cache", func() bool { return mustAsk(t, clients["with a cache"], view(user, "42")).Reused() })
			}
			if way.ahead {
				other := servertest.On(t, restored)
				for i := range 6 {
					member(t, other, "bob", "support", i%2 == 0)
				}
				other.Stop()
			}
			storetest.Replace(t, s.URL, restored)
			replaced := time.Now()
			for name, c := range clients {
				for user, want := range map[string]bool{"alice": false, "carol": true} {
					eventually(t, name+": the earlier state", func() bool {
						began := time.Now()
						r, err := c.Authorize(t.Context(), view(user, "42"))
						if err == nil && r.Allowed() != want && began.Sub(replaced) > 5*time.Second {
							t.Fatalf("%s: an answer of the lost history for %s, %v later", name, user, began.Sub(replaced))
						}
						return err == nil && r.Allowed() == want
					})
				}
				check := view("carol", "42")
				check.AtLeastAsFresh = lost
				check.FailOpen = "never for a revision that is lost"
				r, err := c.Authorize(t.Context(), check)
				for _, a := range append(c.AuthorizeBatch(t.Context(), []cedarpost.Check{check, view("alice", "43")}), cedarpost.Answer{Result: r, Err: err}) {
					if !errors.Is(a.Err, cedarpost.ErrUnknownRevision) || errors.Is(a.Err, cedarpost.ErrInvalid) || a.Allowed() {
						t.Errorf("%s: with the lost revision: allowed %v, %v", name, a.Allowed(), a.Err)
					}
				}
				again, two := view("carol", "42"), view("alice", "42")
				again.AtLeastAsFresh, two.AtLeastAsFresh = mustAsk(t, c, again).Revision(), lost
				for _, a := range c.AuthorizeBatch(t.Context(), []cedarpost.Check{again, two}) {
					if !errors.Is(a.Err, cedarpost.ErrUnknownRevision) || a.Allowed() {
						t.Errorf("%s: with a new revision and the lost one: allowed %v, %v", name, a.Allowed(), a.Err)
					}
				}
			}
			c := clients["with a cache"]
			leased(t, c)
			for user, want := range map[string]bool{"alice": false, "carol": true} {
				eventually(t, "answers from the cache", func() bool {
					r := mustAsk(t, c, view(user, "42"))
					if r.Allowed() != want {
						t.Fatalf("%s: %v from the lost history, reused %v", user, r.Allowed(), r.Reused())
					}
					return r.Reused()
				})
			}
		})
	}
}
