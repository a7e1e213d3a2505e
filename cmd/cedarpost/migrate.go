package main

import (
	"context"
	"fmt"
	"os"

	"github.com/alecthomas/kong"

	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/store"
)

type migrateCmd struct {
	databaseFlags
	Restored   bool `help:"Give the database a new id. For once after a restore from a copy of files or a snapshot of disks, which cannot be told from the original."`
	PrintRoles bool `help:"Print the SQL that makes the database roles and two logins, for an administrator, and do nothing."`
}

// Help is the long help of migrate.
func (*migrateCmd) Help() string {
	return `All tables belong to the role cedarpost_owner, which the login has to be a member of. Roles that are missing are made; a login that may not make them is told which SQL an administrator has to run.

A database that holds tables of something else is refused. At the end the schema is compared with the one that the migrations make, and what differs is named.

A database that is a copy of another one, like a restored dump, gets an id of its own, so that tokens that the other one gave out are refused. A copy of the files, or a snapshot of disks, cannot be told from the original: after such a restore give --restored, once, before the servers start.`
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
	renewed, err := store.ClaimDatabase(ctx, url, name, m.Restored, server.DatabaseEvents(name))
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
