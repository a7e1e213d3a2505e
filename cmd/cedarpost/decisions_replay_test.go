package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/secret"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/store"
)

func TestReplay(t *testing.T) {
	t.Parallel() // it takes long
	dir := dataDir(t)
	dev := newShell().start(t, append([]string{"dev", "--data", dir}, anyPort...)...)
	env := readEnv(t, filepath.Join(dir, "dev.env"))
	sh := newShell(env...)
	if info, err := os.Stat(filepath.Join(dir, "mask.key")); err != nil || info.Mode() != 0o600 {
		t.Errorf("mask.key: %v, %v, want mode 0600", info, err)
	}
	maskKey, err := os.ReadFile(filepath.Join(dir, "mask.key"))
	if err != nil {
		t.Fatal(err)
	}

	sh.exits(t, 0, says("0 decisions replayed: 0 equal, 0 different, 0 not replayable\n"), "decisions", "replay", "--since=1h")
	for range 20 {
		sh.exits(t, 0, nil, ask("ViewOrder", "42", "--fields=all")...)
	}
	sh.exits(t, 5, nil, ask("ViewOrder", "99", "--fields=all")...)
	var denied struct{ DecisionID string }
	if err := json.Unmarshal([]byte(sh.exits(t, 0, nil, "decisions", "--decision=deny", "-o", "json").out), &denied); err != nil {
		t.Fatal(err)
	}
	sh.exits(t, 0, says("EQUAL\n", `resource     Shop::Order::"99"`, "recorded     DENY at OBJECT", denied.DecisionID), "decisions", "replay", denied.DecisionID)
	sh.exits(t, 0, says(`"outcome":"EQUAL"`, `"replayed":{`), "decisions", "replay", denied.DecisionID, "-o", "json")
	sh.exits(t, 0, says("EQUAL\n", "owner-views", "resource.owner"), "decisions", "replay", denied.DecisionID, "--explain")
	sh.exits(t, 0, says("DENY at OBJECT", "owner-views", "resource.owner"), "decisions", "get", denied.DecisionID, "--explain")
	sh.exits(t, 0, says(`"explanation":{`), "decisions", "get", denied.DecisionID, "--explain", "-o", "json")
	sh.exits(t, 2, says("--explain needs the id"), "decisions", "replay", "--since=1h", "--explain")
	sh.exits(t, 0, says("21 decisions replayed: 21 equal, 0 different, 0 not replayable\n"), "decisions", "replay", "--since=1h")
	sh.exits(t, 0, says("1 decision replayed: 1 equal"), "decisions", "replay", "--resource=Shop::Order::99", "--concurrency=1")

	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(value(env, databaseURLEnv))})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	changed := tamper(t, db, denied.DecisionID, 1, func(r *cedarpostv1.DecisionRecord) {
		r.Decision, r.DeniedAt = cedarpostv1.Decision_ALLOW, nil
	})
	masked := tamper(t, db, denied.DecisionID, 1, func(r *cedarpostv1.DecisionRecord) { r.Masked = []string{"context.pin"} })
	sh.exits(t, 1, says("DIFFERENT\n", "  decision: recorded ALLOW, replayed DENY\n", "  denied at: recorded nothing, replayed OBJECT\n"), "decisions", "replay", changed)
	sh.exits(t, 1, says("NOT REPLAYABLE\n", "reason       values are masked: context.pin"), "decisions", "replay", masked)
	sh.exits(t, 0, says("not explained: values are masked: context.pin"), "decisions", "get", masked, "--explain")
	sh.exits(t, 0, says("masked       context.pin", "mode         strict", ", of which loading "), "decisions", "get", masked)
	sh.exits(t, 1, says("23 decisions replayed: 21 equal, 1 different, 1 not replayable\n", "  "+changed+"  decision: recorded ALLOW, replayed DENY; denied at", "  1 not replayable: values are masked: context.pin\n"),
		"decisions", "replay", "--since=1h")
	var sum replaySummary
	r := sh.exits(t, 1, nil, "decisions", "replay", "--since=1h", "-o", "json")
	if err := json.Unmarshal([]byte(r.out), &sum); err != nil || sum.Equal != 21 || len(sum.Differing) != 1 || sum.Differing[0].DecisionID != changed || sum.Reasons["values are masked: context.pin"] != 1 {
		t.Errorf("%v %s", err, r.out)
	}
	// There are more decisions than a page has, and more than the summary names.
	tamper(t, db, changed, 300, func(*cedarpostv1.DecisionRecord) {})
	tamper(t, db, denied.DecisionID, 300, func(*cedarpostv1.DecisionRecord) {})
	if r = sh.exits(t, 1, says("623 decisions replayed: 321 equal, 301 different", "  and 291 more\n"), "decisions", "replay", "--since=1h"); strings.Count(r.out, "decision: recorded ALLOW") != replayNamed {
		t.Errorf("not %d are named:\n%s", replayNamed, r.out)
	}

	sh.exits(t, 2, says("give an id, or select decisions"), "decisions", "replay")
	sh.exits(t, 2, says("not both"), "decisions", "replay", masked, "--since=1h")
	sh.exits(t, 2, says("--concurrency must be at least 1"), "decisions", "replay", "--since=1h", "--concurrency=0")
	sh.exits(t, 1, says("not_found"), "decisions", "replay", "01900000-0000-7000-8000-000000000000")
	if r := sh.exits(t, 1, says("unauthenticated"), "decisions", "replay", "--since=1h", "--token-file="+filepath.Join(dir, "mask.key")); r.out != "" {
		t.Errorf("a summary of nothing: %s", r.out)
	}

	// The mask key stays in the data folder.
	dev.stop(t, syscall.SIGTERM)
	dev = newShell().start(t, append([]string{"dev", "--data", dir}, anyPort...)...)
	if again, err := os.ReadFile(filepath.Join(dir, "mask.key")); err != nil || string(again) != string(maskKey) {
		t.Errorf("another mask key after a restart: %v", err)
	}
	dev.stop(t, syscall.SIGTERM)
	bad := write(t, t.TempDir(), "mask.key", "hunter2\n")
	if r := sh.exits(t, 1, says("mask key: "+bad+" does not hold 32 bytes"), append([]string{"dev", "--data", dir, "--mask-key-file", bad}, anyPort...)...); strings.Contains(r.err, "hunter2") {
		t.Errorf("the error tells the key: %s", r.err)
	}
}

