//go:build unix

// Package localpg runs a private Postgres from the binaries that are installed on the
// machine. It exists so that `cedarpost dev` and every test have a real database, without
// any setup and without a server that keeps running.
//
// A server lives in a folder:
//
//	DIR/lock               held (flock) while the server is in use
//	DIR/postgres.password  of the superuser, readable only by the owner
//	DIR/postgres.log       what the server says
//	DIR/postgres/          the cluster; a symbolic link in the case below
//
// It listens on 127.0.0.1 only, with a random password (SCRAM). Postgres refuses to run
// as root, so root runs it as the user postgres if there is one, and otherwise as nobody.
// If that user cannot reach DIR, because a folder above it is closed, the cluster is in
// /var/lib/cedarpost instead, and DIR/postgres is a link to it: remove both together.
//
// The server stops when its parent process ends. On Linux it stops even if the parent is
// killed. On other systems the next Start on the folder stops the orphan first.
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

// The errors of Start that callers may want to distinguish.
var (
	// ErrInUse: another process, or another Server, uses the folder.
	ErrInUse = errors.New("folder is in use by another server")
	// ErrPortBusy: another program listens on the port.
	ErrPortBusy = errors.New("port is in use")
	// ErrNoPostgres: there are no binaries. The error says how to install them.
	ErrNoPostgres = errors.New("no Postgres server is installed")
)

// role is the name of the superuser and of the database.
const role = "cedarpost"

// Config says where and how to run a server.
type Config struct {
	// Dir is the folder. It is made if it is missing.
	Dir string
	// Port is the port to listen on. 0 takes a free one.
	Port int
	// Durable makes commits survive a crash of the machine, as in production. False is
	// faster, for tests: then commits survive a crash of the server only, and a connection
	// hashes the password once (see [Secret]).
	Durable bool
	// MaxConnections is the limit of the server. 0 means 100.
	MaxConnections int
}

// Server is a Postgres server, running or stopped. Only Done and URL are safe for
// concurrent use.
type Server struct {
	config   Config
	bin      string              // folder of the binaries
	owner    *syscall.Credential // nil: run as the user of this process
	cluster  string              // folder of the cluster, which belongs to owner; the data are in data/
	password string
	lock     *os.File
	process  *process
}

// Start starts the server of a folder and waits until it answers. It initializes a new
// folder, recovers the data after a crash, and first stops a server whose parent was
// killed. If ctx ends before the server answers, the server is stopped. Later ctx has no
// effect.
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
	if s.owner, err = StepDown(); err != nil {
		return nil, err
	}
	return s, s.start(ctx)
}

// Restart starts the server again after Stop or Kill, at the same URL.
func (s *Server) Restart(ctx context.Context) (err error) {
	defer wrap(&err)
	return s.start(ctx)
}

// URL is the URL of the database cedarpost, for the superuser cedarpost.
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

// LogFile is the file that the server writes its log to.
func (s *Server) LogFile() string { return filepath.Join(s.config.Dir, "postgres.log") }

// ClusterDir is the folder of the cluster, which may be outside of Dir.
func (s *Server) ClusterDir() string { return s.cluster }

// Done is closed when the server has exited, for whatever reason.
func (s *Server) Done() <-chan struct{} { return s.process.done }

// Stop ends the open sessions, shuts the server down, and waits until everything is on
// disk. It does nothing if the server is stopped.
func (s *Server) Stop() (err error) {
	defer wrap(&err)
	defer s.unlock()
	return s.process.stop(syscall.SIGINT, time.Minute)
}

// Kill ends the server like kill -9 of all its processes: it writes nothing more, its
// clients get no message, and the next start has to recover. It returns when the last
// process has ended, because the data cannot be used before that.
func (s *Server) Kill() (err error) {
	defer wrap(&err)
	defer s.unlock()
	return s.process.kill(time.Minute)
}

func (s *Server) start(ctx context.Context) (err error) {
	// The user that Postgres runs as must be able to pass through it. What is in it is
	// closed.
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

// initialize makes the cluster, unless there is one. It makes it under another name
// first, so that a part of one is never taken for a whole one.
func (s *Server) initialize(ctx context.Context) error {
	passwordFile := filepath.Join(s.config.Dir, "postgres.password")
	password, err := os.ReadFile(passwordFile)
	s.password = strings.TrimSpace(string(password))
	if _, statErr := os.Stat(s.data()); statErr == nil {
		return err // without its password the cluster cannot be used
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
	pwfile := filepath.Join(s.cluster, "pwfile") // a copy that the user of Postgres can read
	defer os.Remove(pwfile)
	secret := s.password
	if !s.config.Durable {
		var err error
		if secret, err = Secret(s.password); err != nil {
			return err
		}
	}
	if err := errors.Join(writeFile(pwfile, secret), s.chown(pwfile)); err != nil {
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

// run starts the process and waits until it accepts connections.
func (s *Server) run(ctx context.Context) error {
	free := s.config.Port == 0
	for attempt := 0; ; attempt++ {
		port, err := takePort(s.config.Port)
		if err != nil {
			return err
		}
		s.config.Port = port
		err = s.runOnce(ctx)
		// Another program may have taken the free port in between.
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
	// Without the end of ctx, which is the context of the start only.
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

// createDatabase makes the database, unless it exists. A standby has that of its primary,
// and could not make one.
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

// InUse reports whether a process runs a server of the folder, or cannot tell.
func InUse(dir string) bool {
	s := Server{config: Config{Dir: dir}}
	err := s.takeLock()
	s.unlock()
	return err != nil
}

func (s *Server) takeLock() error {
	if s.lock != nil {
		return ErrInUse // by this Server itself
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

// takePort returns the port, or a free one for 0. A free one is below the ports that the
// system assigns. Otherwise another program could be assigned the port while the server
// is down, and the server could not start again at its URL.
func takePort(port int) (int, error) {
	for range 100 {
		if port != 0 {
			break
		}
		// Systems assign ports from 32,768 on.
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

// tail returns the last lines of a log after an offset.
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
