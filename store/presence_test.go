package store_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/cedarpost/cedarpost/store"
)

// A server is listed from its first word to its end, or until it has been silent for too long. What it
// has applied counts only if the database has that revision.
func TestLiveServers(t *testing.T) {
	db, url := openURL(t)
	if err := db.CreateKey(t.Context(), store.Key{ID: "k", Name: "k", Hash: make([]byte, 32)}, "test"); err != nil {
		t.Fatal(err)
	}
	at, err := db.Current(t.Context())
	if err != nil || at.Number == 0 {
		t.Fatalf("%v, %v", at, err)
	}
	note := func(s store.LiveServer, at store.Position, live time.Duration) {
		t.Helper()
		if err := db.NoteServer(t.Context(), s, at, live); err != nil {
			t.Fatal(err)
		}
	}
	want := func(says, want string) {
		t.Helper()
		list, err := db.LiveServers(t.Context())
		got := ""
		for _, s := range list {
			got += fmt.Sprintf("%s %s %d, ", s.Name, s.Version, s.Revision)
			if s.SeenAt.IsZero() {
				t.Errorf("%s: %+v", says, s)
			}
		}
		if err != nil || got != want {
			t.Errorf("%s: %q, %v, want %q", says, got, err, want)
		}
	}
	a, b := store.LiveServer{ID: uuid.New(), Name: "a", Version: "v1"}, store.LiveServer{ID: uuid.New(), Name: "b", Version: "v2"}
	want("none", "")
	note(b, store.Position{}, time.Hour)
	want("one that has applied nothing", "b v2 0, ")
	note(a, at, time.Hour)
	want("two", "a v1 1, b v2 0, ")
	b.Version = "v3"
	note(b, at, time.Hour)
	want("it has applied more", "a v1 1, b v3 1, ")
	lost := at
	lost.Mark = uuid.New()
	note(b, lost, time.Hour)
	want("a revision of another history", "a v1 1, b v3 0, ")
	note(b, at, -time.Second)
	want("one is silent", "a v1 1, ")
	note(a, at, time.Hour)
	if n := count(t, url, "select count(*) from servers"); n != 1 {
		t.Errorf("%d rows, want the one of the live server", n)
	}
	if err := db.ForgetServer(t.Context(), a.ID); err != nil {
		t.Fatal(err)
	}
	want("both have ended", "")
	if n := count(t, url, "select count(*) from servers"); n != 0 {
		t.Errorf("%d rows", n)
	}
}