// tamper appends n changed copies of a record to the log, and returns the id of the last one.
func tamper(t *testing.T, db *store.DB, id string, n int, change func(*cedarpostv1.DecisionRecord)) string {
	t.Helper()
	row, err := db.GetDecision(t.Context(), uuid.MustParse(id))
	if err != nil {
		t.Fatal(err)
	}
	rec := &cedarpostv1.DecisionRecord{}
	if err := proto.Unmarshal(row.Record, rec); err != nil {
		t.Fatal(err)
	}
	change(rec)
	row.Allowed, row.DeniedAt = rec.Decision == cedarpostv1.Decision_ALLOW, int16(rec.GetDeniedAt())
	rows := make([]store.Decision, n)
	for i := range rows {
		row.ID = uuid.Must(uuid.NewV7())
		rec.DecisionId = row.ID.String()
		rec.Time = timestamppb.New(time.Unix(row.ID.Time().UnixTime()).UTC().Truncate(time.Millisecond))
		if row.Record, err = proto.Marshal(rec); err != nil {
			t.Fatal(err)
		}
		rows[i] = row
	}
	w := db.NewLogWriter("tamper", auditlog.Strict, 0)
	defer w.Close()
	if _, err := w.Append(t.Context(), rows, nil); err != nil {
		t.Fatal(err)
	}
	return rec.DecisionId
}
