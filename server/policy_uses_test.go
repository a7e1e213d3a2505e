package server_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// listUnused lists policies page by page, with the ids of the bundle shop, and counts those that are too new.
func listUnused(t *testing.T, by cedarpostv1connect.PolicyServiceClient, size int32, since time.Time) (all []*cedarpostv1.Policy, ids string, tooNew int32) {
	t.Helper()
	req := &cedarpostv1.ListPoliciesRequest{Bundle: "shop", PageSize: size}
	if !since.IsZero() {
		req.UnusedSince = timestamppb.New(since)
	}
	var names []string
	for {
		res, err := by.ListPolicies(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		all, tooNew = append(all, res.Policies...), tooNew+res.TooNew
		for _, p := range res.Policies {
			names = append(names, p.Id)
		}
		if req.PageToken = res.NextPageToken; req.PageToken == "" {
			return all, strings.Join(names, " "), tooNew
		}
	}
}

// Policies say when they last determined a decision, also after a restart. Forbids that deny fields count.
// Questions that were explained do not.
func TestPoliciesSayWhenTheyDecided(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	s.MustLoadShop()
	before := time.Now().Truncate(time.Second)
	for _, ask := range []*cedarpostv1.AuthorizeRequest{
		servertest.WithAllFields(servertest.AskShop("alice", "ViewOrder", "42", false)), // pii-needs-mfa denies fields
		servertest.AskShop("mallory", "ViewOrder", "42", false),
	} {
		if _, err := s.Authorization.Authorize(t.Context(), ask); err != nil {
			t.Fatal(err)
		}
	}
	explained := servertest.AskShop("erin", "ViewOrder", "42", false)
	explained.Explain = true
	if _, err := s.Authorization.Authorize(t.Context(), explained); err != nil {
		t.Fatal(err)
	}
	s.Stop()
	s = servertest.On(t, s.URL)
	all, _, _ := listUnused(t, s.Policies, 0, time.Time{})
	var used []string
	for _, p := range all {
		if p.CountedSince == nil || p.CountedSince.AsTime().After(time.Now()) {
			t.Errorf("%s is counted since %v", p.Id, p.CountedSince)
		}
		if at := p.LastDetermined; at != nil {
			used = append(used, p.Id)
			if at.AsTime().Before(before) || at.AsTime().After(time.Now()) {
				t.Errorf("%s: %v", p.Id, at.AsTime())
			}
		}
	}
	slices.Sort(used)
	if got := strings.Join(used, " "); got != "pii-needs-mfa support-fields support-views suspended" {
		t.Fatalf("used: %s", got)
	}
	unused := func(but ...string) string {
		var ids []string
		for _, p := range all {
			if !slices.Contains(but, p.Id) {
				ids = append(ids, p.Id)
			}
		}
		return strings.Join(ids, " ")
	}

	// All are published just now, so nothing is known about a month.
	month := time.Now().Add(-30 * 24 * time.Hour)
	if _, ids, tooNew := listUnused(t, s.Policies, 3, month); ids != "" || int(tooNew) != len(all)-len(used) {
		t.Errorf("%q, %d too new", ids, tooNew)
	}
	conn := servertest.Session(t, s.URL)
	servertest.MustExec(t, conn, "update bundles set published_at = now() - interval '40 days'")
	if _, ids, tooNew := listUnused(t, s.Policies, 3, month); ids != "" || int(tooNew) != len(all)-len(used) {
		t.Errorf("the database counts since today: %q, %d too new", ids, tooNew)
	}
	servertest.MustExec(t, conn, "update history set policy_uses_since = now() - interval '50 days'")
	servertest.MustExec(t, conn, "update policy_uses set at = now() - interval '35 days' where policy = 'shop/suspended'")
	want := unused("pii-needs-mfa", "support-fields", "support-views")
	for _, size := range []int32{0, 1, 5} {
		if _, ids, tooNew := listUnused(t, s.Policies, size, month); ids != want || tooNew != 0 {
			t.Errorf("pages of %d: %q, %d too new; want %q", size, ids, tooNew, want)
		}
	}
	res, err := s.Policies.GetPolicy(t.Context(), &cedarpostv1.GetPolicyRequest{Bundle: "shop", Id: "suspended"})
	if err != nil || time.Since(res.GetPolicy().GetLastDetermined().AsTime()).Round(time.Hour) != 35*24*time.Hour {
		t.Errorf("%v, %v", res, err)
	}
	_, err = s.Policies.ListPolicies(t.Context(), &cedarpostv1.ListPoliciesRequest{UnusedSince: &timestamppb.Timestamp{Nanos: -1}})
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "unused_since")
}

// An author who may not list decisions watches a policy about one person, to learn to the minute when this
// person works: it learns the day, by the time and by the filter.
func TestAttackListPoliciesAsksWhenSomebodyWorks(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	s.MustLoadShop()
	author := policiesOf(t, s, "author", grant(access.PolicyAuthor, "shop"))
	auditor := policiesOf(t, s, "auditor", grant(access.Auditor, "shop"))
	conn := servertest.Session(t, s.URL)
	servertest.MustExec(t, conn, "update history set policy_uses_since = '2026-01-01'")
	servertest.MustExec(t, conn, "update bundles set published_at = '2026-01-01'")
	day := time.Date(2026, 3, 4, 0, 0, 0, 0, time.UTC)
	at := day.Add(14*time.Hour + 7*time.Minute)
	if err := s.DB.NotePolicyUses(t.Context(), map[string]time.Time{"shop/suspended": at}); err != nil {
		t.Fatal(err)
	}
	distinct := map[string]bool{}
	for hour := range 24 {
		_, ids, _ := listUnused(t, author, 0, day.Add(time.Duration(hour)*time.Hour))
		distinct[ids] = true
	}
	t.Logf("attack: the filter of 24 hours of a day gives %d answers", len(distinct))
	if len(distinct) != 1 {
		t.Error("the filter tells the hour")
	}
	for by, want := range map[cedarpostv1connect.PolicyServiceClient]time.Time{author: day, auditor: at} {
		res, err := by.GetPolicy(t.Context(), &cedarpostv1.GetPolicyRequest{Bundle: "shop", Id: "suspended"})
		if err != nil || !res.GetPolicy().GetLastDetermined().AsTime().Equal(want) {
			t.Errorf("%v, %v, want %v", res.GetPolicy().GetLastDetermined().AsTime(), err, want)
		}
		for days, used := range map[int]bool{-1: true, 0: true, 1: false} {
			_, ids, _ := listUnused(t, by, 0, day.AddDate(0, 0, days))
			if strings.Contains(ids, "suspended") == used {
				t.Errorf("unused since %d days later: %q", days, ids)
			}
		}
	}
	if _, ids, _ := listUnused(t, auditor, 0, at.Add(time.Minute)); !strings.Contains(ids, "suspended") {
		t.Error("an auditor gets days")
	}
}
