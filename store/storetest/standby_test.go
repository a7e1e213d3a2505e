package storetest_test

import (
	"strconv"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/cedarpost/cedarpost/store/localpg"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// do runs a statement.
func do(t *testing.T, server *localpg.Server, sql string) (string, error) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), server.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	tag, err := conn.Exec(t.Context(), sql)
	return tag.String(), err
}

func must(t *testing.T, server *localpg.Server, sql string) string {
	t.Helper()
	tag, err := do(t, server, sql)
	if err != nil {
		t.Fatal(err)
	}
	return tag
}

// arrives waits until a server has a row.
func arrives(t *testing.T, server *localpg.Server, n int) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if has(t, server, n) {
			return
		}
	}
	t.Fatalf("row %d never arrives", n)
}

// received waits until a standby has received what was committed, whether or not it has
// applied it.
func received(t *testing.T, standby, primary *localpg.Server) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), primary.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	var at string
	if err := conn.QueryRow(t.Context(), "select pg_current_wal_flush_lsn()::text").Scan(&at); err != nil {
		t.Fatal(err)
	}
	for must(t, standby, "select where pg_last_wal_receive_lsn() >= '"+at+"'") != "SELECT 1" {
		time.Sleep(10 * time.Millisecond)
	}
}

func has(t *testing.T, server *localpg.Server, n int) bool {
	t.Helper()
	return must(t, server, "select from things where n = "+strconv.Itoa(n)) == "SELECT 1"
}

// A standby follows its primary, falls behind while its replay is paused, and becomes the
// primary without what it has not received.
func TestStandby(t *testing.T) {
	primary := storetest.NewServer(t)
	must(t, primary, "create table things as select 1 as n")
	standby := storetest.NewStandby(t, primary)
	if !has(t, standby, 1) {
		t.Error("what was there before is missing")
	}
	must(t, primary, "insert into things values (2)")
	arrives(t, standby, 2)
	if _, err := do(t, standby, "insert into things values (0)"); err == nil {
		t.Error("a standby can be written to")
	}

	storetest.PauseReplay(t, standby)
	must(t, primary, "insert into things values (3)")
	received(t, standby, primary)
	if has(t, standby, 3) {
		t.Error("it applies changes while replay is paused")
	}
	storetest.ResumeReplay(t, standby)
	arrives(t, standby, 3)

	must(t, primary, "insert into things values (4)")
	storetest.CutOff(t, standby, primary)
	must(t, primary, "insert into things values (5)")
	if err := primary.Kill(); err != nil {
		t.Fatal(err)
	}
	const timeline = "select where left(pg_walfile_name(pg_current_wal_lsn()), 8) = '00000002'"
	storetest.Promote(t, standby)
	if must(t, standby, timeline) != "SELECT 1" {
		t.Error("not on the second timeline")
	}
	if !has(t, standby, 4) || has(t, standby, 5) {
		t.Error("it does not have what was committed before it was cut off, and that only")
	}
	must(t, standby, "insert into things values (6)")

	// After a crash each still has its own rows.
	if err := standby.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := standby.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := primary.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	if !has(t, standby, 6) || has(t, standby, 5) || !has(t, primary, 5) || has(t, primary, 6) {
		t.Error("the two got each other's rows")
	}
}
