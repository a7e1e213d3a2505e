package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/keyfile"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/store"
)

// listenFlags are the settings that serve and dev share.
type listenFlags struct {
	Listen         string   `help:"Address of the decision plane (default ${default}). Port 0 means any free port." env:"CEDARPOST_LISTEN" default:"127.0.0.1:8080" placeholder:"ADDR" group:"server"`
	AdminListen    string   `help:"Address of the admin plane (default ${default})." env:"CEDARPOST_ADMIN_LISTEN" default:"127.0.0.1:8081" placeholder:"ADDR" group:"server"`
	OpsListen      string   `help:"Address of the operations plane, with health (default ${default})." env:"CEDARPOST_OPS_LISTEN" default:"127.0.0.1:9090" placeholder:"ADDR" group:"server"`
	Metrics        bool     `help:"Serve /metrics on the operations plane (default: yes)." env:"CEDARPOST_METRICS" default:"true" negatable:"" group:"server"`
	Health         bool     `help:"Serve /livez, /readyz and /startupz on the operations plane (default: yes)." env:"CEDARPOST_HEALTH" default:"true" negatable:"" group:"server"`
	Debug          bool     `help:"Serve what support-bundle asks for (/debug/start, /debug/errors, /debug/goroutines) on the operations plane, if it is on a loopback address (default: yes)." env:"CEDARPOST_DEBUG" default:"true" negatable:"" group:"server"`
	Pprof          bool     `help:"Serve profiles (/debug/pprof/) on the operations plane, which then must be on a loopback address." env:"CEDARPOST_PPROF" group:"server"`
	CORSOrigin     []string `name:"cors-origin" help:"Origin whose pages may call the decision and admin planes from a browser, such as https://console.example.org; several separated by spaces (default: none)." env:"CEDARPOST_CORS_ORIGIN" sep:" " placeholder:"ORIGIN" group:"server"`
	AllowPlaintext bool     `help:"Serve other machines without TLS, because something else encrypts." env:"CEDARPOST_ALLOW_PLAINTEXT" group:"server"`
	PlainTelemetry bool     `name:"allow-plaintext-telemetry" help:"Send traces, metrics and log lines to a collector on another machine without TLS, because something else encrypts." env:"CEDARPOST_ALLOW_PLAINTEXT_TELEMETRY" group:"server"`
	MaxStaleness   span     `help:"Refuse to decide if policies or data may be older than this; at least 100ms (default ${default})." env:"CEDARPOST_MAX_STALENESS" default:"5s" placeholder:"DURATION" group:"server"`
	MaxReuse       span     `help:"How long a caller that watches for changes may keep an answer and use it again; 0 means never (default ${default})." env:"CEDARPOST_MAX_REUSE" default:"5m" placeholder:"DURATION" group:"server"`
	CacheMiB       int64    `name:"cache-mib" help:"Approximate memory of the entity cache, in MiB; 0 means no cache (default ${default})." env:"CEDARPOST_CACHE_MIB" default:"64" placeholder:"N" group:"server"`
	RecordMode     string   `help:"strict answers after the decision is in the log, buffered before that (default ${default})." env:"CEDARPOST_RECORD_MODE" enum:"strict,buffered" default:"strict" placeholder:"MODE" group:"server"`
	Retention      span     `name:"decision-retention" help:"Drop a day of the decision log this long after its end; 0 means never (default ${default})." env:"CEDARPOST_DECISION_RETENTION" default:"90d" placeholder:"DURATION" group:"server"`
	KeepHistory    span     `name:"history-retention" help:"How long earlier states of entities can be read; at least 48h, 0 means forever (default ${default}). States that a recorded decision used are kept as long as its record." env:"CEDARPOST_HISTORY_RETENTION" default:"90d" placeholder:"DURATION" group:"server"`
	RateLimit      float64  `help:"Checks per second that one caller may ask; 0 means no limit (default ${default}). After a pause a caller may ask as many at once, and at least 100. A grant can give a caller another number (grants put --rate)." env:"CEDARPOST_RATE_LIMIT" default:"10000" placeholder:"N" group:"server"`
	MaxDecisions   int      `help:"Decisions that are made at once; 0 means 128 for each processor (default ${default}). A caller that is alone may make seven eighths of them, and one of several callers an eighth; eight checks of a batch count as one. Above that, calls wait in a short queue." env:"CEDARPOST_MAX_DECISIONS" default:"0" placeholder:"N" group:"server"`
	Connections    int      `name:"max-connections" help:"Connections that each plane has at once (default ${default}). Above that, a new one gets the place of one that has had no call with an API key." env:"CEDARPOST_MAX_CONNECTIONS" default:"2048" placeholder:"N" group:"server"`
	PerAddress     int      `name:"max-connections-per-address" help:"Connections of each plane from one address: an IPv4 address or the /64 of an IPv6 address; 0 means half of all (default ${default})." env:"CEDARPOST_MAX_CONNECTIONS_PER_ADDRESS" default:"0" placeholder:"N" group:"server"`
	RequestMiB     int64    `name:"request-mib" help:"Bytes of messages that the calls of each plane hold at once, in MiB; at least 8. One caller may hold half (default ${default})." env:"CEDARPOST_REQUEST_MIB" default:"32" placeholder:"N" group:"server"`
	MaskKeyFile    string   `help:"File with the key of the hashes that replace sensitive values in decision records: 32 random bytes in hexadecimal or base64, the same on every server." env:"CEDARPOST_MASK_KEY_FILE" type:"path" placeholder:"FILE" group:"server"`
	MaxSecretAge   span     `help:"A metric and doctor name files with secrets and certificates that have not changed for this long; 0 means never (default ${default})." env:"CEDARPOST_MAX_SECRET_AGE" default:"365d" placeholder:"DURATION" group:"server"`
	Name           *string  `help:"Name of this server in decision records: one line of at most 255 bytes (default: the host name)." env:"CEDARPOST_NAME" placeholder:"NAME" group:"server"`
	LogFormat      string   `help:"Format of the log on stderr: text or json (default ${default})." env:"CEDARPOST_LOG_FORMAT" enum:"text,json" default:"text" placeholder:"FORMAT" group:"server"`
	LogLevel       string   `help:"Least level to log: debug, info, warn or error (default ${default})." env:"CEDARPOST_LOG_LEVEL" enum:"debug,info,warn,error" default:"${loglevel}" placeholder:"LEVEL" group:"server"`
}

