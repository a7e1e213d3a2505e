// Package migrations holds the database schema, so that the binary that needs a
// table is the binary that makes it.
//
// The files are goose migrations and go forward only: there are no Down
// sections. A log that must never lose a row, and a history that must stay
// readable, have no honest way back; what was wrong is put right by the next
// file. A file that was released is never edited.
package migrations

import "embed"

// FS holds the migrations, named NNNNN_what.sql and applied in that order.
//
//go:embed *.sql
var FS embed.FS

// Schema describes the schema that the migrations make, one line for each column,
// index, constraint, trigger, function and right. Migrating compares with it. A test
// writes it anew: go test ./store -run TestSchemaIsListed -update.
//
//go:embed schema.txt
var Schema string
