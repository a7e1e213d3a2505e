package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/keyfile"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/store"
)

// listenFlags are the settings that serve and dev share.
type listenFlags struct {
	Listen         string  `help:"Address of the decision plane (default ${default}). Port 0 takes a free one." env:"CEDARPOST_LISTEN" default:"127.0.0.1:8080" placeholder:"ADDR" group:"server"`
	AdminListen    string  `help:"Address of the admin plane (default ${default})." env:"CEDARPOST_ADMIN_LISTEN" default:"127.0.0.1:8081" placeholder:"ADDR" group:"server"`
	OpsListen      string  `help:"Address of the operations plane, with health (default ${default})." env:"CEDARPOST_OPS_LISTEN" default:"127.0.0.1:9090" placeholder:"ADDR" group:"server"`
	AllowPlaintext bool    `help:"Serve other machines without TLS, when something else encrypts." env:"CEDARPOST_ALLOW_PLAINTEXT" group:"server"`
	MaxStaleness   span    `help:"Refuse to decide when policies or data may be older than this, at least 100ms (default ${default})." env:"CEDARPOST_MAX_STALENESS" default:"5s" placeholder:"DURATION" group:"server"`
	MaxReuse       span    `help:"How long callers that watch what changes may keep an answer and use it again; 0 is not at all (default ${default})." env:"CEDARPOST_MAX_REUSE" default:"5m" placeholder:"DURATION" group:"server"`
	CacheMiB       int64   `name:"cache-mib" help:"Memory for entities, about, in MiB; 0 is no cache (default ${default})." env:"CEDARPOST_CACHE_MIB" default:"64" placeholder:"N" group:"server"`
	RecordMode     string  `help:"When decisions are answered: strict, after they are in the log, or buffered, before (default ${default})." env:"CEDARPOST_RECORD_MODE" enum:"strict,buffered" default:"strict" placeholder:"MODE" group:"server"`
	Retention      span    `name:"decision-retention" help:"Drop a day of the decision log so long after its end; 0 is never (default ${default})." env:"CEDARPOST_DECISION_RETENTION" default:"90d" placeholder:"DURATION" group:"server"`
	KeepHistory    span    `name:"history-retention" help:"How long earlier states of entities can be read: at least 48h, 0 is for ever (default ${default}). What a recorded decision was made on is kept as long as its record." env:"CEDARPOST_HISTORY_RETENTION" default:"90d" placeholder:"DURATION" group:"server"`
	RateLimit      float64 `help:"Checks a second that one caller may ask; 0 is no limit (default ${default})." env:"CEDARPOST_RATE_LIMIT" default:"0" placeholder:"N" group:"server"`
	MaskKeyFile    string  `help:"File with the key of the hashes that stand in decision records for sensitive values: 32 random bytes in hexadecimal or base64, the same on every server." env:"CEDARPOST_MASK_KEY_FILE" type:"path" placeholder:"FILE" group:"server"`
	Name           *string `help:"Name of this server in decision records: one line of at most 255 bytes (default: the name of the host)." env:"CEDARPOST_NAME" placeholder:"NAME" group:"server"`
	LogFormat      string  `help:"Log lines as text or json, on stderr (default ${default})." env:"CEDARPOST_LOG_FORMAT" enum:"text,json" default:"text" placeholder:"FORMAT" group:"server"`
	LogLevel       string  `help:"Log debug, info, warn or error and above (default ${default})." env:"CEDARPOST_LOG_LEVEL" enum:"debug,info,warn,error" default:"${loglevel}" placeholder:"LEVEL" group:"server"`
}

// minStaleness is more than a server takes to ask its database what is new.
const minStaleness = span(100 * time.Millisecond)

