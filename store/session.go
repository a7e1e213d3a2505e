package store

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/cedarpost/cedarpost/internal/secret"
)

// sessions makes the connections to one database. It does not send settings and role as
// start-up parameters, because a connection pooler can drop them silently. It sets them
// on the new connection and reads them back in another transaction, with and without a
// pooler.
//
// That is sound if no other client uses the session of a connection. A pooler that gives
// a session to several clients is refused with [ErrPooler], see try.
type sessions struct {
	url   secret.Secret                  // of the database; empty if its login never changes
	login atomic.Pointer[pgx.ConnConfig] // the last that url could be read as; nil before the first
	tried atomic.Bool                    // try found nothing

	files   atomic.Pointer[tls.Config] // CAs and certificate that readTLSAgain read last
	trouble atomic.Pointer[string]     // why it could not read them, or ""
}

// nameSetting is a setting with a name that each connection gives its session. If a
// session has another name, another client uses or used it.
const nameSetting = "cedarpost.session"

// tryTimeout bounds try, in case a pooler has no room for one more connection.
const tryTimeout = 5 * time.Second

// connect makes a connection outside of the pools.
func (s *sessions) connect(ctx context.Context, c *pgx.ConnConfig) (*pgx.Conn, error) {
	c, err := s.prepare(c)
	if err != nil {
		return nil, err
	}
	_ = s.refresh(ctx, c)
	s.readTLSAgain(c)
	conn, err := pgx.ConnectConfig(ctx, c)
	return conn, oneLine(err)
}

// refresh sets the user and the password that the URL has now, before a connection is made. If
// the URL cannot be read as one any more, those of the last one that could stay in use.
func (s *sessions) refresh(_ context.Context, c *pgx.ConnConfig) error {
	if s.url.IsZero() {
		return nil
	}
	if now, err := pgx.ParseConfig(s.url.Reveal()); err == nil {
		s.login.Store(now)
	}
	if now := s.login.Load(); now != nil {
		c.User, c.Password = now.User, now.Password
	}
	return nil
}

// connectError is an error of pgx with its text in one line. pgx writes a line for each
// attempt, and tries each address with and without TLS.
type connectError struct {
	text string
	err  error
}

func (e *connectError) Error() string { return e.text }
func (e *connectError) Unwrap() error { return e.err }

func oneLine(err error) error {
	var failed *pgconn.ConnectError
	if !errors.As(err, &failed) {
		return err
	}
	var attempts []string
	first, rest, _ := strings.Cut(err.Error(), "\n")
	for _, line := range strings.Split(rest, "\n") {
		if line = strings.TrimSpace(line); line != "" && !slices.Contains(attempts, line) {
			attempts = append(attempts, line)
		}
	}
	return &connectError{strings.TrimSpace(first + " " + strings.Join(attempts, "; ")), err}
}

// pool makes a pool of connections that take a role on.
func (s *sessions) pool(ctx context.Context, c *pgxpool.Config, role string) (*pgxpool.Pool, error) {
	c = c.Copy()
	var err error
	if c.ConnConfig, err = s.prepare(as(c.ConnConfig, role)); err != nil {
		return nil, err
	}
	c.BeforeConnect = func(ctx context.Context, c *pgx.ConnConfig) error {
		s.readTLSAgain(c)
		return s.refresh(ctx, c)
	}
	return pgxpool.NewWithConfig(ctx, c)
}

// prepare returns a config for connections that set their settings after they connect.
// Poolers pass application_name on, so it stays a start-up parameter.
func (s *sessions) prepare(c *pgx.ConnConfig) (*pgx.ConnConfig, error) {
	c = c.Copy()
	options, err := parseOptions(c.RuntimeParams["options"])
	if err != nil {
		return nil, err
	}
	delete(c.RuntimeParams, "options")
	// As in Postgres, a parameter has precedence over the same one in options.
	maps.Copy(options, c.RuntimeParams)
	delete(options, "application_name")
	maps.DeleteFunc(c.RuntimeParams, func(name, _ string) bool { return name != "application_name" })
	bare := c.Copy()
	c.AfterConnect = func(ctx context.Context, conn *pgconn.PgConn) error {
		name, err := nameSession(ctx, conn)
		if err != nil {
			return err
		}
		if err := makeSettings(ctx, conn, name, options); err != nil {
			return err
		}
		if s.tried.Load() {
			return nil
		}
		other := bare.Copy()
		_ = s.refresh(ctx, other)
		err = try(ctx, conn, name, &other.Config)
		s.tried.Store(err == nil)
		return err
	}
	return c, nil
}

// nameSession gives the session a name of its own.
func nameSession(ctx context.Context, conn *pgconn.PgConn) (name string, err error) {
	name = uuid.NewString()
	found, err := query(ctx, conn, "select current_setting($1, true), set_config($1, $2, false)", nameSetting, name)
	if err == nil && found[0] != "" {
		err = fmt.Errorf("%w (this session has another client, or had one and was not reset)", ErrPooler)
	}
	return name, err
}

// checkName makes sure that the connection still has the session with that name.
func checkName(ctx context.Context, conn *pgconn.PgConn, name string) error {
	found, err := query(ctx, conn, "select current_setting($1, true)", nameSetting)
	if err == nil && found[0] != name {
		err = fmt.Errorf("%w (another session answered)", ErrPooler)
	}
	return err
}

