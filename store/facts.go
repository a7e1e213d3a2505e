package store

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

// Facts describe a database for a bug report. Of what is in the tables of Cedarpost they have only the
// numbers of migrations.
type Facts struct {
	ServerVersion string    `json:"server_version"`
	Now           time.Time `json:"now"`
	Standby       bool      `json:"standby"`
	Migrations    []int64   `json:"migrations"`
	// Missing are the migrations of this binary that the database lacks.
	Missing []int64 `json:"missing_migrations"`
	Bytes   int64   `json:"bytes"`
	// Settings are those of the database server that Cedarpost depends on.
	Settings map[string]string `json:"settings"`
	// Tables are the largest ones.
	Tables []TableFacts `json:"tables"`
	// Sessions is the number of sessions of the database by state and by the type of event that they
	// wait for.
	Sessions map[string]int64 `json:"sessions"`
}

// TableFacts are the facts of a table with its partitions.
type TableFacts struct {
	Name       string `json:"name"`
	Bytes      int64  `json:"bytes"` // with indexes
	Rows       int64  `json:"rows"`  // as the planner estimates
	Partitions int64  `json:"partitions"`
}

// DescribeDatabase returns the facts of a database, also of one whose schema does not fit this binary.
func DescribeDatabase(ctx context.Context, databaseURL string) (f Facts, err error) {
	defer wrap(&err, "describe the database")
	config, err := pgx.ParseConfig(databaseURL)
	if err != nil {
		return f, err
	}
	setDefaults(config)
	var s sessions
	conn, err := s.connect(ctx, config)
	if err != nil {
		return f, err
	}
	defer closeConn(conn)
	err = conn.QueryRow(ctx, `
		select current_setting('server_version'), clock_timestamp(), pg_is_in_recovery(), pg_database_size(current_database()),
		       (select jsonb_object_agg(name, setting) from pg_settings where name in (
		           'max_connections', 'shared_buffers', 'fsync', 'synchronous_commit', 'full_page_writes', 'wal_level', 'max_wal_size',
		           'synchronous_standby_names', 'default_transaction_read_only', 'statement_timeout', 'transaction_timeout', 'TimeZone')),
		       (select jsonb_object_agg(what, n) from (
		           select concat_ws(' ', coalesce(state, 'background'), wait_event_type) as what, count(*) as n
		           from pg_stat_activity where datname = current_database() group by what) as sessions)`).
		Scan(&f.ServerVersion, &f.Now, &f.Standby, &f.Bytes, &f.Settings, &f.Sessions)
	if err != nil {
		return f, err
	}
	if f.Migrations, err = appliedMigrations(ctx, conn); err != nil {
		return f, err
	}
	if f.Missing, err = missingMigrations(f.Migrations); err != nil {
		return f, err
	}
	rows, _ := conn.Query(ctx, `
		select coalesce(whole.relname, part.relname)::text as name, sum(pg_total_relation_size(part.oid))::bigint as bytes,
		       sum(greatest(part.reltuples, 0))::bigint as rows, count(inhrelid)::bigint as partitions
		from pg_class as part
		left join pg_inherits on inhrelid = part.oid
		left join pg_class as whole on whole.oid = inhparent
		where part.relkind in ('r', 'p') and part.relnamespace = (select relnamespace from pg_class where oid = to_regclass('revision'))
		group by 1
		order by bytes desc, name
		limit 40`)
	f.Tables, err = pgx.CollectRows(rows, pgx.RowToStructByName[TableFacts])
	return f, err
}
