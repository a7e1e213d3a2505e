package server

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/store"
)

// Approvals count until they expire: to the moment, by the shorter time of the live version and of the
// change, and a rollback or a change cannot make it longer.
func TestApprovalsExpire(t *testing.T) {
	given := time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)
	const day = 24 * time.Hour
	for _, c := range []struct {
		what             string
		live, candidate  string
		after            time.Duration
		counts, rollback bool // rollback: the live version is a rollback that keeps the rules of live
	}{
		{"just before the default", "approvals: 1", "approvals: 1", 30*day - time.Nanosecond, true, false},
		{"the default", "approvals: 1", "approvals: 1", 30 * day, false, false},
		{"just before the end", "approvals: 1\napprovals_expire: 7d", "approvals: 1\napprovals_expire: 7d", 7*day - time.Nanosecond, true, false},
		{"the end", "approvals: 1\napprovals_expire: 7d", "approvals: 1\napprovals_expire: 7d", 7 * day, false, false},
		{"longer than the default", "approvals: 1\napprovals_expire: 90d", "approvals: 1\napprovals_expire: 90d", 89 * day, true, false},
		{"a change cannot make it longer", "approvals: 1\napprovals_expire: 7d", "approvals: 1\napprovals_expire: 90d", 8 * day, false, false},
		{"a change cannot make the default longer", "approvals: 1", "approvals: 1\napprovals_expire: 90d", 31 * day, false, false},
		{"a change makes it shorter", "approvals: 1\napprovals_expire: 90d", "approvals: 1", 31 * day, false, false},
		{"a new bundle", "", "approvals: 1\napprovals_expire: 90d", 89 * day, true, false},
		{"a rollback keeps it", "approvals: 1\napprovals_expire: 7d", "approvals: 1\napprovals_expire: 90d", 8 * day, false, true},
	} {
		var live store.Bundle
		if c.live != "" {
			live = store.Bundle{Name: "doc", Version: 1, Digest: "0", Manifest: []byte(c.live), Approvals: 1}
		}
		if c.rollback {
			live.Rules, live.Manifest = keptRules(live, bundle.Rules{}), nil
		}
		change := &store.BundleChange{
			ID: "doc-1", Bundle: "doc", State: store.ChangeOpen, BaseVersion: live.Version, Digest: "1", Authors: []string{"ann"},
			Approvals: []store.Verdict{{Caller: "bob", Digest: "1", At: given}}, Rules: encodeRules(bundle.ReadRules([]byte(c.candidate))),
		}
		s, at := &policyService{}, given.Add(c.after)
		list := s.blocks(proposalOf(change), live, store.PolicyState{}, at)
		if c.counts != (len(list) == 0) || len(list) > 0 && (list[0].rule != ruleApprovals || !strings.Contains(list[0].message, "needs 1 approval and has 0, and 1 approval that expired after ")) {
			t.Errorf("%s: %v", c.what, list)
		}
		shown := changeToProto(*change, s.rulesOf(live, decodeRules(change.Rules)), at)
		if v := shown.GetApprovals()[0]; v.GetExpired() == c.counts || v.GetExpiresAt() == nil || shown.GetApprovalsNeeded() != 1 {
			t.Errorf("%s: shown as %v", c.what, shown)
		}
		change.State = store.ChangePublished
		if v := changeToProto(*change, bundle.Rules{}, at).GetApprovals()[0]; v.GetExpired() || v.GetExpiresAt() != nil {
			t.Errorf("%s: shown after the publish as %v", c.what, v)
		}
	}
}

