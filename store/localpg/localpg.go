//go:build unix

// Package localpg runs a private Postgres from the binaries installed on the
// machine. It exists so that `cedarpost dev` and every test have the real
// database, with nothing to set up and nothing left running.
//
// A server lives in a folder:
//
//	DIR/lock               held (flock) while the server is in use
//	DIR/postgres.password  of the superuser, readable only by the owner
//	DIR/postgres.log       what the server says
//	DIR/postgres/          the cluster; a symbolic link in the case below
//
// It listens on 127.0.0.1 only, with a random password (SCRAM). Postgres refuses
// to run as root, so root runs it as the user postgres if there is one, else as
// nobody. When that user cannot reach DIR, because a folder above it is closed,
// the cluster is put into /var/lib/cedarpost instead, and DIR/postgres is a link
// to it: remove both together.
//
// The server stops when its parent does: on Linux even when the parent is killed;
// elsewhere the next Start on the folder stops the orphan first.
package localpg

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// The reasons not to start that callers may want to tell apart.
var (
	// ErrInUse: another process, or another Server, has the folder.
	ErrInUse = errors.New("folder is in use by another server")
	// ErrPortBusy: something listens on the port already.
	ErrPortBusy = errors.New("port is in use")
	// ErrNoPostgres: there are no binaries. The error says how to get them.
	ErrNoPostgres = errors.New("no Postgres server is installed")
)

// role is the name of the superuser and of the database.
const role = "cedarpost"

// Config says where and how to run a server.
type Config struct {
	// Dir is the folder, made if missing.
	Dir string
	// Port to listen on; 0 takes a free one.
	Port int
	// Durable makes a commit survive a crash of the machine, as in production. For
	// tests false is faster, and still survives a crash of the server alone.
	Durable bool
	// MaxConnections of the server; 0 means 100.
	MaxConnections int
}

// Server is a Postgres server, running or stopped. Its methods are not for
// concurrent use, Done and URL excepted.
type Server struct {
	config   Config
	bin      string   // folder of the binaries
	owner    *account // nil: run as who we are
	cluster  string   // folder that the owner owns; the data are in data/
	password string
	lock     *os.File
	process  *process
}

// Start starts the server of a folder and waits until it answers. A new folder is
// initialized, one whose server crashed is recovered, and an orphan of a parent
// that was killed is stopped first. When ctx ends before the server answers, it is
// stopped; after that ctx does not matter.
func Start(ctx context.Context, config Config) (_ *Server, err error) {
	defer wrap(&err)
	if config.Dir, err = filepath.Abs(config.Dir); err != nil {
		return nil, err
	}
	if config.MaxConnections == 0 {
		config.MaxConnections = 100
	}
	s := &Server{config: config}
	if s.bin, err = FindBinaries(); err != nil {
		return nil, err
	}
	if s.owner, err = stepDown(); err != nil {
		return nil, err
	}
	return s, s.start(ctx)
}

// Restart starts the server again after Stop or Kill, at the same URL.
func (s *Server) Restart(ctx context.Context) (err error) {
	defer wrap(&err)
	return s.start(ctx)
}

// URL is where to connect, as the superuser cedarpost, to the database cedarpost.
func (s *Server) URL() string { return s.url(role) }

func (s *Server) url(database string) string {
	u := url.URL{
		Scheme:   "postgres",
		User:     url.UserPassword(role, s.password),
		Host:     net.JoinHostPort("127.0.0.1", strconv.Itoa(s.config.Port)),
		Path:     "/" + database,
		RawQuery: "sslmode=disable",
	}
	return u.String()
}

// LogFile is where the server writes its log.
func (s *Server) LogFile() string { return filepath.Join(s.config.Dir, "postgres.log") }

// ClusterDir is where the cluster really is, which may be outside of the folder.
func (s *Server) ClusterDir() string { return s.cluster }

// Done is closed when the server has exited, asked to or not.
func (s *Server) Done() <-chan struct{} { return s.process.done }

// Stop shuts the server down, ending the sessions that are open, and waits until
// everything is on disk. Stopping a stopped server does nothing.
func (s *Server) Stop() (err error) {
	defer wrap(&err)
	defer s.unlock()
	return s.process.stop(syscall.SIGINT, time.Minute)
}

// Kill ends the server as kill -9 of all its processes does: nothing is written any
// more, its clients are told nothing, and the next start has to recover. It returns
// when the last process is gone, for until then the data cannot be used again.
func (s *Server) Kill() (err error) {
	defer wrap(&err)
	defer s.unlock()
	return s.process.kill(time.Minute)
}

func (s *Server) start(ctx context.Context) (err error) {
	// The user that Postgres runs as has to get through; what is in there is closed.
	if err := os.MkdirAll(s.config.Dir, 0o755); err != nil {
		return err
	}
	if err := s.takeLock(); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			s.unlock()
		}
	}()
	if err := s.place(); err != nil {
		return err
	}
	if err := stopOrphan(s.data()); err != nil {
		return err
	}
	if err := s.initialize(ctx); err != nil {
		return err
	}
	if err := s.run(ctx); err != nil {
		return err
	}
	if err := s.createDatabase(ctx); err != nil {
		return errors.Join(err, s.process.stop(syscall.SIGINT, time.Minute))
	}
	return nil
}

func (s *Server) data() string { return filepath.Join(s.cluster, "data") }

