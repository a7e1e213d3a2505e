// Package store is the only package that talks to Postgres. It exists so that one package
// is responsible for what is durable and in which order: every write of policy or data
// takes the next revision under a lock that is held until the commit, nothing is
// overwritten, and a decision counts as recorded only after its commit.
//
// It takes and returns plain structs. It knows neither Cedar nor the wire: an attribute
// is JSON, a policy is text, a decision record is bytes. The caller has checked what they
// mean.
//
// A read names the revision that it reads. For a revision up to [DB.Current] it always
// has the same result, until history does not go back to that revision: then the error is
// [ErrSwept].
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
	"go.opentelemetry.io/otel/trace"

	"github.com/cedarpost/cedarpost/internal/secret"
)

// The errors that callers distinguish with [errors.Is]. Errors of Postgres are wrapped,
// as *pgconn.PgError or *pgconn.ConnectError.
var (
	// ErrNotFound: there is nothing under this name at this revision.
	ErrNotFound = errors.New("not found")
	// ErrMustExist: the precondition that the entity is stored does not hold.
	ErrMustExist = errors.New("does not exist")
	// ErrMustNotExist: the precondition that the entity is not stored does not hold.
	ErrMustNotExist = errors.New("exists already")
	// ErrStale: the entity changed after the revision that the precondition names.
	ErrStale = errors.New("changed since")
	// ErrCycle: the parents would make the entity its own ancestor.
	ErrCycle = errors.New("would be its own ancestor")
	// ErrTooManyMembers: a cascade would remove more memberships than maxCascade.
	ErrTooManyMembers = errors.New("too many members to drop at once")
	// ErrTooLarge: the entities to load weigh more than the call may read; see
	// [TooLargeError].
	ErrTooLarge = errors.New("too large to load")
	// ErrTooManyGroups: more than [MaxGroups] entities that can have members are below
	// the ancestor of a listing.
	ErrTooManyGroups = errors.New("too many groups below")
	// ErrBehind: the database that answered does not have that position. It is a standby
	// that has not received it yet, or that became the primary without the newest
	// revisions.
	ErrBehind = errors.New("the database is not at that revision")
	// ErrPolicyChanged: a bundle was published since the write was checked.
	// Nothing was written: check again against the new policies, and retry.
	ErrPolicyChanged = errors.New("policies changed meanwhile")
	// ErrOtherHistory: the database does not have the [Position] that the call names:
	// a failover or a restore lost it, or it is a position of another database. Nothing
	// was written. A write may be checked again at [DB.Current] and retried.
	ErrOtherHistory = errors.New("the database has another history")
	// ErrImportTaken: an unfinished import of another caller has the id.
	ErrImportTaken = errors.New("an unfinished import of another caller has this id")
	// ErrImportMoved: another caller has continued the import or begun it anew.
	ErrImportMoved = errors.New("somebody else continues this import")
	// ErrNotMigrated: the database's schema is older than this binary needs.
	ErrNotMigrated = errors.New("database schema is not up to date: run cedarpost migrate")
	// ErrTooNew: the database's schema is newer than this binary knows.
	ErrTooNew = errors.New("database schema is newer than this binary: use a newer cedarpost")
	// ErrRecorded: the log has one of these records already, from an earlier attempt
	// whose outcome was unknown.
	ErrRecorded = errors.New("recorded already")
	// ErrPooler: a connection pooler gives one session of the database to several
	// clients, so that the settings of a connection can be lost.
	ErrPooler = errors.New("the database is reached through a connection pooler that shares sessions between clients (PgBouncer's " +
		"pool_mode = transaction or statement, or no server_reset_query), which is not supported yet: " +
		"use pool_mode = session with server_reset_query = DISCARD ALL, or connect to Postgres itself")
	// ErrText: a text has a NUL character or is not UTF-8, so Postgres neither stores nor
	// compares it. Every exported function returns it.
	ErrText = errors.New("text with a NUL character, or not UTF-8")
	// ErrNoPartition: the decision log has no partition for the day of a decision.
	ErrNoPartition = errors.New("decision log has no partition for that day")
)

