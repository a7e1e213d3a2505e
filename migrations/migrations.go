// Package migrations has the database schema, so that the binary that needs a table
// can make it.
//
// The files are goose migrations without Down sections: the log must not lose a row and
// the history must stay readable, so a mistake is corrected by a new file. A released
// file is never edited.
package migrations

import "embed"

// FS has the migrations. They are named NNNNN_what.sql and applied in that order.
//
//go:embed *.sql
var FS embed.FS

// Schema describes the schema that the migrations make, one line for each column, index,
// constraint, trigger, function and right. store.Migrate compares the database with it. A
// test writes it: go test ./store -run TestSchemaIsListed -update.
//
//go:embed schema.txt
var Schema string
