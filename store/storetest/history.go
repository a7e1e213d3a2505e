package storetest

import (
	"testing"

	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/store"
)

// OldHistory opens a new database. grow makes everything that was written to it older than
// any retention.
func OldHistory(t testing.TB) (db *store.DB, grow func()) {
	t.Helper()
	url := New(t)
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(url), Event: Event})
	if err != nil {
		t.Fatalf("storetest: %v", err)
	}
	t.Cleanup(db.Close)
	return db, func() {
		t.Helper()
		if err := runAt(url, "update revisions set at = now() - interval '100 days'"); err != nil {
			t.Fatalf("storetest: %v", err)
		}
	}
}

// WriteOp commits one operation on the entity U::id.
func WriteOp(t testing.TB, db *store.DB, kind store.OpKind, id string) {
	t.Helper()
	_, err := db.WriteEntities(t.Context(), store.EntityWrite{Caller: "test", Ops: []store.Op{
		{Kind: kind, Entity: store.Entity{UID: store.UID{Type: "U", ID: id}}}}})
	if err != nil {
		t.Fatalf("storetest: %v", err)
	}
}
