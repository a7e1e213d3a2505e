package store_test

import (
	"errors"
	"flag"
	"os"
	"strings"
	"testing"

	"github.com/cedarpost/cedarpost/migrations"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

var update = flag.Bool("update", false, "write migrations/schema.txt anew")

// The description of the schema is that of what the migrations make.
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