// makeSettings sets the settings of a connection, and reads them back.
func makeSettings(ctx context.Context, conn *pgconn.PgConn, name string, settings map[string]string) error {
	if len(settings) == 0 {
		return nil
	}
	// The role is last, because it may lack the right to make the other settings.
	names := slices.Sorted(maps.Keys(settings))
	if i := slices.Index(names, "role"); i >= 0 {
		names = append(slices.Delete(names, i, i+1), "role")
	}
	var set, read []string
	var args []string
	for _, n := range names {
		set = append(set, fmt.Sprintf("set_config($%d, $%d, false)", len(args)+1, len(args)+2))
		read = append(read, fmt.Sprintf("current_setting($%d)", len(read)+1))
		args = append(args, n, settings[n])
	}
	// set_config returns the value as Postgres writes it.
	want, err := query(ctx, conn, "select "+strings.Join(set, ", "), args...)
	if err != nil {
		return fmt.Errorf("set %s: %w", strings.Join(names, ", "), err)
	}
	if err := checkName(ctx, conn, name); err != nil {
		return err
	}
	got, err := query(ctx, conn, "select "+strings.Join(read, ", "), names...)
	if err != nil {
		return err
	}
	for i, n := range names {
		if got[i] != want[i] {
			return fmt.Errorf("%w (%s was set to %q, and is %q)", ErrPooler, n, want[i], got[i])
		}
	}
	return nil
}

// try finds out whether a connection keeps its session while others use theirs. A pooler
// that shares sessions gives the session of a client to another client when a transaction
// ends. So while one connection is in a transaction, a second one gets a session of its
// own. After the transaction has ended, both sessions are free, and such a pooler gives
// the second connection the session that was used last, or each of them by turns.
func try(ctx context.Context, conn *pgconn.PgConn, name string, bare *pgconn.Config) (err error) {
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	if _, err := conn.Exec(ctx, "begin").ReadAll(); err != nil {
		return beginError(err)
	}
	other, err := pgconn.ConnectConfig(ctx, bare)
	if err != nil {
		return fmt.Errorf("a second connection, to see whether a pooler shares sessions: %w", err)
	}
	defer func() { _ = other.Close(ctx) }() // it has no statement in progress
	otherName, err := nameSession(ctx, other)
	if err != nil {
		return err
	}
	if _, err := conn.Exec(ctx, "commit").ReadAll(); err != nil {
		return err
	}
	for range 3 {
		if err := checkName(ctx, other, otherName); err != nil {
			return err
		}
		if err := checkName(ctx, conn, name); err != nil {
			return err
		}
		if err := checkName(ctx, other, otherName); err != nil {
			return err
		}
	}
	return nil
}

// beginError adds ErrPooler if the server refused a transaction: a pooler that shares
// sessions between statements refuses them.
func beginError(err error) error {
	if sqlState(err) != "" {
		err = fmt.Errorf("%w (%w)", ErrPooler, err)
	}
	return err
}

// query reads one row of texts. It reads null as "".
func query(ctx context.Context, conn *pgconn.PgConn, sql string, args ...string) (row []string, err error) {
	params := make([][]byte, len(args))
	for i, a := range args {
		params[i] = []byte(a)
	}
	oids := slices.Repeat([]uint32{textOID}, len(args))
	result := conn.ExecParams(ctx, sql, params, oids, nil, nil).Read()
	if result.Err != nil {
		return nil, result.Err
	}
	if len(result.Rows) != 1 {
		return nil, errors.New("the server's answer is not one row")
	}
	for _, value := range result.Rows[0] {
		row = append(row, string(value))
	}
	return row, nil
}

// parseOptions reads the settings in the connection parameter options, which are written
// as for the postgres program: "-c name=value" or "--name=value", separated by spaces,
// with a backslash before a space in a value.
func parseOptions(text string) (settings map[string]string, err error) {
	settings = map[string]string{}
	words := splitOptions(text)
	for i := 0; i < len(words); i++ {
		word, dashes := words[i], false
		switch {
		case word == "-c" && i+1 < len(words):
			i++
			word = words[i]
		case strings.HasPrefix(word, "--"):
			word, dashes = word[len("--"):], true
		case strings.HasPrefix(word, "-c"):
			word = word[len("-c"):]
		default:
			return nil, fmt.Errorf("connection parameter options: %q is neither -c name=value nor --name=value", word)
		}
		name, value, ok := strings.Cut(word, "=")
		if !ok || name == "" {
			return nil, fmt.Errorf("connection parameter options: %q has no name=value", words[i])
		}
		if dashes {
			name = strings.ReplaceAll(name, "-", "_")
		}
		settings[strings.ToLower(name)] = value
	}
	return settings, nil
}

// splitOptions splits at spaces like Postgres.
func splitOptions(text string) (words []string) {
	var word strings.Builder
	started := false
	for i := 0; i < len(text); i++ {
		switch c := text[i]; {
		case strings.IndexByte(" \t\n\v\f\r", c) >= 0:
			if started {
				words = append(words, word.String())
				word.Reset()
				started = false
			}
			continue
		case c == '\\' && i+1 < len(text):
			i++
		case c == '\\':
			continue
		}
		word.WriteByte(text[i])
		started = true
	}
	if started {
		words = append(words, word.String())
	}
	return words
}
