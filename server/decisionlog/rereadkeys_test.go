package decisionlog_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/cedarpost/cedarpost/auditlog"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// A key that replaces another one in its file signs without a restart, and the log has an event about
// it. A key of another name, or a file that cannot be used, leaves the keys as they were.
func TestAuditKeysAreReadAgain(t *testing.T) {
	t.Parallel() // it takes long
	const name = "test.example/log"
	stays, verifier := servertest.LogKey(t, name)
	changes, first := servertest.LogKey(t, name)
	s := servertest.New(t, signWith(filepath.Join(t.TempDir(), "checkpoints"), stays, changes))
	s.MustLoadShop()
	if _, signed := servertest.Covered(t, s, verifier); !signedBy(signed, auditlog.KeyID(first)) {
		t.Errorf("the second key did not sign\n%s", signed)
	}
	other, _ := servertest.LogKey(t, "test.example/other")
	replace(t, other, changes)
	next, second := servertest.LogKey(t, name)
	replace(t, next, changes)
	servertest.Eventually(t, "the new key signs", func() bool {
		servertest.DecideSome(t, s, 1)
		_, signed := servertest.Covered(t, s, verifier)
		return signedBy(signed, auditlog.KeyID(second)) && !signedBy(signed, auditlog.KeyID(first))
	})
	res, err := s.Audit.QueryEvents(t.Context(), &cedarpostv1.QueryEventsRequest{Kind: cedarpostv1.EventRecord_CHECKPOINT_KEY})
	if err != nil || len(res.GetEvents()) != 3 {
		t.Errorf("%d events about keys, want 3: %v", len(res.GetEvents()), err)
	}
}

// replace puts the content of a file into another one, at once.
func replace(t *testing.T, from, to string) {
	t.Helper()
	text, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to+".new", text, 0o600)
	}
	if err == nil {
		err = os.Rename(to+".new", to)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// signedBy reports whether a note names a key in its signatures.
func signedBy(signed, id string) bool {
	for _, by := range auditlog.Signers([]byte(signed)) {
		if by == id {
			return true
		}
	}
	return false
}
