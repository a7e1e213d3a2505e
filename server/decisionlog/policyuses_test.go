package decisionlog

import (
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// A recorder stores when policies were used by the decisions that it committed: now and then, when it
// stops, and later if the database refuses. A question that was explained is no use.
func TestRecorderStoresUsesOfPolicies(t *testing.T) {
	url := storetest.New(t)
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(url), Server: "s", Event: storetest.Event})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	if err := db.EnsurePartitions(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	exec := func(sql string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	stored := func() string {
		t.Helper()
		rows, _ := conn.Query(t.Context(), "select policy from policy_uses where at between now() - interval '1 hour' and now() order by policy")
		list, err := pgx.CollectRows(rows, pgx.RowTo[string])
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(list, " ")
	}
	var outcomes []string
	r := startRecorder(t, Config{DB: db, Name: "s", Mode: auditlog.Strict, Log: slog.New(slog.DiscardHandler), mergeEvery: time.Hour, Task: func(name string, err error) {
		if name == TaskPolicyUses {
			outcomes = append(outcomes, fmt.Sprint(err == nil))
		}
	}})
	use := func(change func(d *store.Decision), policies ...string) {
		t.Helper()
		d := aDecision(t)
		d.Policies = policies
		change(&d)
		if err := r.Record(t.Context(), []store.Decision{d}, nil); err != nil {
			t.Fatal(err)
		}
	}
	plain := func(*store.Decision) {}
	use(plain, "b/one", "b/two")
	use(func(d *store.Decision) { d.FieldForbids = []string{"b/mask"} }, "b/one")
	use(func(d *store.Decision) { d.Explained = true }, "b/tried")
	if got := stored(); got != "" {
		t.Errorf("stored with the commit: %s", got)
	}
	r.storeUses(t.Context())
	r.storeUses(t.Context()) // nothing new
	if got := stored(); got != "b/mask b/one b/two" {
		t.Errorf("stored: %s", got)
	}

	exec("alter table policy_uses rename to away")
	use(plain, "b/later")
	r.storeUses(t.Context())
	use(plain, "b/three")
	exec("alter table away rename to policy_uses")
	r.storeUses(t.Context())
	if got := stored(); got != "b/later b/mask b/one b/three b/two" {
		t.Errorf("stored after an outage: %s", got)
	}
	use(plain, "b/zero")
	r.Close()
	if got := stored(); got != "b/later b/mask b/one b/three b/two b/zero" {
		t.Errorf("stored at the end: %s", got)
	}
	if !slices.Equal(outcomes, []string{"true", "false", "true", "true"}) {
		t.Errorf("outcomes %v", outcomes)
	}
}
