package store_test

import (
	"slices"
	"testing"

	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// The login of a server can read the facts of a database, also of one without tables.
func TestDescribeDatabase(t *testing.T) {
	databaseURL := storetest.New(t)
	for _, url := range []string{databaseURL, storetest.Login(t, databaseURL, "cedarpost_app", "cedarpost_writer", "cedarpost_auditor")} {
		f, err := store.DescribeDatabase(t.Context(), url)
		if err != nil {
			t.Fatal(err)
		}
		decisions := slices.IndexFunc(f.Tables, func(table store.TableFacts) bool { return table.Name == "decisions" })
		if f.ServerVersion == "" || f.Bytes == 0 || f.Settings["max_connections"] == "" || f.Sessions["active"] == 0 || decisions < 0 || f.Tables[decisions].Partitions < 2 {
			t.Errorf("%+v", f)
		}
		if len(f.Migrations) == 0 || len(f.Missing) != 0 {
			t.Errorf("applied %v, missing %v", f.Migrations, f.Missing)
		}
	}
	f, err := store.DescribeDatabase(t.Context(), emptyDatabase(t, databaseURL))
	if err != nil || len(f.Migrations) != 0 || len(f.Missing) == 0 || len(f.Tables) != 0 {
		t.Errorf("%+v, %v", f, err)
	}
}
