package store_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

func TestCountDecisions(t *testing.T) {
	db := storetest.Open(t)
	w := db.NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(w.Close)
	now := time.Now()
	var n byte
	var rows []store.Decision
	decided := func(times int, principal, action, outcome, policies string) {
		for range times {
			n++
			d := decision(now.Add(-time.Duration(n)*time.Second), n)
			d.Principal, d.Action, d.Policies = uid(principal), uid(action), strings.Fields(policies)
			d.DeniedAt = int16(slices.Index([]string{"allow", "function", "object", "field"}, outcome))
			d.Allowed = outcome == "allow"
			d.Resource, d.Fields = uid("Order "+outcome), nil
			if d.Allowed {
				d.Fields = []string{"+id", "-total"}
			} else if outcome == "field" {
				d.Fields = []string{"-id"}
			}
			rows = append(rows, d)
		}
	}
	decided(3, "User alice", "Action view", "allow", "shop/own shop/own-fields")
	decided(2, "User alice", "Action view", "object", "")
	decided(1, "User bob", "Action view", "object", "rails/stop")
	decided(1, "User bob", "Action delete", "function", "")
	decided(1, "Robot alice", "Action edit", "field", "shop/own shop/own") // twice the same
	if _, err := w.Append(t.Context(), rows, nil); err != nil {
		t.Fatal(err)
	}
	alice, no := uid("User alice"), false
	for _, c := range []struct {
		by    store.Group
		query store.DecisionQuery
		want  string
	}{
		{store.ByPrincipal, store.DecisionQuery{}, "of 8: User alice 3+2, User bob 0+2, Robot alice 0+1"},
		{store.ByPrincipal, store.DecisionQuery{Limit: 1}, "of 8: User alice 3+2"},
		{store.ByPrincipal, store.DecisionQuery{Allowed: &no}, "of 5: User alice 0+2, User bob 0+2, Robot alice 0+1"},
		{store.ByAction, store.DecisionQuery{}, "of 8: Action view 3+3, Action delete 0+1, Action edit 0+1"},
		{store.ByAction, store.DecisionQuery{Principal: &alice, From: now.Add(-4500 * time.Millisecond)}, "of 4: Action view 3+1"},
		{store.ByPolicy, store.DecisionQuery{}, "of 5: shop/own 3+1, shop/own-fields 3+0, rails/stop 0+1"},
		{store.ByResource, store.DecisionQuery{}, "of 8: Order allow 3+0, Order object 0+3, Order field 0+1, Order function 0+1"},
		{store.ByField, store.DecisionQuery{}, "of 4: id 3+1, total 0+3"},
		{store.ByField, store.DecisionQuery{PermittedField: "id"}, "of 3: id 3+0, total 0+3"},
		{store.ByField, store.DecisionQuery{DeniedField: "other"}, ""},
		{store.ByOutcome, store.DecisionQuery{}, "of 8: at 0 3+0, at 2 0+3, at 1 0+1, at 3 0+1"},
		{store.ByOutcome, store.DecisionQuery{Caller: "nobody"}, ""},
	} {
		if c.query.Limit == 0 {
			c.query.Limit = 100
		}
		counts, err := db.CountDecisions(t.Context(), c.query, c.by)
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, n := range counts {
			name := strings.TrimSpace(n.Type + " " + n.ID)
			if c.by == store.ByOutcome {
				name = fmt.Sprint("at ", n.DeniedAt)
			}
			got = append(got, fmt.Sprintf("%s %d+%d", name, n.Allowed, n.Denied))
		}
		text := strings.Join(got, ", ")
		if len(counts) > 0 {
			text = fmt.Sprintf("of %d: %s", counts[0].Total, text)
		}
		if text != c.want {
			t.Errorf("group %d: %q, want %q", c.by, text, c.want)
		}
	}
}
