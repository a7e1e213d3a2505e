package store_test

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/cedarpost/cedarpost/migrations"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

var update = flag.Bool("update", false, "write migrations/schema.txt anew")

// The description of the schema matches the schema that the migrations make.
func TestSchemaIsListed(t *testing.T) {
	pg := storetest.NewServer(t)
	if err := store.Migrate(t.Context(), pg.URL(), nil); err != nil && !errors.Is(err, store.ErrOtherSchema) {
		t.Fatal(err)
	}
	lines, err := store.ReadSchema(t.Context(), session(t, pg.URL()))
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Join(lines, "\n") + "\n"
	if *update {
		if err := os.WriteFile("../migrations/schema.txt", []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return
	}
	if text != migrations.Schema {
		t.Error("migrations/schema.txt is not what the migrations make: go test ./store -run TestSchemaIsListed -update")
	}
}

// If a number were left out and used later, existing databases would lack what that file
// makes.
func TestMigrationsHaveNoGaps(t *testing.T) {
	for i, v := range store.OurMigrations() {
		if v != int64(i+1) {
			t.Errorf("migration %d is the %dth", v, i+1)
		}
	}
}

// LatestCheckpoint finds the newest checkpoint of one origin or of all, whatever their
// order is.
func TestLatestCheckpoint(t *testing.T) {
	db, databaseURL := openURL(t)
	newest := func(origin, want string) {
		t.Helper()
		c, err := db.LatestCheckpoint(t.Context(), origin)
		got := fmt.Sprintf("%s %d", c.Origin, c.Size)
		if errors.Is(err, store.ErrNotFound) {
			got, err = "", nil
		}
		if err != nil || got != want {
			t.Errorf("of %q: %q, %v, want %q", origin, got, err, want)
		}
	}
	newest("", "")
	newest("b", "")
	mustRaw(t, databaseURL, "insert into checkpoints (origin, size, note) values ('a', 5, ''), ('b', 9, ''), ('b', 10, ''), ('b', 2, ''), ('d', 7, '')")
	newest("", "b 10")
	newest("a", "a 5")
	newest("b", "b 10")
	newest("c", "")
	newest("d", "d 7")
	newest("e", "")
	mustRaw(t, databaseURL, "insert into checkpoints (origin, size, note, at) values ('e', 10, '', now() + interval '1 h')")
	newest("", "e 10")
}
