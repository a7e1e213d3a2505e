package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/keyfile"
	"github.com/cedarpost/cedarpost/server"
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
		if maskKey, err = server.ReadMaskKey(f.MaskKeyFile); err != nil {
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
	return store.Config{DatabaseURL: url, ReadURLs: standbys, Server: name, Event: server.ChangeEvents(name)}
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
	if bad, ok := errors.AsType[*server.ConfigError](err); ok && errors.Is(err, syscall.EADDRINUSE) {
		addr := map[string]string{"Listen": f.Listen, "AdminListen": f.AdminListen, "OpsListen": f.OpsListen}[bad.Field]
		return about(configFlags[bad.Field], fmt.Errorf("%s is in use by another process\ngive another address (port 0 takes a free one)", addr))
	}
	return aboutField(err)
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
