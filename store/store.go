// Package store is the only place that talks to Postgres. It exists so that one
// package answers for what is durable and in which order: every write of policy
// or data takes the next revision under a lock held to its commit, nothing is
// overwritten, and a decision counts as recorded only after its commit.
//
// It takes and gives plain structs. It knows neither Cedar nor the wire: an
// attribute is JSON, a policy is text, a decision record is bytes. Whoever calls
// has checked what they mean.
//
// Reads name the revision they want, and give the same answer for it for ever,
// as long as it is not above [DB.Current], or [ErrSwept] once history does not go
// back to it any more.
package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// The reasons to refuse that callers tell apart with [errors.Is]. Errors of
// Postgres itself stay wrapped, as *pgconn.PgError or *pgconn.ConnectError.
var (
	// ErrNotFound: there is nothing under this name at this revision.
	ErrNotFound = errors.New("not found")
	// ErrMustExist: the precondition that the entity is stored does not hold.
	ErrMustExist = errors.New("does not exist")
	// ErrMustNotExist: the precondition that the entity is not stored does not hold.
	ErrMustNotExist = errors.New("exists already")
	// ErrStale: the entity changed after the revision the precondition names.
	ErrStale = errors.New("changed since")
	// ErrCycle: the parents would make the entity its own ancestor.
	ErrCycle = errors.New("would be its own ancestor")
	// ErrTooManyMembers: a cascade would drop more than [MaxCascade] memberships.
	ErrTooManyMembers = errors.New("too many members to drop at once")
	// ErrTooManyAncestors: more than [MaxLoad] ancestors would have to be read.
	ErrTooManyAncestors = errors.New("too many ancestors")
	// ErrTooManyGroups: more than [MaxGroups] entities that can have members are
	// below the ancestor of a listing.
	ErrTooManyGroups = errors.New("too many groups below")
	// ErrBehind: the database that answered has not got to that position, or is
	// another one: a standby that took over without the newest revisions.
	ErrBehind = errors.New("the database is not at that revision")
	// ErrPolicyChanged: a bundle was published since the write was checked.
	// Nothing was written: check again against the new policies, and retry.
	ErrPolicyChanged = errors.New("policies changed meanwhile")
	// ErrOtherHistory: the database does not have the [Position] that the call names:
	// a failover or a restore lost it, or it is a position of another database. Nothing
	// was written. A write may be checked again at [DB.Current] and retried.
	ErrOtherHistory = errors.New("the database has another history")
	// ErrImportMoved: somebody else has continued the import, or begun it anew.
	ErrImportMoved = errors.New("somebody else continues this import")
	// ErrNotMigrated: the database's schema is older than this binary needs.
	ErrNotMigrated = errors.New("database schema is not up to date: run cedarpost migrate")
	// ErrTooNew: the database's schema is newer than this binary knows.
	ErrTooNew = errors.New("database schema is newer than this binary: use a newer cedarpost")
	// ErrRecorded: the log holds one of these records already, by an attempt whose
	// outcome nobody learned.
	ErrRecorded = errors.New("recorded already")
	// ErrPooler: a connection pooler gives one session of the database to several
	// clients, so that what a connection was told does not hold.
	ErrPooler = errors.New("the database is reached through a connection pooler that shares sessions between clients (PgBouncer's " +
		"pool_mode = transaction or statement, or no server_reset_query), which is not supported yet: " +
		"use pool_mode = session with server_reset_query = DISCARD ALL, or connect to Postgres itself")
	// ErrNoPartition: the decision log has no partition for the day of a decision.
	ErrNoPartition = errors.New("decision log has no partition for that day")
)

// Config says which database to use.
type Config struct {
	// DatabaseURL is a Postgres URL or a key=value connection string. The
	// connection parameters connect_timeout (default 5 s), application_name
	// (cedarpost), statement_timeout (30 s), jit (off) and
	// idle_in_transaction_session_timeout (60 s) can be set in it. Of several hosts
	// one that takes writes is chosen. Commits are always synchronous.
	DatabaseURL string
	// MaxConns bounds each of the three pools, those of decisions, of administration
	// and of reads of the log. 0 takes pool_max_conns from the URL, or the larger of 4 and
	// the number of CPUs. Listeners and decision writers have a connection of their
	// own besides, and the look at the newest revision has two.
	MaxConns int32
	// ReadURLs are standbys of the same database, to read the entities of decisions
	// from. Each has a pool of MaxConns. One that is behind, or does not answer, is
	// passed over, in the end for the primary: an answer never depends on them.
	ReadURLs []string
	// Server is the name of this server in the log.
	Server string
	// Event makes the record of a write, which is committed with it. It is called
	// while all other writers wait. Nil: writes leave no record, which is for tests of
	// this package.
	Event func(context.Context, Changed) (Event, error)
}

