package server_test

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/secret"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

const day = 24 * time.Hour

// metric returns the value of a metric without labels, as text.
func metric(t *testing.T, s *servertest.Server, name string) string {
	t.Helper()
	res, err := http.Get(s.Ops + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(text), "\n"+name+" ")
	value, _, _ := strings.Cut(rest, "\n")
	return value
}

// A server drops days of the log that are past their retention, each after an event that records
// it.
func TestRetention(t *testing.T) {
	t.Parallel() // it takes long
	url := storetest.New(t)
	conn := servertest.Session(t, url)
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(url)})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	w := db.NewLogWriter("gone", auditlog.Strict, 0)
	defer w.Close()
	noon := time.Now().UTC().Truncate(day).Add(day / 2)
	var oldest store.Decision
	for _, days := range []int{39, 45, 50} {
		at := noon.AddDate(0, 0, -days)
		servertest.MustExec(t, conn, fmt.Sprintf("select create_log_partitions('%s', 1)", at.Format(time.DateOnly)))
		oldest = servertest.DecisionAt(at)
		if _, err := w.Append(t.Context(), []store.Decision{oldest, servertest.DecisionAt(at)}, nil); err != nil {
			t.Fatal(err)
		}
	}
	// Two servers with this login keep the log at the same time.
	login := storetest.Login(t, url, "cedarpost_app", "cedarpost_writer", "cedarpost_auditor")
	keep := func(c *server.Config) { c.DecisionRetention = 40 * day }
	s := servertest.On(t, login, keep, func(c *server.Config) { c.FirstHousekeeping = time.Millisecond })
	other := servertest.On(t, login, keep, func(c *server.Config) { c.FirstHousekeeping = time.Millisecond })
	servertest.Eventually(t, "two days dropped", func() bool {
		var a, b int
		_, err := fmt.Sscan(metric(t, s, "cedarpost_log_days_dropped_total")+" "+metric(t, other, "cedarpost_log_days_dropped_total"), &a, &b)
		return err == nil && a+b == 2
	})
	_, err = s.Audit.GetDecision(t.Context(), &cedarpostv1.GetDecisionRequest{DecisionId: oldest.ID.String()})
	servertest.WantCode(t, err, connect.CodeNotFound, "dropped by retention")
	_, err = s.Audit.ReplayDecision(t.Context(), &cedarpostv1.ReplayDecisionRequest{DecisionId: oldest.ID.String()})
	servertest.WantCode(t, err, connect.CodeNotFound, "dropped by retention")
	for _, at := range []time.Time{noon, noon.AddDate(0, 0, -39), noon.AddDate(0, 0, -70)} { // the oldest day of the log
		_, err = s.Audit.GetDecision(t.Context(), &cedarpostv1.GetDecisionRequest{DecisionId: servertest.DecisionAt(at).ID.String()})
		servertest.WantCode(t, err, connect.CodeNotFound, "no decision")
	}

	var left int
	if err := conn.QueryRow(t.Context(), "select count(*) from decisions").Scan(&left); err != nil || left != 2 {
		t.Errorf("%d decisions are left, want those of 39 days ago, %v", left, err)
	}
	rows, err := conn.Query(t.Context(), "select record from events where kind = 'retention_drop' order by subject")
	if err != nil {
		t.Fatal(err)
	}
	defer rows.Close()
	for _, days := range []int{50, 45} {
		var text []byte
		var got cedarpostv1.EventRecord
		if !rows.Next() || rows.Scan(&text) != nil || proto.Unmarshal(text, &got) != nil {
			t.Fatalf("no record of %d days ago: %v", days, rows.Err())
		}
		want := &cedarpostv1.RetentionDrop{Day: noon.AddDate(0, 0, -days).Format(time.DateOnly), Decisions: 2}
		if got.Subject != want.Day || got.Kind != cedarpostv1.EventRecord_RETENTION_DROP || !proto.Equal(got.GetRetentionDrop(), want) {
			t.Errorf("recorded %v, want %v", &got, want)
		}
	}
	if rows.Next() {
		t.Error("a day is recorded twice")
	}
}