// minStaleness is longer than a server takes to ask its database for changes.
const minStaleness = span(100 * time.Millisecond)

// Validate refuses values that the server would silently replace by its defaults.
func (f *listenFlags) Validate() error {
	if f.MaxStaleness < minStaleness {
		return fmt.Errorf("--max-staleness must be at least %v", time.Duration(minStaleness))
	}
	if f.CacheMiB < 0 {
		return errors.New("--cache-mib must not be negative")
	}
	if keep := time.Duration(f.KeepHistory); keep != 0 && keep < store.MinHistoryRetention {
		return fmt.Errorf("--history-retention must be 0, or %.0fh or more, because the newest decisions may need that much", store.MinHistoryRetention.Hours())
	}
	if f.RateLimit < 0 {
		return errors.New("--rate-limit must not be negative")
	}
	if f.MaxDecisions < 0 || f.MaxDecisions > 0 && f.MaxDecisions < 8 {
		return errors.New("--max-decisions must be at least 8, or 0 for the default")
	}
	if f.Connections < 1 || f.PerAddress < 0 {
		return errors.New("--max-connections must be at least 1, and --max-connections-per-address not negative")
	}
	if f.RequestMiB < 8 {
		return errors.New("--request-mib must be at least 8, because one caller may hold half, and a message may have 4 MiB")
	}
	if err := server.CheckName(f.name()); err != nil {
		return fmt.Errorf("--name: %w", err)
	}
	return nil
}

// name returns the name of the server in records.
func (f *listenFlags) name() string {
	if f.Name != nil {
		return *f.Name
	}
	host, _ := os.Hostname()
	return host
}

func (f *listenFlags) config(db *store.DB, log *slog.Logger) (server.Config, error) {
	var maskKey secret.Secret
	if f.MaskKeyFile != "" {
		read := func() (string, error) {
			key, err := decisionlog.ReadMaskKey(f.MaskKeyFile)
			return string(key), err
		}
		key, err := read()
		if err != nil {
			return server.Config{}, about("mask-key-file", err)
		}
		maskKey = liveFile("mask-key-file", log, key, read)
	}
	return server.Config{
		DB: db, MaskKey: maskKey, Listen: f.Listen, AdminListen: f.AdminListen, OpsListen: f.OpsListen,
		NoMetrics: !f.Metrics, NoHealth: !f.Health, NoDebug: !f.Debug, Pprof: f.Pprof, CORSOrigins: f.CORSOrigin,
		AllowPlaintext: f.AllowPlaintext, MaxStaleness: time.Duration(f.MaxStaleness), MaxReuse: neverAtZero(f.MaxReuse), CacheBytes: cacheBytes(f.CacheMiB),
		Record: auditlog.Mode(f.RecordMode), DecisionRetention: neverAtZero(f.Retention), HistoryRetention: neverAtZero(f.KeepHistory),
		RateLimit: f.RateLimit, MaxDecisions: f.MaxDecisions, MaxConnections: f.Connections, MaxConnectionsPerAddress: f.PerAddress, RequestBytes: f.RequestMiB << 20, MaxSecretAge: time.Duration(f.MaxSecretAge), Name: f.name(), Log: log,
	}, nil
}