// DB is an open database. It is safe for concurrent use.
//
// It has several pools, so that no kind of work waits for connections behind
// another: whatever administration does, decisions go on, and however many of
// those there are, the newest revision can be told.
type DB struct {
	pool  *pgxpool.Pool // for decisions, and for followers
	admin *pgxpool.Pool // for writes and lists
	audit *pgxpool.Pool // for reads of the log: it can read, and nothing else
	vital *pgxpool.Pool // for what tells whether decisions can be made at all
	// standbys serve decisions before pool does.
	standbys standbys
	// turn has one place: who is in it may take the revision lock. The others of
	// this process wait here, where waiting costs no connection.
	turn    chan struct{}
	changes changeLog
	current latest[Position]
	// sessions makes all connections to the primary; conn is the config of those outside
	// of the pools, the application's. It is copied, never changed.
	sessions sessions
	conn     *pgx.ConnConfig
}

// vitalConns is one for Current, which never needs more, one for PartitionsReady
// and one for View.
const vitalConns = 3

// Open connects to a migrated database. The error is [ErrNotMigrated] when
// [Migrate] has to run first, and [ErrRoles] when the login may not take the roles
// on that a server needs.
func Open(ctx context.Context, cfg Config) (_ *DB, err error) {
	defer wrap(&err, "open database")
	poolConfig, err := pgxpool.ParseConfig(cfg.DatabaseURL)
	if err != nil {
		return nil, err
	}
	setDefaults(poolConfig.ConnConfig)
	if cfg.MaxConns > 0 {
		poolConfig.MaxConns = cfg.MaxConns
	}
	vitalConfig := poolConfig.Copy()
	vitalConfig.MaxConns, vitalConfig.MinConns, vitalConfig.MinIdleConns = vitalConns, 0, 0
	db := &DB{turn: make(chan struct{}, 1), conn: as(poolConfig.ConnConfig, appRole)}
	db.changes.event, db.changes.server, db.changes.writer = cfg.Event, cfg.Server, uuid.New()
	defer func() {
		if err != nil {
			db.Close()
		}
	}()
	if err := checkRoles(ctx, &db.sessions, poolConfig.ConnConfig, servingRoles...); err != nil {
		return nil, err
	}
	for _, p := range []struct {
		pool   **pgxpool.Pool
		config *pgxpool.Config
		role   string
	}{
		{&db.pool, poolConfig, appRole}, {&db.admin, poolConfig, appRole},
		{&db.audit, poolConfig, auditorRole}, {&db.vital, vitalConfig, appRole},
	} {
		if *p.pool, err = db.sessions.pool(ctx, p.config, p.role); err != nil {
			return nil, err
		}
	}
	if err := checkMigrated(ctx, db.pool); err != nil {
		return nil, err
	}
	for _, url := range cfg.ReadURLs {
		if err := db.standbys.add(ctx, url, cfg.MaxConns); err != nil {
			return nil, err
		}
	}
	return db, nil
}

// OpenAuditor connects as an auditor does: to read the log, with the methods that
// only read it, and to nothing else.
func OpenAuditor(ctx context.Context, databaseURL string) (_ *DB, err error) {
	defer wrap(&err, "open database")
	config, err := pgxpool.ParseConfig(databaseURL)
	if err != nil {
		return nil, err
	}
	setDefaults(config.ConnConfig)
	db := &DB{}
	if err := checkRoles(ctx, &db.sessions, config.ConnConfig, auditorRole); err != nil {
		return nil, err
	}
	if db.audit, err = db.sessions.pool(ctx, config, auditorRole); err != nil {
		return nil, err
	}
	if err := checkMigrated(ctx, db.audit); err != nil {
		db.Close()
		return nil, err
	}
	return db, nil
}