// initialize makes the cluster, unless it is there. It is made under another name,
// so that one that was interrupted is never taken for a whole one.
func (s *Server) initialize(ctx context.Context) error {
	passwordFile := filepath.Join(s.config.Dir, "postgres.password")
	password, err := os.ReadFile(passwordFile)
	s.password = strings.TrimSpace(string(password))
	if _, statErr := os.Stat(s.data()); statErr == nil {
		return err // without its password the cluster is of no use
	}
	if s.password == "" {
		s.password = rand.Text()
		if err := writeFile(passwordFile, s.password); err != nil {
			return err
		}
	}

	unfinished := filepath.Join(s.cluster, "data.new")
	if err := os.RemoveAll(unfinished); err != nil {
		return err
	}
	pwfile := filepath.Join(s.cluster, "pwfile") // a copy that the owner can read
	defer os.Remove(pwfile)
	if err := errors.Join(writeFile(pwfile, s.password), s.owner.chown(pwfile)); err != nil {
		return err
	}
	args := []string{"-D", unfinished, "-U", role, "--pwfile", pwfile,
		"--auth=scram-sha-256", "--encoding=UTF8", "--locale=C"}
	if !s.config.Durable {
		args = append(args, "--no-sync")
	}
	cmd := s.command(ctx, "initdb", args...)
	if output, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("initdb: %w\n%s", err, bytes.TrimSpace(output))
	}
	return os.Rename(unfinished, s.data())
}

// run starts the process and waits until it takes connections.
func (s *Server) run(ctx context.Context) error {
	free := s.config.Port == 0
	for attempt := 0; ; attempt++ {
		port, err := takePort(s.config.Port)
		if err != nil {
			return err
		}
		s.config.Port = port
		err = s.runOnce(ctx)
		// Someone else may have got the free port in between.
		if free && attempt < 3 && err != nil && strings.Contains(err.Error(), "in use") {
			s.config.Port = 0
			continue
		}
		return err
	}
}

func (s *Server) runOnce(ctx context.Context) error {
	settings := []string{
		"listen_addresses=127.0.0.1",
		"unix_socket_directories=", // their paths are too long for some folders
		"port=" + strconv.Itoa(s.config.Port),
		"max_connections=" + strconv.Itoa(s.config.MaxConnections),
	}
	if !s.config.Durable {
		settings = append(settings, "fsync=off", "synchronous_commit=off", "full_page_writes=off")
	}
	args := []string{"-D", s.data()}
	for _, setting := range settings {
		args = append(args, "-c", setting)
	}
	log, err := os.OpenFile(s.LogFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	from, err := log.Seek(0, 2)
	if err != nil {
		return err
	}
	// Not under ctx, which ends with the start.
	cmd := s.command(context.WithoutCancel(ctx), "postgres", args...)
	cmd.Stdout, cmd.Stderr = log, log
	if s.process, err = startProcess(cmd); err != nil {
		return err
	}
	for {
		err := s.exec(ctx, "postgres", "select 1")
		if err == nil {
			return nil
		}
		select {
		case <-s.process.done:
			return fmt.Errorf("the server does not start (%v); its log ends:\n%s", s.process.state(), tail(s.LogFile(), from))
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err, s.process.stop(syscall.SIGINT, time.Minute))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// createDatabase makes the database, unless it is there: a standby has it from its
// primary, and could not make it.
func (s *Server) createDatabase(ctx context.Context) error {
	err := s.exec(ctx, role, "select 1")
	if err != nil && strings.Contains(err.Error(), "3D000") { // invalid_catalog_name
		return s.exec(ctx, "postgres", "create database "+role)
	}
	return err
}

func (s *Server) exec(ctx context.Context, database, sql string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	conn, err := pgx.Connect(ctx, s.url(database))
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	_, err = conn.Exec(ctx, sql)
	return err
}

func (s *Server) takeLock() error {
	if s.lock != nil {
		return ErrInUse // by this very Server
	}
	file, err := os.OpenFile(filepath.Join(s.config.Dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		file.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return fmt.Errorf("%w: %s", ErrInUse, s.config.Dir)
		}
		return err
	}
	s.lock = file
	return nil
}

func (s *Server) unlock() {
	if s.lock != nil {
		s.lock.Close()
		s.lock = nil
	}
}

// takePort returns the port, or a free one for 0. That is not one of those that the
// system gives to whoever asks for any, or else somebody could get it while the server
// is down, and it could not start again at its URL.
func takePort(port int) (int, error) {
	for range 100 {
		if port != 0 {
			break
		}
		// Systems give from 32,768 on.
		const from, to = 20_000, 32_000
		if free, err := takePort(from + mathrand.IntN(to-from)); err == nil { //nolint:gosec // no secret
			return free, nil
		}
	}
	l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		if errors.Is(err, syscall.EADDRINUSE) {
			return 0, fmt.Errorf("%w: 127.0.0.1:%d", ErrPortBusy, port)
		}
		return 0, err
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}

// tail returns the end of what a log has from an offset on.
func tail(file string, from int64) string {
	log, err := os.ReadFile(file)
	if err != nil {
		return err.Error()
	}
	log = log[min(from, int64(len(log))):]
	lines := strings.Split(strings.TrimSpace(string(log)), "\n")
	return strings.Join(lines[max(0, len(lines)-20):], "\n")
}

// writeFile writes a secret.
func writeFile(name, secret string) error {
	return os.WriteFile(name, []byte(secret+"\n"), 0o600)
}

func wrap(err *error) {
	if *err != nil {
		*err = fmt.Errorf("local postgres: %w", *err)
	}
}
