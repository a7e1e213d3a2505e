package store

import (
	"context"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
)

// LiveServer is a server of the database that runs.
type LiveServer struct {
	// ID is one that the server made at its start.
	ID uuid.UUID
	// Name is its name in the log, which several servers can have, and Version that of its program.
	Name, Version string
	// Revision is the newest revision that it has applied; 0: none of this history.
	Revision int64
	// SeenAt is when it last said so, by the clock of the database. A write ignores it.
	SeenAt time.Time
}

// NoteServer says that a server runs and has applied a position. It counts as live for some time from
// now, by the clock of the database, unless it says so again. Servers that are not live any more are
// removed. It is one statement, which writes nothing to the write-ahead log.
func (db *DB) NoteServer(ctx context.Context, s LiveServer, at Position, live time.Duration) (err error) {
	defer wrap(&err, "note that the server runs")
	// Two servers that remove the same rows do not wait for each other.
	_, err = db.admin.Exec(ctx, `
		with ended as (
			delete from servers
			where id in (select id from servers where live_until < now() and id <> $1 for update skip locked))
		insert into servers (id, name, version, revision, seen_at, live_until)
		values ($1, $2, $3, coalesce((select n from revisions where n = $4 and mark = $5), 0), now(), now() + make_interval(secs => $6))
		on conflict (id) do update set
			name = excluded.name, version = excluded.version, revision = excluded.revision,
			seen_at = excluded.seen_at, live_until = excluded.live_until`,
		s.ID, s.Name, s.Version, at.Number, at.Mark, live.Seconds())
	return err
}

// ForgetServer says that a server has ended.
func (db *DB) ForgetServer(ctx context.Context, id uuid.UUID) (err error) {
	defer wrap(&err, "note that the server ends")
	_, err = db.admin.Exec(ctx, "delete from servers where id = $1", id)
	return err
}

// LiveServers reads the servers that are live, by name and id.
func (db *DB) LiveServers(ctx context.Context) (_ []LiveServer, err error) {
	defer wrap(&err, "read the live servers")
	rows, _ := db.admin.Query(ctx, `
		select id, name, version, revision, seen_at
		from servers
		where live_until >= now()
		order by name, id`)
	return pgx.CollectRows(rows, pgx.RowToStructByName[LiveServer])
}
