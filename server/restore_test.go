package server_test

import (
	"context"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect/v2"

	"github.com/cedarpost/cedarpost/internal/secret"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// papers writes data by which bob, who is of the staff, may read the paper.
func papers(t *testing.T, s *servertest.Server) *cedarpostv1.Revision {
	t.Helper()
	s.MustApply("doc", "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies)
	return s.MustPut(paper(t, "p", "staff"), servertest.DocUser(t, "ann"), servertest.DocUser(t, "bob", "staff"))
}

// refusesLost fails unless each call with a token refuses the token of a lost revision.
func refusesLost(t *testing.T, s *servertest.Server, lost *cedarpostv1.Revision, page, text string) {
	t.Helper()
	_, _, err := reads(t, s, atLeast(lost), "bob p")
	servertest.WantCode(t, err, connect.CodeAborted, text)
	_, err = s.Entities.GetEntity(t.Context(), &cedarpostv1.GetEntityRequest{Uid: servertest.UID(`Doc::User::"bob"`), At: lost})
	servertest.WantCode(t, err, connect.CodeAborted, text)
	_, err = s.Entities.ListEntities(t.Context(), &cedarpostv1.ListEntitiesRequest{PageSize: 1, PageToken: page})
	servertest.WantCode(t, err, connect.CodeAborted, text)
	op := put(servertest.DocUser(t, "ann", "staff"))
	op.Precondition = &cedarpostv1.Precondition{Condition: &cedarpostv1.Precondition_IfRevision{IfRevision: lost}}
	_, err = servertest.Write(t, s, op)
	servertest.WantCode(t, err, connect.CodeAborted, text)
	now, err := s.Authorization.GetRevision(t.Context(), &cedarpostv1.GetRevisionRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if now.Revision.Token == lost.Token {
		t.Errorf("the token of the lost revision is given out again")
	}
	if _, m := watch(t, s, lost); !m.Reset_ || m.Revision.Number != now.Revision.Number {
		t.Errorf("who watched until the lost revision is told %v", m)
	}
}

func firstPage(t *testing.T, s *servertest.Server) string {
	t.Helper()
	page, err := s.Entities.ListEntities(t.Context(), &cedarpostv1.ListEntitiesRequest{PageSize: 1})
	if err != nil {
		t.Fatal(err)
	}
	return page.NextPageToken
}

// renewals returns the events that say that the database got another id.
func renewals(t *testing.T, s *servertest.Server) []*cedarpostv1.EventRecord {
	t.Helper()
	res, err := s.Audit.QueryEvents(t.Context(), &cedarpostv1.QueryEventsRequest{Kind: cedarpostv1.EventRecord_DATABASE_RENEWED})
	if err != nil {
		t.Fatal(err)
	}
	return res.Events
}

// A copy is another database: it gets an id of its own, once, records that in its log, and
// refuses the tokens of the original. The original keeps its id.
func TestCopyIsAnotherDatabase(t *testing.T) {
	t.Parallel() // it takes long
	for _, way := range []struct {
		name string
		copy func(t *testing.T, url string) (restore func() string)
	}{
		{"a restored dump", func(t *testing.T, url string) func() string {
			file := storetest.Dump(t, url)
			return func() string { return storetest.Restore(t, file, url) }
		}},
		{"a template", func(t *testing.T, url string) func() string {
			clone := storetest.Clone(t, url)
			return func() string { return clone }
		}},
	} {
		t.Run(way.name, func(t *testing.T) {
			first := servertest.New(t)
			papers(t, first)
			first.Stop()
			restore := way.copy(t, first.URL)
			s := servertest.On(t, first.URL) // it makes an API key, which is a revision
			lost, page := s.MustPut(servertest.DocUser(t, "bob")), firstPage(t, s)
			if got, _ := patiently(t, s, atLeast(lost), "bob p"); got != "D" {
				t.Fatalf("%s for bob, who was thrown out", got)
			}
			if len(renewals(t, s)) > 0 {
				t.Error("the original has got another id")
			}

			restored := restore()
			var dbs [2]*store.DB
			var renewed [2]store.Renewed
			for i := range dbs {
				db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(restored)})
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(db.Close)
				dbs[i] = db
			}
			var both sync.WaitGroup
			for i, db := range dbs {
				both.Go(func() {
					var err error
					if renewed[i], err = db.Claim(context.Background(), decisionlog.DatabaseEvents("claims")); err != nil {
						t.Error(err)
					}
				})
			}
			both.Wait()
			if renewed[0].Copied == renewed[1].Copied {
				t.Errorf("of two that start at once, %+v", renewed)
			}
			other := servertest.On(t, restored)
			other.MustPut(servertest.DocUser(t, "dan"))
			if now := revision(t, other); now < lost.Number {
				t.Fatalf("revision %d, lost was %d", now, lost.Number)
			}
			refusesLost(t, other, lost, page, "another database")
			if got, _ := patiently(t, other, fully(), "bob p"); got != "A" {
				t.Errorf("%s for bob, whose throwing out is lost", got)
			}
			events := renewals(t, other)
			if len(events) != 1 || !events[0].GetDatabaseRenewed().GetCopied() || events[0].GetDatabaseRenewed().GetBefore() != database(t, s).String() ||
				events[0].GetDatabaseRenewed().GetAfter() != database(t, other).String() {
				t.Errorf("the log says %v", events)
			}
			if _, err := decisionlog.VerifyLog(t.Context(), other.DB, decisionlog.Verification{}); err != nil {
				t.Error(err)
			}
			if got, _ := patiently(t, s, atLeast(lost), "bob p"); got != "D" {
				t.Errorf("%s for bob, in the original", got)
			}
		})
	}
}

// A copy of the files of Postgres has the id of the original. It refuses the tokens of the
// original all the same: before the number is reached, and after another write got the number.
func TestCopyOfFiles(t *testing.T) {
	t.Parallel()
	original := storetest.NewServer(t)
	if err := store.Migrate(t.Context(), original.URL(), nil); err != nil {
		t.Fatal(err)
	}
	s := servertest.On(t, original.URL())
	kept := papers(t, s)
	snapshot := storetest.NewCopy(t, original)
	for range 3 {
		s.MustPut(servertest.DocUser(t, "bob", "staff"))
		s.MustPut(servertest.DocUser(t, "bob"))
	}
	lost := s.MustPut(servertest.DocUser(t, "bob"))
	page := firstPage(t, s)

	other := servertest.On(t, snapshot.URL())
	if database(t, s) != database(t, other) {
		t.Fatal("the copy is noticed, so this test is of something else")
	}
	for now := revision(t, other); now <= lost.Number+1; now = other.MustPut(servertest.DocUser(t, "dan", strings.Repeat("x", int(now)))).Number {
		refusesLost(t, other, lost, page, "does not have")
	}
	if got, _ := patiently(t, other, atLeast(kept), "bob p"); got != "A" {
		t.Errorf("%s for bob, with a token from before the copy", got)
	}
	if _, m := watch(t, other, kept); m.Reset_ || m.After != kept.Number {
		t.Errorf("who watched until before the copy is told %v", m)
	}

	// When its owner gives it another id, it refuses all tokens from before.
	renewed, err := store.ClaimDatabase(t.Context(), snapshot.URL(), "owner", true, decisionlog.DatabaseEvents("owner"))
	if err != nil || renewed.Copied || renewed.Before == renewed.After {
		t.Fatalf("%+v, %v", renewed, err)
	}
	servertest.Eventually(t, "the new id", func() bool {
		_, _, err := reads(t, other, atLeast(kept), "bob p")
		return connect.CodeOf(err) == connect.CodeAborted
	})
	if events := renewals(t, other); len(events) != 1 || events[0].GetDatabaseRenewed().GetCopied() {
		t.Errorf("the log says %v", events)
	}
}

// The database of a running server is replaced by an earlier state of it, under the same name.
// The server drops what is lost from its memory, and watchers get a reset.
func TestDatabaseReplacedUnderneath(t *testing.T) {
	t.Parallel() // it takes long
	for _, way := range []struct {
		name  string
		copy  func(testing.TB, string) string
		ahead bool // the database has passed the number of the lost revision when the server sees it
		text  string
	}{
		{"a copy", storetest.Clone, false, "another database"},
		{"files, behind", storetest.CloneAsFiles, false, "does not have"},
		{"files, ahead", storetest.CloneAsFiles, true, "does not have"},
	} {
		t.Run(way.name, func(t *testing.T) {
			first := servertest.New(t)
			kept := papers(t, first)
			first.Stop()
			restored := way.copy(t, first.URL)
			s := servertest.On(t, first.URL)
			s.UseKey(first.Token) // the other key is lost, too
			watching, _ := watch(t, s, kept)
			lost := s.MustPut(servertest.DocUser(t, "bob"))
			page := firstPage(t, s)
			for range 3 { // from memory the second time
				if got, _ := patiently(t, s, atLeast(lost), "bob p"); got != "D" {
					t.Fatalf("%s for bob", got)
				}
			}
			watching.until(lost.Number)
			if way.ahead {
				other := servertest.On(t, restored)
				for revision(t, other) <= lost.Number+2 {
					other.MustPut(servertest.DocUser(t, "dan", "x"))
					other.MustPut(servertest.DocUser(t, "dan"))
				}
				other.Stop()
			}
			storetest.Replace(t, s.URL, restored)
			servertest.Eventually(t, "the earlier state", func() bool {
				got, _, err := reads(t, s, fully(), "bob p")
				return err == nil && got == "A"
			})
			// A copy gets an id of its own at the server's next look or a later one. Until then
			// it refuses the token as one of a lost revision.
			servertest.Eventually(t, "the id", func() bool {
				_, _, err := reads(t, s, atLeast(lost), "bob p")
				if err == nil {
					t.Fatal("the token of a lost revision is taken")
				}
				return strings.Contains(err.Error(), way.text)
			})
			refusesLost(t, s, lost, page, way.text)
			if m := watching.next(); !m.Reset_ || m.After != lost.Number && m.After != m.Revision.Number {
				t.Errorf("who watched is told %v", m)
			}
			if got, _ := patiently(t, s, nil, "bob p"); got != "A" {
				t.Errorf("%s for bob, whose throwing out is lost", got)
			}
			newest := s.MustPut(servertest.DocUser(t, "bob"))
			if got, _ := patiently(t, s, atLeast(newest), "bob p"); got != "D" {
				t.Errorf("%s for bob, who was thrown out again", got)
			}
		})
	}
}
