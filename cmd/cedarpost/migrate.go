package main

import (
	"context"
	"fmt"
	"os"

	"github.com/alecthomas/kong"

	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/store"
)

type migrateCmd struct {
	databaseFlags
	Restored   bool `help:"Give the database a new id. Needed once after a restore from a copy of files or a snapshot of disks, because such a copy looks like the original."`
	PrintRoles bool `help:"Only print the SQL with which an administrator makes the database roles and two logins, and keeps other logins of the cluster out of the database."`
}

// Help is the long help of migrate.
func (*migrateCmd) Help() string {
	return `All tables belong to the role cedarpost_owner, and the login has to be a member of it. Missing roles are made. If the login may not make them, the error has the SQL that an administrator has to run.

A database with tables of another application is refused. At the end, the schema is compared with the one that the migrations make, and differences are listed.

A copy of another database, like a restored dump, gets an id of its own, so that its servers refuse tokens of the other one. A copy of files, or a snapshot of disks, looks like the original: after a restore from one, run migrate --restored once, before the servers start.`
}

// Run migrates.
func (m *migrateCmd) Run(ctx context.Context, k *kong.Context, c *console) error {
	if m.PrintRoles {
		fmt.Fprint(c.out, store.Roles())
		return nil
	}
	url, err := m.required(k)
	if err != nil {
		return err
	}
	if err := store.Migrate(ctx, url, newLogger(c.err, "text", "info")); err != nil {
		return err
	}
	name, _ := os.Hostname()
	renewed, err := store.ClaimDatabase(ctx, url, name, m.Restored, decisionlog.DatabaseEvents(name))
	if err != nil {
		return err
	}
	fmt.Fprintln(c.out, "the database is up to date")
	if renewed.After != renewed.Before {
		why := "it was restored"
		if renewed.Copied {
			why = "it is a copy of another one"
		}
		fmt.Fprintf(c.out, "the database has a new id, because %s: %s (the old one was %s)\n", why, renewed.After, renewed.Before)
	}
	return nil
}