// store returns how to open the database. Events in the log have the name of the server.
func (f *listenFlags) store(url secret.Secret, standbys []secret.Secret) store.Config {
	name := f.name()
	return store.Config{DatabaseURL: url, ReadURLs: standbys, Server: name, Event: decisionlog.ChangeEvents(name)}
}

func (f *listenFlags) logger(w io.Writer) *slog.Logger { return newLogger(w, f.LogFormat, f.LogLevel) }

func (f *listenFlags) level() slog.Level { return levelOf(f.LogLevel) }

func levelOf(level string) (l slog.Level) {
	_ = l.UnmarshalText([]byte(level)) // kong accepts only these levels
	return l
}

func newLogger(w io.Writer, format, level string) *slog.Logger {
	l := levelOf(level)
	options := &slog.HandlerOptions{Level: l}
	var h slog.Handler = slog.NewTextHandler(w, options)
	if format == "json" {
		h = slog.NewJSONHandler(w, options)
	}
	return slog.New(h)
}

// explain adds the flag to change if the server cannot listen at an address.
func (f *listenFlags) explain(err error) error {
	if bad, ok := errors.AsType[*decisionlog.ConfigError](err); ok && errors.Is(err, syscall.EADDRINUSE) {
		addr := map[string]string{"Listen": f.Listen, "AdminListen": f.AdminListen, "OpsListen": f.OpsListen}[bad.Field]
		return about(configFlags[bad.Field], fmt.Errorf("%s is in use by another process\ngive another address (port 0 takes a free one)", addr))
	}
	return aboutField(err)
}

// tryPorts returns an error if another process listens at an address of the server. It is for commands that
// do much before the server listens.
func (f *listenFlags) tryPorts(ctx context.Context) error {
	for _, p := range []struct{ field, address string }{{"Listen", f.Listen}, {"AdminListen", f.AdminListen}, {"OpsListen", f.OpsListen}} {
		l, err := new(net.ListenConfig).Listen(ctx, "tcp", p.address)
		if errors.Is(err, syscall.EADDRINUSE) {
			return f.explain(&decisionlog.ConfigError{Field: p.field, Err: err})
		}
		if err == nil { // the server explains another error
			_ = l.Close()
		}
	}
	return nil
}

// readFlags say which standby databases to read from.
type readFlags struct {
	ReadDatabaseURLs     []secret.Secret `name:"read-database-urls" help:"Postgres URLs of standbys to read entities from, separated by spaces. A standby that is behind or does not answer is skipped." env:"CEDARPOST_READ_DATABASE_URLS" sep:" " placeholder:"URL" group:"server"`
	ReadDatabaseURLsFile string          `name:"read-database-urls-file" help:"File with these URLs, one on each line." env:"CEDARPOST_READ_DATABASE_URLS_FILE" type:"path" placeholder:"FILE" group:"server"`
}

// urlsFlag returns the flag that the URLs are from.
func (f *readFlags) urlsFlag() string {
	if f.ReadDatabaseURLsFile != "" {
		return "read-database-urls-file"
	}
	return "read-database-urls"
}

// urls returns the URLs. Those of a file are read again for each new connection; a change of their
// number or order has no effect before the next start.
func (f *readFlags) urls(log *slog.Logger) (urls []secret.Secret, err error) {
	if f.ReadDatabaseURLsFile == "" {
		return slices.DeleteFunc(slices.Clone(f.ReadDatabaseURLs), func(u secret.Secret) bool { return strings.TrimSpace(u.Reveal()) == "" }), nil
	}
	if len(f.ReadDatabaseURLs) > 0 {
		return nil, misuse("both --read-database-urls and --read-database-urls-file are given; give one")
	}
	lines := func() ([]string, error) {
		text, err := keyfile.Read(f.ReadDatabaseURLsFile)
		return slices.DeleteFunc(strings.Split(string(text), "\n"), func(u string) bool { return strings.TrimSpace(u) == "" }), err
	}
	first, err := lines()
	if err != nil {
		return nil, about("read-database-urls-file", err)
	}
	for i, url := range first {
		urls = append(urls, liveFile("read-database-urls-file", log, url, func() (string, error) {
			now, err := lines()
			if err == nil && len(now) != len(first) {
				err = fmt.Errorf("it has %d URLs now, and had %d at the start: restart the server", len(now), len(first))
			}
			if err != nil {
				return "", err
			}
			return now[i], nil
		}))
	}
	return urls, nil
}

// neverAtZero converts a flag for which 0 means never. In the configuration of the server, 0 means
// the default, and a negative duration means never.
func neverAtZero(s span) time.Duration {
	if s == 0 {
		return -1
	}
	return time.Duration(s)
}

// cacheBytes converts MiB to bytes. In the configuration of the server, 0 means the default, and a
// negative number means no cache.
func cacheBytes(mib int64) int64 {
	if mib == 0 {
		return -1
	}
	return mib << 20
}