// setDefaults fills what the URL does not say. No statement waits for ever, and a
// writer that stopped halfway does not hold the revision lock for ever.
func setDefaults(c *pgx.ConnConfig) {
	// Whatever the URL or the server says: what was committed is on disk. A
	// revision that a crash takes back would be given out again for another content.
	c.RuntimeParams["synchronous_commit"] = "on"
	// A standby can neither be written to nor tell the newest revision.
	if c.ValidateConnect == nil && severalHosts(c) {
		c.ValidateConnect = pgconn.ValidateConnectTargetSessionAttrsReadWrite
	}
	if c.ConnectTimeout == 0 {
		c.ConnectTimeout = 5 * time.Second
	}
	for name, value := range map[string]string{
		"application_name":                    "cedarpost",
		"statement_timeout":                   "30s",
		"idle_in_transaction_session_timeout": "60s",
		// Recursive queries over named entities, and those over many partitions, would be
		// compiled to machine code for longer than they run.
		"jit": "off",
	} {
		if _, ok := c.RuntimeParams[name]; !ok {
			c.RuntimeParams[name] = value
		}
	}
}

// severalHosts tells them from one host that is tried with and without TLS.
func severalHosts(c *pgx.ConnConfig) bool {
	for _, f := range c.Fallbacks {
		if f.Host != c.Host || f.Port != c.Port {
			return true
		}
	}
	return false
}

// Close closes the pools, after the calls in progress are done.
func (db *DB) Close() {
	for _, pool := range []*pgxpool.Pool{db.pool, db.admin, db.audit, db.vital} {
		if pool != nil {
			pool.Close()
		}
	}
	db.standbys.close()
}

// Ping asks the database for a sign of life.
func (db *DB) Ping(ctx context.Context) (err error) {
	defer wrap(&err, "ping")
	return db.pool.Ping(ctx)
}

// Position is a place in the history of one database. Numbers of two positions
// can be compared only where Database and Timeline are equal: after a failover, or
// a restore from a backup, the same number can mean another content.
type Position struct {
	// Database is made with the schema and kept by physical replicas. A copy gets another
	// one; see [DB.Claim].
	Database uuid.UUID
	// Timeline is the timeline of the write-ahead log, which every promotion of a
	// standby and every point-in-time recovery raises.
	Timeline uint32
	// Number is the newest revision; 0 in a database that was never written to.
	Number int64
	// Mark is made with the revision. A number that was given out again, for another
	// content, has another mark. The zero UUID at revision 0.
	Mark uuid.UUID
}

// SameHistory reports whether the numbers of two positions can be compared.
func (p Position) SameHistory(q Position) bool {
	return p.Database == q.Database && p.Timeline == q.Timeline
}

// pg_walfile_name starts with the timeline in eight hex digits, and unlike
// pg_control_checkpoint is not a checkpoint late.
const selectPosition = `
	select database,
	       ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint as timeline,
	       n as number,
	       coalesce((select mark from revisions where revisions.n = revision.n), '00000000-0000-0000-0000-000000000000') as mark
	from revision`

func scanPosition(rows pgx.Rows) (Position, error) {
	return pgx.CollectExactlyOneRow(rows, pgx.RowToStructByName[Position])
}

// checkPosition makes a batch fail with ErrOtherHistory if the database does not have
// the position. It checks nothing if the position is of revision 0.
func checkPosition(batch *pgx.Batch, p Position) {
	if p.Number == 0 {
		return
	}
	batch.Queue("select exists (select from revisions where n = $1 and mark = $2)", p.Number, p.Mark).QueryRow(func(row pgx.Row) error {
		var there bool
		err := row.Scan(&there)
		if err == nil && !there {
			err = ErrOtherHistory
		}
		return err
	})
}

// currentTimeout is less than the time a server may be without an answer.
const currentTimeout = 2 * time.Second

// Current reads the newest committed revision, in a read that begins after the
// call. Calls that wait share one, so any number of them costs next to nothing. It
// fails on a standby, which cannot know it.
func (db *DB) Current(ctx context.Context) (p Position, err error) {
	defer wrap(&err, "read revision")
	return db.current.get(ctx, func() (Position, error) {
		ctx, cancel := context.WithTimeout(context.Background(), currentTimeout)
		defer cancel()
		rows, _ := db.vital.Query(ctx, selectPosition)
		return scanPosition(rows)
	})
}

// The kinds of a [Change].
const (
	KindEntity = "entity" // Type and ID are the entity's
	KindBundle = "bundle" // ID is the bundle's name
	KindKey    = "key"    // ID is the API key's
)

// Change says that a revision changed a thing, not how: read it at that revision.
type Change struct {
	Revision int64
	Kind     string
	Type     string
	ID       string
}