// Config configures a [DB].
type Config struct {
	// DatabaseURL is a Postgres URL or a key=value connection string. It can set the
	// connection parameters connect_timeout (default 5 s), application_name (cedarpost),
	// statement_timeout (30 s), jit (off), cursor_tuple_fraction (1) and
	// idle_in_transaction_session_timeout (60 s).
	// Of several hosts, one that accepts writes is chosen. Commits are always
	// synchronous. A live secret is read again for each new connection, and its user and
	// password are used, if it is still a URL; a change of anything else in it has no effect.
	DatabaseURL secret.Secret
	// MaxConns bounds each of the three pools: for decisions, for administration and for
	// reads of the log. 0 takes pool_max_conns from the URL, or the larger of 4 and the
	// number of CPUs. Each listener and each log writer has one more connection of its
	// own, and a fourth pool, for reads of the newest revision, has three.
	MaxConns int32
	// ReadURLs are standbys of the same database, from which the entities of decisions
	// are read. Each has a pool of MaxConns. If one is behind or does not answer, the
	// next one is asked, and in the end the primary, so that no answer depends on them.
	ReadURLs []secret.Secret
	// TracerProvider makes spans of the statements of calls that are sampled; nil: none. Spans have
	// the SQL text, and no parameters.
	TracerProvider trace.TracerProvider
	// Server is the name of this server in the log.
	Server string
	// Event makes the record of a write, which is committed with the write. It is called
	// while all other writers wait. If it is nil, writes have no record, which is for
	// tests of this package.
	Event func(context.Context, Changed) (Event, error)
}

// DB is an open database. It is safe for concurrent use.
//
// It has several pools, so that one kind of work does not wait for the connections of
// another: administration does not delay decisions, and decisions do not delay reads of
// the newest revision.
type DB struct {
	pool  *pgxpool.Pool // for decisions, and for followers
	admin *pgxpool.Pool // for writes and lists
	audit *pgxpool.Pool // for reads of the log: its role can only read
	vital *pgxpool.Pool // for reads that every decision depends on
	// Decisions read entities from standbys first, and then from pool.
	standbys standbys
	// turn has room for one: the goroutine that may take the revision lock. The other
	// writers of this process wait for it without a connection.
	turn    chan struct{}
	onces   onceCounts
	changes changeLog
	current latest[Position]
	// sessions makes all connections to the primary. connConfig is the config of
	// connections outside of the pools, with the role of the application. It is copied
	// and never changed.
	sessions   sessions
	connConfig *pgx.ConnConfig
}

// vitalConns is one connection for Current, which never needs more, one for
// PartitionsReady and one for View.
const vitalConns = 3

// Open connects to a migrated database. The error is [ErrNotMigrated] if [Migrate] has to
// run first, and [ErrRoles] if the login may not take on the roles that a server needs.
func Open(ctx context.Context, cfg Config) (_ *DB, err error) {
	defer wrap(&err, "open database")
	poolConfig, err := pgxpool.ParseConfig(cfg.DatabaseURL.Reveal())
	if err != nil {
		return nil, err
	}
	setDefaults(poolConfig.ConnConfig)
	poolConfig.ConnConfig.Tracer = newQueryTracer(cfg.TracerProvider)
	if cfg.MaxConns > 0 {
		poolConfig.MaxConns = cfg.MaxConns
	}
	vitalConfig := poolConfig.Copy()
	vitalConfig.MaxConns, vitalConfig.MinConns, vitalConfig.MinIdleConns = vitalConns, 0, 0
	db := &DB{turn: make(chan struct{}, 1), connConfig: as(poolConfig.ConnConfig, appRole)}
	db.sessions.url = cfg.DatabaseURL
	db.changes.makeEvent, db.changes.server, db.changes.writer = cfg.Event, cfg.Server, uuid.New()
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
		if err := db.standbys.add(ctx, url, cfg.MaxConns, poolConfig.ConnConfig.Tracer); err != nil {
			return nil, err
		}
	}
	return db, nil
}

// OpenAuditor connects with the role of the auditor. Only methods that read the log can
// be called.
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

