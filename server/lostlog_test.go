package server_test

import (
	"testing"

	"connectrpc.com/connect/v2"

	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
)

// The server logs that callers have tokens of another history, and that the database has another
// id.
func TestLogSaysThatTokensAreLost(t *testing.T) {
	t.Parallel() // it takes long
	var log lines
	s := servertest.New(t, logLines(&log))
	lost := papers(t, s)
	renewed, err := store.ClaimDatabase(t.Context(), s.URL, "owner", true, decisionlog.DatabaseEvents("owner"))
	if err != nil {
		t.Fatal(err)
	}
	servertest.Eventually(t, "a refusal", func() bool {
		_, _, err := reads(t, s, atLeast(lost), "bob p")
		return connect.CodeOf(err) == connect.CodeAborted
	})
	for range 3 {
		_, _, err := reads(t, s, atLeast(lost), "bob p")
		servertest.WantCode(t, err, connect.CodeAborted, "another database")
	}
	if n := log.count("a caller has a token"); n != 1 {
		t.Errorf("%d lines about lost tokens", n)
	}
	if n := log.count("after=" + renewed.After.String()); n != 1 {
		t.Errorf("%d lines about the new id", n)
	}
	s.Stop()

	var next lines
	s = servertest.On(t, s.URL, logLines(&next))
	s.MustPut(servertest.DocUser(t, "dan"))
	if n := next.count("after=" + renewed.After.String()); n != 1 {
		t.Errorf("at the next start, %d lines about the new id", n)
	}
	var never lines
	servertest.New(t, logLines(&never))
	if n := never.count("after="); n != 0 {
		t.Errorf("the log of a new database has %d lines about a new id", n)
	}
}