func TestRetentionOfTheDatabaseIsTheLeast(t *testing.T) {
	db := storetest.Open(t)
	start := func(keep time.Duration) error {
		_, err := server.New(t.Context(), server.Config{DB: db, DecisionRetention: keep, Listen: "nowhere"})
		return err
	}
	if err := start(29 * day); err == nil || !strings.Contains(err.Error(), "kept for 29 days, and the database keeps it for 30 at least") {
		t.Errorf("got %v", err)
	}
	for _, keep := range []time.Duration{30 * day, 0, -1} {
		if err := start(keep); err == nil || !strings.Contains(err.Error(), "nowhere") {
			t.Errorf("%v: got %v", keep, err)
		}
	}
}

// A server that has no partition for tomorrow warns today, is unready in the last hour of today, and makes
// the partition as soon as it can.
func TestWarningWithoutTomorrow(t *testing.T) {
	t.Parallel() // it waits most of the time
	s := servertest.New(t)
	conn := servertest.Session(t, s.URL)
	tomorrow := time.Now().UTC().AddDate(0, 0, 1)
	servertest.MustExec(t, conn, "revoke execute on function create_log_partitions from cedarpost_app")
	for _, table := range []string{"decisions", "events"} {
		// Made by hand, because the server itself tries only every ten seconds.
		servertest.MustExec(t, conn, "select create_log_partitions(current_date, 3)")
		servertest.Eventually(t, "ready", func() bool { _, text := readyz(t, s); return text == "ready" })
		servertest.MustExec(t, conn, "drop table "+table+tomorrow.Format("_20060102"))
		servertest.Eventually(t, "warning without "+table, func() bool {
			status, text := readyz(t, s)
			missing := "the decision log has no partition for " + tomorrow.Format(time.DateOnly)
			if time.Until(tomorrow.Truncate(24*time.Hour)) <= time.Hour {
				return status == http.StatusServiceUnavailable && text == "not ready: "+missing
			}
			return status == http.StatusOK && text == "ready\nwarning: partition: "+missing
		})
	}
	servertest.MustExec(t, conn, "grant execute on function create_log_partitions to cedarpost_app")
	servertest.Eventually(t, "ready again", func() bool { _, text := readyz(t, s); return text == "ready" })
}

// The whole service works with a login that has only the three roles.
func TestRestrictedLogin(t *testing.T) {
	t.Parallel() // it takes long
	login := storetest.Login(t, storetest.New(t), "cedarpost_app", "cedarpost_writer", "cedarpost_auditor")
	s := servertest.On(t, login, func(c *server.Config) { c.FirstHousekeeping = time.Millisecond })
	s.MustLoadShop()
	if _, err := servertest.Write(t, s, &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_Delete{
		Delete: &cedarpostv1.DeleteEntity{Uid: servertest.UID(`Shop::User::"mallory"`), Cascade: true},
	}}); err != nil {
		t.Error(err)
	}
	s.MustApply("doc", "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies)
	groups(t, s, 10, func(int) string { return "" })
	r, err := s.Authorization.Authorize(t.Context(), servertest.WithAllFields(servertest.AskShop("bob", "ViewOrder", "42", false)))
	if err != nil || r.Decision != cedarpostv1.Decision_ALLOW {
		t.Fatalf("%v, %v", r, err)
	}
	got, err := s.Audit.GetDecision(t.Context(), &cedarpostv1.GetDecisionRequest{DecisionId: r.DecisionId})
	if err != nil || got.Decision.DecisionId != r.DecisionId {
		t.Errorf("%v, %v", got, err)
	}
	list, err := s.Audit.QueryDecisions(t.Context(), &cedarpostv1.QueryDecisionsRequest{})
	if err != nil || len(list.Decisions) != 1 {
		t.Errorf("%v, %v", list, err)
	}
	if _, err := s.Entities.ListEntities(t.Context(), &cedarpostv1.ListEntitiesRequest{}); err != nil {
		t.Error(err)
	}
	if _, err := s.Policies.GetBundle(t.Context(), &cedarpostv1.GetBundleRequest{Name: "shop"}); err != nil {
		t.Error(err)
	}
	if err := s.DB.EnsurePartitions(t.Context(), time.Now().AddDate(0, 0, 60)); err != nil {
		t.Error(err)
	}
	servertest.Eventually(t, "ready", func() bool { status, _ := readyz(t, s); return status == http.StatusOK })
	if n := servertest.TaskFailures(t, s); n != 0 {
		t.Errorf("%d failures to look after the log", n)
	}
}