// Freeze windows of the live version and of the proposal count at the moment that is given.
func TestFreezeWindowsBlock(t *testing.T) {
	const window = "freeze: [{at: 0 18 * * FRI, for: 62h, zone: Europe/Berlin, reason: weekend}]"
	saturday, monday := time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC), time.Date(2026, 11, 30, 7, 0, 0, 0, time.UTC)
	s := &policyService{}
	for _, c := range []struct {
		what, live, candidate string
		at                    time.Time
		message               string // "": none
	}{
		{"live", window, "", saturday, "the bundle doc is not published in its freeze window 0 18 * * FRI for 62h, Europe/Berlin (weekend); the window ends at 2026-11-30T08:00:00+01:00"},
		{"candidate", "", window, saturday, "ends at 2026-11-30T08:00:00+01:00"},
		{"both are one", window, window, saturday, "ends at 2026-11-30T08:00:00+01:00"},
		{"it is over", window, window, monday, ""},
		{"it never ends", "freeze: [{at: '* * * * *', for: 1d}]", "", saturday, "the window does not end before 2026-12-09T12:00:00Z"},
		{"it cannot be read", "freeze: [{at: 0 18 * * FRI, for: 62h, zone: Mars/Phobos}]", "", monday, "version 3 of the bundle doc has rules for publishing that this server cannot read: bundle.yaml:1:45: zone: there is no time zone"},
	} {
		live := store.Bundle{Name: "doc", Version: 3, Digest: "0", Manifest: []byte(c.live)}
		list := s.blocks(proposal{bundle: "doc", digest: "1", rules: bundle.ReadRules([]byte(c.candidate))}, live, store.PolicyState{}, c.at)
		if c.message == "" && len(list) > 0 || c.message != "" && (len(list) != 1 || !strings.Contains(list[0].message, c.message)) {
			t.Errorf("%s: %v", c.what, list)
		}
		if again := s.blocks(proposal{bundle: "doc", digest: "0"}, live, store.PolicyState{}, c.at); len(again) > 0 {
			t.Errorf("%s: what is live already: %v", c.what, again)
		}
		if back := s.blocks(proposal{bundle: "doc", digest: "1", rollbackOf: 1}, live, store.PolicyState{}, c.at); len(back) > 0 {
			t.Errorf("%s: a rollback: %v", c.what, back)
		}
	}
}

// Rules survive being stored, and damaged ones are rules that nobody can meet.
func TestStoredRules(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		r := bundle.Rules{
			Approvals: rapid.IntRange(0, 100).Draw(rt, "approvals"), ApprovalsExpire: time.Duration(rapid.IntRange(0, 365*24).Draw(rt, "hours")) * time.Hour,
			Unread: rapid.SampledFrom([]string{"", "x"}).Draw(rt, "unread"),
		}
		for range rapid.IntRange(0, 3).Draw(rt, "windows") {
			r.Freeze = append(r.Freeze, bundle.FreezeWindow{At: "0 18 * * FRI", For: time.Duration(rapid.IntRange(1, 9999).Draw(rt, "minutes")) * time.Minute, Zone: "Europe/Berlin", Reason: rapid.String().Draw(rt, "reason")})
		}
		for i := range r.Freeze {
			r.Freeze[i].Reason = strings.ToValidUTF8(r.Freeze[i].Reason, "")
		}
		if got := decodeRules(encodeRules(r)); !reflect.DeepEqual(got, r) {
			rt.Fatalf("%+v, want %+v", got, r)
		}
	})
	if encodeRules(bundle.Rules{}) != nil || decodeRules([]byte("{")).Unread == "" {
		t.Error("no rules, or damaged ones")
	}
}

// A chain of rollbacks keeps the windows of the last version that was published otherwise, each once, and neither more nor
// fewer. A refusal says from which version a window comes.
func TestRollbacksKeepWindowsOnce(t *testing.T) {
	manifest := func(hours ...string) []byte {
		text := "freeze:\n"
		for _, h := range hours {
			text += "  - {at: '* * * * *', for: " + h + "}\n"
		}
		return []byte(text)
	}
	back := func(live store.Bundle, manifest []byte, of int64) store.Bundle {
		return store.Bundle{Name: "doc", Version: live.Version + 1, RollbackOf: of, Manifest: manifest, Rules: keptRules(live, bundle.ReadRules(manifest))}
	}
	s := &policyService{}
	messages := func(live store.Bundle) string {
		return strings.Join(messagesOf(s.blocks(proposal{bundle: "doc", digest: "new"}, live, store.PolicyState{}, time.Now())), "\n")
	}
	live := store.Bundle{Name: "doc", Version: 3, Manifest: manifest("3h")}
	if text := messages(live); strings.Contains(text, "of version") || !strings.Contains(text, "* * * * * for 3h, UTC") {
		t.Errorf("a window of its own: %s", text)
	}
	for i := range 30 {
		live = back(live, manifest([]string{"1h", "2h"}[i%2]), int64(i%2)+1)
		own := []string{"1h", "2h"}[i%2]
		text := messages(live)
		if n := len(liveRules(live).Freeze); n != 2 || !strings.Contains(text, "* * * * * for 3h, UTC of version 3, which was taken back (the next publish that is no rollback ends that)") || !strings.Contains(text, "* * * * * for "+own+", UTC;") {
			t.Fatalf("rollback %d keeps %d windows: %s", i+1, n, text)
		}
	}
	// The version that is restored has the same window, so it is its own.
	if text := messages(back(live, manifest("3h"), 3)); strings.Contains(text, "of version") || strings.Count(text, "3h") != 1 {
		t.Errorf("the window stands in the restored version: %s", text)
	}
}