// Validate refuses what the server would silently take for its default.
func (f *listenFlags) Validate() error {
	if f.MaxStaleness < minStaleness {
		return fmt.Errorf("--max-staleness must be at least %v", time.Duration(minStaleness))
	}
	if f.CacheMiB < 0 {
		return errors.New("--cache-mib must not be negative")
	}
	if keep := time.Duration(f.KeepHistory); keep != 0 && keep < store.MinKeep {
		return fmt.Errorf("--history-retention must be %.0fh or more, for the newest decisions may need so much, or 0", store.MinKeep.Hours())
	}
	if f.RateLimit < 0 {
		return errors.New("--rate-limit must not be negative")
	}
	if err := server.CheckName(f.name()); err != nil {
		return fmt.Errorf("--name: %w", err)
	}
	return nil
}

// name is that of the server in records.
func (f *listenFlags) name() string {
	if f.Name != nil {
		return *f.Name
	}
	host, _ := os.Hostname()
	return host
}

func (f *listenFlags) config(db *store.DB, log *slog.Logger) (_ server.Config, err error) {
	var maskKey []byte
	if f.MaskKeyFile != "" {
		if maskKey, err = decisionlog.ReadMaskKey(f.MaskKeyFile); err != nil {
			return server.Config{}, about("mask-key-file", err)
		}
	}
	return server.Config{
		DB: db, MaskKey: maskKey, Listen: f.Listen, AdminListen: f.AdminListen, OpsListen: f.OpsListen,
		AllowPlaintext: f.AllowPlaintext, MaxStaleness: time.Duration(f.MaxStaleness), MaxReuse: neverAtZero(f.MaxReuse), CacheBytes: cacheBytes(f.CacheMiB),
		Record: auditlog.Mode(f.RecordMode), DecisionRetention: neverAtZero(f.Retention), HistoryRetention: neverAtZero(f.KeepHistory),
		RateLimit: f.RateLimit, Name: f.name(), Log: log,
	}, nil
}

// store is how to open the database. All writes go into the log under the server's
// name.
func (f *listenFlags) store(url string, standbys []string) store.Config {
	name := f.name()
	return store.Config{DatabaseURL: url, ReadURLs: standbys, Server: name, Event: decisionlog.ChangeEvents(name)}
}

func (f *listenFlags) logger(w io.Writer) *slog.Logger { return newLogger(w, f.LogFormat, f.LogLevel) }