// OpenOwner connects with the role that owns the tables, which the login that migrates has. Only
// [DB.ChangeAccess] can be called. Of cfg only DatabaseURL, Server and Event count. The error is
// [ErrRoles] if the login may not take on the role.
func OpenOwner(ctx context.Context, cfg Config) (_ *DB, err error) {
	defer wrap(&err, "open database")
	config, err := pgxpool.ParseConfig(cfg.DatabaseURL.Reveal())
	if err != nil {
		return nil, err
	}
	setDefaults(config.ConnConfig)
	config.MaxConns = 1
	db := &DB{turn: make(chan struct{}, 1)}
	db.sessions.url = cfg.DatabaseURL
	db.changes.makeEvent, db.changes.server, db.changes.writer = cfg.Event, cfg.Server, uuid.New()
	if err := checkRoles(ctx, &db.sessions, config.ConnConfig, ownerRole); err != nil {
		return nil, err
	}
	if db.admin, err = db.sessions.pool(ctx, config, ownerRole); err != nil {
		return nil, err
	}
	if err := checkMigrated(ctx, db.admin); err != nil {
		db.Close()
		return nil, err
	}
	return db, nil
}

// setDefaults fills in what the URL does not set: no statement runs for ever, and a
// writer that hangs does not hold the revision lock for ever.
func setDefaults(c *pgx.ConnConfig) {
	// A commit waits for the disk, also if the URL or the server says otherwise. If a crash lost a
	// committed revision, its number would be used again for another content.
	c.RuntimeParams["synchronous_commit"] = "on"
	// A standby cannot be written to, and does not know the newest revision.
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
		// Postgres would compile recursive queries and queries over many partitions,
		// which takes longer than they run.
		"jit": "off",
		// A page is a whole query with a limit. By default the planner expects that only a tenth of it
		// is read, and prefers to read all rows in their order.
		"cursor_tuple_fraction": "1",
	} {
		if _, ok := c.RuntimeParams[name]; !ok {
			c.RuntimeParams[name] = value
		}
	}
}

// severalHosts reports whether there are several hosts. One host can have a fallback too:
// the same address without TLS.
func severalHosts(c *pgx.ConnConfig) bool {
	for _, f := range c.Fallbacks {
		if f.Host != c.Host || f.Port != c.Port {
			return true
		}
	}
	return false
}

// Close waits for the calls in progress and closes the pools.
func (db *DB) Close() {
	for _, pool := range []*pgxpool.Pool{db.pool, db.admin, db.audit, db.vital} {
		if pool != nil {
			pool.Close()
		}
	}
	db.standbys.close()
}

// Position is a place in the history of one database. The numbers of two positions can be
// compared only if Database and Timeline are equal: after a failover or a restore from a
// backup, the same number can mean another content.
type Position struct {
	// Database is made with the schema. A physical replica has the same one, and a copy
	// gets another one: see [DB.Claim].
	Database uuid.UUID
	// Timeline is the timeline of the write-ahead log. Every promotion of a standby and
	// every point-in-time recovery raises it.
	Timeline uint32
	// Number is the newest revision, 0 in a database that was never written to.
	Number int64
	// Mark is made with the revision. If a number is used again for another content, the
	// mark is another one. At revision 0 it is the zero UUID.
	Mark uuid.UUID
}

// SameHistory reports whether the numbers of two positions can be compared.
func (p Position) SameHistory(q Position) bool {
	return p.Database == q.Database && p.Timeline == q.Timeline
}

// pg_walfile_name starts with the timeline in eight hex digits. pg_control_checkpoint
// would show a new timeline only after the next checkpoint.
const selectPosition = `
	select database,
	       ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint as timeline,
	       n as number,
	       coalesce((select mark from revisions where revisions.n = revision.n), '00000000-0000-0000-0000-000000000000') as mark
	from revision`

func scanPosition(rows pgx.Rows) (Position, error) {
	return pgx.CollectExactlyOneRow(rows, pgx.RowToStructByName[Position])
}

// checkPosition makes a batch fail with missing if the database does not have the
// position. It checks nothing if the position is of revision 0.
func checkPosition(batch *pgx.Batch, p Position, missing error) {
	if p.Number == 0 {
		return
	}
	batch.Queue("select exists (select from revisions where n = $1 and mark = $2)", p.Number, p.Mark).QueryRow(func(row pgx.Row) error {
		var there bool
		err := row.Scan(&there)
		if err == nil && !there {
			err = missing
		}
		return err
	})
}