// Changes reads what changed after a revision, in the order of revisions. It
// stops after the revision that reaches the limit, and never within one, so there
// can be more than limit. No changes means that after was the newest revision:
// every revision changes something. What was swept is left out: after must not be
// below [View.Oldest].
func (db *DB) Changes(ctx context.Context, after int64, limit int) (_ []Change, err error) {
	defer wrap(&err, "read changes")
	return readChanges(ctx, db.pool, after, limit)
}

func readChanges(ctx context.Context, q querier, after int64, limit int) ([]Change, error) {
	const query = `
		select revision, kind, type, id
		from revision_entries
		where revision > $1
		  and revision <= coalesce(
		      (select revision from revision_entries where revision > $1
		       order by revision offset $2 limit 1), 9223372036854775807)
		order by revision, kind, type, id`
	rows, _ := q.Query(ctx, query, after, max(limit, 1)-1)
	return pgx.CollectRows(rows, pgx.RowToStructByName[Change])
}

// Listen calls wake once it hears of new revisions, and again at each of them. A
// wake-up can stand for several revisions, and one can come for nothing; none is
// lost while Listen runs. It holds a connection of its own, and returns when that
// breaks or ctx ends, never with nil: the caller calls it again.
func (db *DB) Listen(ctx context.Context, wake func()) (err error) {
	defer wrap(&err, "listen for revisions")
	conn, err := db.sessions.connect(ctx, db.conn)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	if _, err := conn.Exec(ctx, "listen cedarpost_revision"); err != nil {
		return err
	}
	for {
		wake()
		if _, err := conn.WaitForNotification(ctx); err != nil {
			return err
		}
	}
}

// write runs fn in a transaction that holds the revision lock: fn gets the number
// of the revision to be, and everything committed before it is visible to fn.
// Prepare before, for all other writers wait meanwhile.
func (db *DB) write(ctx context.Context, caller, note string, fn func(tx pgx.Tx, n int64) error) error {
	return db.inTurn(ctx, func(tx pgx.Tx) error {
		n, err := nextRevision(ctx, tx, caller, note)
		if err != nil {
			return err
		}
		return fn(tx, n)
	})
}

// inTurn runs fn in a transaction that may take the revision lock, one at a time.
// The turn comes before the connection: the other way round, those who wait would
// hold the connections that the one whose turn it is needs.
func (db *DB) inTurn(ctx context.Context, fn func(tx pgx.Tx) error) error {
	select {
	case db.turn <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-db.turn }()
	return pgx.BeginTxFunc(ctx, db.admin, readCommitted, fn)
}

// readCommitted is what the revision lock needs: each statement after it must see
// what was committed before it, whatever isolation the server is set to. That the
// commit is on disk is said in the transaction too, so that it does not depend on
// the session.
var readCommitted = pgx.TxOptions{BeginQuery: "begin isolation level read committed; " + durableCommit}

// durableCommit makes the commit of its transaction wait for the disk.
const durableCommit = "set local synchronous_commit = on"

// nextRevision takes the revision lock, which the transaction holds to its end,
// and signs the new revision with the caller.
//
// Don't merge the two statements: the first may wait, and the second's snapshot
// must be later than that.
func nextRevision(ctx context.Context, tx pgx.Tx, caller, note string) (n int64, err error) {
	err = tx.QueryRow(ctx, "update revision set n = n + 1 returning n").Scan(&n)
	if err != nil {
		return 0, err
	}
	_, err = tx.Exec(ctx, "insert into revisions (n, caller, note) values ($1, $2, $3)", n, caller, note)
	return n, err
}

// addEntry records that revision n changed the thing.
func addEntry(ctx context.Context, tx pgx.Tx, n int64, kind, id string) error {
	_, err := tx.Exec(ctx,
		"insert into revision_entries (revision, kind, type, id) values ($1, $2, '', $3)", n, kind, id)
	return err
}

// closeConn says goodbye to the server, briefly, even when the caller's context
// is over.
func closeConn(conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = conn.Close(ctx) // nothing is pending that could be lost
}

// wrap names the operation, once, at the edge of the package.
func wrap(err *error, op string) {
	if *err != nil {
		*err = fmt.Errorf("%s: %w", op, *err)
	}
}

// sqlState is the SQLSTATE of an error of the server, or "".
func sqlState(err error) string {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		return pgErr.Code
	}
	return ""
}

// orEmpty makes nil an empty array, where a column is not null.
func orEmpty(list []string) []string {
	if list == nil {
		return []string{}
	}
	return list
}