func newLogger(w io.Writer, format, level string) *slog.Logger {
	var l slog.Level
	_ = l.UnmarshalText([]byte(level)) // one of the flag's values
	options := &slog.HandlerOptions{Level: l}
	if format == "json" {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

// explain names the flag to change when the server cannot listen at an address.
func (f *listenFlags) explain(err error) error {
	if bad, ok := errors.AsType[*decisionlog.ConfigError](err); ok && errors.Is(err, syscall.EADDRINUSE) {
		addr := map[string]string{"Listen": f.Listen, "AdminListen": f.AdminListen, "OpsListen": f.OpsListen}[bad.Field]
		return about(configFlags[bad.Field], fmt.Errorf("%s is in use by another process\ngive another address (port 0 takes a free one)", addr))
	}
	return aboutField(err)
}

const databaseURLEnv = "CEDARPOST_DATABASE_URL"

// databaseFlags say which database to use.
type databaseFlags struct {
	DatabaseURL     string `name:"database-url" help:"Postgres URL. Other users of this machine can read it in the list of processes; the environment and a file they cannot." env:"CEDARPOST_DATABASE_URL" placeholder:"URL" group:"server"`
	DatabaseURLFile string `name:"database-url-file" help:"File with the Postgres URL." env:"CEDARPOST_DATABASE_URL_FILE" type:"path" placeholder:"FILE" group:"server"`
}

// url is the database's URL, "" if none was given.
func (f *databaseFlags) url(k *kong.Context) (string, error) {
	useFile := f.DatabaseURLFile != ""
	if useFile && f.DatabaseURL != "" {
		useFile = onCommandLine(k, "database-url-file")
		if useFile == onCommandLine(k, "database-url") {
			return "", misuse("both --database-url and --database-url-file are given; give one")
		}
	}
	if !useFile {
		return f.DatabaseURL, nil
	}
	url, err := readSecret(f.DatabaseURLFile)
	if err != nil {
		return "", about("database-url-file", err)
	}
	return url, nil
}

// required is url, and wrong usage if there is none.
func (f *databaseFlags) required(k *kong.Context) (string, error) {
	url, err := f.url(k)
	if err == nil && url == "" {
		err = misuse("no database: set %s, or give --database-url or --database-url-file", databaseURLEnv)
	}
	return url, err
}

// readFlags say which standbys to read from.
type readFlags struct {
	ReadDatabaseURLs     []string `name:"read-database-urls" help:"Postgres URLs of standbys, with a space in between, to read entities from. One that is behind or does not answer is passed over." env:"CEDARPOST_READ_DATABASE_URLS" sep:" " placeholder:"URL" group:"server"`
	ReadDatabaseURLsFile string   `name:"read-database-urls-file" help:"File with those URLs, one on each line." env:"CEDARPOST_READ_DATABASE_URLS_FILE" type:"path" placeholder:"FILE" group:"server"`
}

func (f *readFlags) urls() ([]string, error) {
	urls := f.ReadDatabaseURLs
	if f.ReadDatabaseURLsFile != "" {
		if len(urls) > 0 {
			return nil, misuse("both --read-database-urls and --read-database-urls-file are given; give one")
		}
		text, err := keyfile.Read(f.ReadDatabaseURLsFile)
		if err != nil {
			return nil, about("read-database-urls-file", err)
		}
		urls = strings.Split(string(text), "\n")
	}
	return slices.DeleteFunc(slices.Clone(urls), func(u string) bool { return strings.TrimSpace(u) == "" }), nil
}

type serveCmd struct {
	databaseFlags
	readFlags
	listenFlags         `set:"loglevel=info"`
	TLSCert             string   `name:"tls-cert" help:"PEM file with the certificate of the decision and admin planes. Read again when it changes." env:"CEDARPOST_TLS_CERT" type:"path" placeholder:"FILE" group:"server" and:"tls"`
	TLSKey              string   `name:"tls-key" help:"PEM file with the certificate's key." env:"CEDARPOST_TLS_KEY" type:"path" placeholder:"FILE" group:"server" and:"tls"`
	AuditKeyFile        []string `help:"Private key that signs checkpoints of the log, made by audit keygen; needs --audit-checkpoint-file. While keys rotate, several with a space in between: the new one first." env:"CEDARPOST_AUDIT_KEY_FILE" sep:" " placeholder:"FILE" group:"server"`
	AuditCheckpointFile string   `help:"File that gets every checkpoint, outside of the database. Nothing that contradicts it is signed. It must be writable at the start." env:"CEDARPOST_AUDIT_CHECKPOINT_FILE" type:"path" placeholder:"FILE" group:"server"`
	BootstrapKeyFile    string   `help:"Make the first API key of a database that has none, and write it to this file (mode 0600)." env:"CEDARPOST_BOOTSTRAP_KEY_FILE" type:"path" placeholder:"FILE" group:"server"`
	Migrate             bool     `help:"Bring the database up to date first; needs --development-database." env:"CEDARPOST_MIGRATE" group:"server"`
	Development         bool     `name:"development-database" help:"Serve although the database can lose what was committed, or the login can rewrite the log." env:"CEDARPOST_DEVELOPMENT_DATABASE" group:"server"`
}

// Help is the long help of serve.
func (*serveCmd) Help() string {
	return `When the listeners are open, one line goes to stdout:

  ready decision=URL admin=URL ops=URL

SIGTERM and Ctrl-C stop the server after the calls in flight; a second one stops it at once. On SIGHUP the server reads the TLS certificate and its key at once, and logs the outcome; without SIGHUP it takes up changes of them within ten seconds. Everything else is read only at the start.

Files with keys and other secrets are refused if users other than their owner and group have any rights to them.`
}

// Run serves until ctx ends.
func (s *serveCmd) Run(ctx context.Context, k *kong.Context, c *console) error {
	url, err := s.required(k)
	if err != nil {
		return err
	}
	if s.Migrate && !s.Development {
		return misuse("--migrate needs --development-database: a login that can migrate can rewrite the log; run cedarpost migrate with a login of its own")
	}
	if len(s.AuditKeyFile) > 0 && s.AuditCheckpointFile == "" {
		return misuse("--audit-key-file needs --audit-checkpoint-file: without that file, an earlier state of the database could be signed as if nothing were lost")
	}
	log := s.logger(c.err)
	reload := make(chan os.Signal, 1) // from here on SIGHUP does not end the process
	signal.Notify(reload, syscall.SIGHUP)
	defer signal.Stop(reload)
	if s.Migrate {
		if err := store.Migrate(ctx, url, log); err != nil {
			return err
		}
	}
	standbys, err := s.urls()
	if err != nil {
		return err
	}
	db, err := store.Open(ctx, s.store(url, standbys))
	if err != nil {
		return err
	}
	defer db.Close()
	if !s.Development {
		err := db.CheckProduction(ctx)
		if errors.Is(err, store.ErrUnsafe) {
			err = fmt.Errorf("%w\nor give --development-database, if it is one", err)
		}
		if err != nil {
			return err
		}
	}
	if s.BootstrapKeyFile != "" {
		made, err := access.BootstrapKey(ctx, db, s.BootstrapKeyFile, false)
		if err != nil {
			return about("bootstrap-key-file", err)
		}
		if made {
			log.Info("first API key made", "file", s.BootstrapKeyFile)
		}
	}
	config, err := s.config(db, log)
	if err != nil {
		return err
	}
	config.TLSCert, config.TLSKey = s.TLSCert, s.TLSKey
	config.Signing = decisionlog.Signing{KeyFiles: s.AuditKeyFile, CheckpointFile: s.AuditCheckpointFile}
	srv, err := server.New(ctx, config)
	if err != nil {
		return s.explain(err)
	}
	fmt.Fprintf(c.out, "ready %s\n", planeURLs(srv, s.TLSCert != ""))
	running, stop := context.WithCancel(ctx)
	defer stop()
	go func() {
		for {
			select {
			case <-running.Done():
				return
			case <-reload:
				srv.Reload()
			}
		}
	}()
	return srv.Run(ctx)
}

func planeURLs(srv *server.Server, tls bool) string {
	return fmt.Sprintf("decision=%s admin=%s ops=%s",
		planeURL(srv, "decision", tls), planeURL(srv, "admin", tls), planeURL(srv, "ops", false))
}

// planeURL is where a client on this machine finds a plane.
func planeURL(srv *server.Server, plane string, tls bool) string {
	scheme := "http://"
	if tls {
		scheme = "https://"
	}
	addr := srv.Addr(plane)
	if host, port, err := net.SplitHostPort(addr); err == nil && net.ParseIP(host).IsUnspecified() {
		addr = net.JoinHostPort("127.0.0.1", port)
	}
	return scheme + addr
}

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
	renewed, err := store.ClaimDatabase(ctx, url, name, m.Restored, decisionlog.DatabaseEvents(name))
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

// neverAtZero converts a flag for which 0 means never. In the server's configuration 0
// means the default, and a negative duration means never.
func neverAtZero(s span) time.Duration {
	if s == 0 {
		return -1
	}
	return time.Duration(s)
}

// cacheBytes turns MiB into what the server takes: there, 0 is the default and
// less than 0 no cache.
func cacheBytes(mib int64) int64 {
	if mib == 0 {
		return -1
	}
	return mib << 20
}