// currentTimeout is shorter than the time for which a server may be without an answer.
const currentTimeout = 2 * time.Second

// Current reads the newest committed revision, in a read that begins after the call.
// Calls that wait share one read, so many of them are cheap. It fails on a standby, which
// does not know the newest revision.
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
	KindKey    = "key"    // ID is that of the API key
)

// Change says that a revision changed a thing. To see how, read the thing at that
// revision.
type Change struct {
	Revision int64
	Kind     string
	Type     string
	ID       string
}

// Listen calls wake when it begins to listen for new revisions, and after new revisions.
// One call can stand for several revisions or for none. While Listen runs, it misses
// none. It uses a connection of its own, and returns an error when that breaks or ctx
// ends: then the caller calls it again.
func (db *DB) Listen(ctx context.Context, wake func()) (err error) {
	defer wrap(&err, "listen for revisions")
	conn, err := db.sessions.connect(ctx, db.connConfig)
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

// inTurn runs fn in a transaction that may take the revision lock, one at a time. It
// waits for its turn before it takes a connection. Otherwise waiting calls would hold the
// connections that the running call needs. Writers of other processes wait for fn from when
// it takes the lock, so it should prepare before that.
func (db *DB) inTurn(ctx context.Context, fn func(tx pgx.Tx) error) error {
	select {
	case db.turn <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-db.turn }()
	return pgx.BeginTxFunc(ctx, db.admin, readCommitted, fn)
}

// readCommitted is the isolation that the revision lock needs, whatever the default of
// the server: each statement after the lock sees what was committed before the lock was
// taken. durableCommit is set in the transaction too, so that it does not depend on the
// session.
var readCommitted = pgx.TxOptions{BeginQuery: "begin isolation level read committed; " + durableCommit}

// durableCommit makes the commit of its transaction wait for the disk.
const durableCommit = "set local synchronous_commit = on"

// nextRevision takes the revision lock, which the transaction holds until it ends, and
// stores the caller of the new revision.
//
// Don't merge the two statements: the first may wait for the lock, and the snapshot of
// the second must be taken after that.
func nextRevision(ctx context.Context, tx pgx.Tx, caller string) (n int64, err error) {
	err = tx.QueryRow(ctx, "update revision set n = n + 1 returning n").Scan(&n)
	if err != nil {
		return 0, err
	}
	_, err = tx.Exec(ctx, "insert into revisions (n, caller) values ($1, $2)", n, caller)
	return n, err
}

// addEntry stores that revision n changed a thing.
func addEntry(ctx context.Context, tx pgx.Tx, n int64, kind, id string) error {
	_, err := tx.Exec(ctx,
		"insert into revision_entries (revision, kind, type, id) values ($1, $2, '', $3)", n, kind, id)
	return err
}

// closeConn closes a connection within a second, even if the caller's context has ended.
func closeConn(conn *pgx.Conn) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = conn.Close(ctx) // no statement is in progress
}

// wrap adds the name of the operation, once, in exported functions. It also adds ErrText.
func wrap(err *error, op string) {
	if *err != nil {
		*err = fmt.Errorf("%s: %w", op, *err)
	}
	// character_not_in_repertoire, untranslatable_character
	if state := sqlState(*err); state == "22021" || state == "22P05" {
		*err = fmt.Errorf("%w: %w", ErrText, *err)
	}
}

// notFound turns pgx.ErrNoRows into ErrNotFound.
func notFound(err error) error {
	if errors.Is(err, pgx.ErrNoRows) {
		return ErrNotFound
	}
	return err
}

// sqlState is the SQLSTATE of an error of the server, or "".
func sqlState(err error) string {
	var pgErr *pgconn.PgError
	if errors.As(err, &pgErr) {
		return pgErr.Code
	}
	return ""
}

// orEmpty returns an empty array for nil, for a column that is not null.
func orEmpty(list []string) []string {
	if list == nil {
		return []string{}
	}
	return list
}
