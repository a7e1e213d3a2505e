package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/alecthomas/kong"

	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/store"
)

type serveCmd struct {
	databaseFlags
	readFlags
	listenFlags `set:"loglevel=info"`
	tlsFlags
	agentFlags
	AuditKeyFile        []string `help:"Private key that signs checkpoints of the log, made by audit keygen; needs --audit-checkpoint-file. While keys rotate, several keys separated by spaces, the new one first." env:"CEDARPOST_AUDIT_KEY_FILE" sep:" " placeholder:"FILE" group:"server"`
	AuditCheckpointFile string   `help:"File outside of the database to which the server appends every checkpoint. The server signs nothing that contradicts it. It must be writable at the start." env:"CEDARPOST_AUDIT_CHECKPOINT_FILE" type:"path" placeholder:"FILE" group:"server"`
	IssuersFile         string   `help:"YAML file with the OpenID Connect issuers whose access tokens callers may send. It is read again when it changes." env:"CEDARPOST_ISSUERS_FILE" type:"path" placeholder:"FILE" group:"server"`
	BootstrapKeyFile    string   `help:"If the database has no API key, make the first one, and write it to this file (mode 0600). Leave it out, and remove the file, when other operators have keys." env:"CEDARPOST_BOOTSTRAP_KEY_FILE" type:"path" placeholder:"FILE" group:"server"`
	DrainDelay          span     `help:"How long a server that is told to stop keeps serving while it is not ready, so that load balancers and clients go elsewhere first; longer than they need to notice (default ${default})." env:"CEDARPOST_DRAIN_DELAY" default:"5s" placeholder:"DURATION" group:"server"`
	Migrate             bool     `help:"Migrate the database first; needs --development-database." env:"CEDARPOST_MIGRATE" group:"server"`
	Development         bool     `name:"development-database" help:"Serve even if the database can lose committed data, or the login can rewrite the log." env:"CEDARPOST_DEVELOPMENT_DATABASE" group:"server"`
}

// maxDrainDelay is longer than any load balancer takes to notice that a server is not ready.
const maxDrainDelay = span(10 * time.Minute)

// Help is the long help of serve.
func (*serveCmd) Help() string {
	return `When the listeners are open, one line goes to stdout:

  ready decision=URL admin=URL ops=URL

SIGTERM and Ctrl-C stop the server: for --drain-delay it is not ready and serves on, so that load balancers and clients go elsewhere. Then it accepts no connections, finishes the calls in flight for up to 10 s, and writes what it has to record. A second signal ends it at once. On SIGHUP the server reads the TLS certificate, its key and the CAs of clients, the mask key and the audit keys at once, and logs the outcome. Without SIGHUP it uses changed files within ten seconds. The file of the database URL is read for each new connection, and the file of the issuers when it changes. Everything else is read only at the start.

Files with keys and other secrets are refused if users other than their owner and group have any rights to them.

` + telemetryHelp
}

// Run serves until ctx ends.
func (s *serveCmd) Run(ctx context.Context, k *kong.Context, c *console) error {
	telemetry, err := s.observe(ctx, c.err)
	if err != nil {
		return err
	}
	defer telemetry.Close()
	log := telemetry.log
	url, err := s.live(k, log)
	if err != nil {
		return err
	}
	for _, r := range s.refusals(k) {
		return misuse("%w", r.err)
	}
	if where := s.passwordOutsideOfFile(k); where != "" {
		log.Warn("a password of the database is in " + where + ", where it is easily seen: give the URL with --database-url-file, a file that is read again when it changes")
	}
	standbys, err := s.urls(log)
	if err != nil {
		return err
	}
	if err := s.checkTransport(s.urlsFlag(), standbys...); err != nil {
		return err
	}
	reload := make(chan os.Signal, 1) // from here on SIGHUP does not end the process
	signal.Notify(reload, syscall.SIGHUP)
	defer signal.Stop(reload)
	if s.Migrate {
		if err := store.Migrate(ctx, url.Reveal(), log); err != nil {
			return err
		}
	}
	db, err := telemetry.open(ctx, s.store(url, standbys))
	if err != nil {
		return err
	}
	defer db.Close()
	tuneMemory(log)
	if !s.Development {
		err := db.CheckProduction(ctx)
		if errors.Is(err, store.ErrUnsafe) {
			err = fmt.Errorf("%w\nor give --development-database, if it is one", err)
		}
		if err != nil {
			return err
		}
	}
	exposed, err := db.Exposed(ctx)
	if err != nil {
		return err
	}
	if len(exposed) > 0 {
		log.Warn("other logins of the database cluster can disturb this service; cedarpost migrate --print-roles has the statements that end it",
			"found", strings.Join(exposed, "; "))
	}
	if err := s.firstKey(ctx, db, log); err != nil {
		return err
	}
	config, err := s.config(db, log)
	if err != nil {
		return err
	}
	telemetry.configure(&config)
	s.configureTLS(&config)
	config.Signing, config.SecretFiles, config.Start, config.DrainDelay = s.signing(), s.secretFiles(), startOf(k), time.Duration(s.DrainDelay)
	if s.IssuersFile != "" {
		config.Tokens, err = access.OpenTokens(s.IssuersFile, access.TokensConfig{CheckGrant: access.CheckTokenGrant, Log: log})
		if err != nil {
			return about("issuers-file", err)
		}
		defer config.Tokens.Close()
	}
	srv, err := server.New(ctx, config)
	if err != nil {
		return s.explain(err)
	}
	telemetry.SendMetrics(srv.Gatherer())
	fmt.Fprintf(c.out, "ready %s\n", planeURLs(srv, s.TLSCert != ""))
	running, stop := context.WithCancel(ctx)
	defer stop()
	if config.Tokens != nil {
		go config.Tokens.Follow(running, s.IssuersFile)
	}
	go func() {
		for {
			select {
			case <-running.Done():
				return
			case <-reload:
				srv.Reload()
				srv.ReloadSecrets()
			}
		}
	}()
	return srv.Run(ctx)
}

// firstKey makes the first API key, if it is wanted. A file whose key was revoked prevents the start
// only if nobody could sign in.
func (s *serveCmd) firstKey(ctx context.Context, db *store.DB, log *slog.Logger) error {
	var revoked error
	if file := s.BootstrapKeyFile; file != "" {
		made, err := access.BootstrapKey(ctx, db, file, false)
		_, missing := os.Lstat(file)
		switch {
		case errors.Is(err, access.ErrKeyRevoked):
			revoked = about("bootstrap-key-file", err)
		case err != nil:
			return about("bootstrap-key-file", err)
		case made:
			log.Info("first API key made", "file", file)
		case errors.Is(missing, fs.ErrNotExist):
			log.Info("--bootstrap-key-file makes no key, because the database has API keys already", "file", file)
		}
	}
	var now store.Access
	if err := db.View(ctx, func(v *store.View) (err error) {
		now, err = v.Access(ctx)
		return err
	}); err != nil {
		return err
	}
	if access.NeedlessBootstrap(now.Keys, now.Grants, time.Now()) {
		log.Warn("the key of bootstrap, which has all roles, still lives although another operator has a key: cedarpost keys revoke bootstrap --grants ends it")
	}
	keys := now.Keys
	switch can := s.someoneCanSignIn(keys); {
	case revoked != nil && !can:
		return fmt.Errorf("%w\nno other key is left: cedarpost keys recover makes one", revoked)
	case revoked != nil:
		log.Warn("the key in the file of --bootstrap-key-file was revoked: remove the file, and leave the setting out", "file", s.BootstrapKeyFile)
	case !can:
		log.Warn("nobody can sign in, because the database has no API key that is valid: " + s.mendNoKey(len(keys)))
	}
	return nil
}

// someoneCanSignIn reports whether one of the keys has not ended, or callers need none.
func (s *serveCmd) someoneCanSignIn(keys []store.Key) bool {
	now := time.Now()
	return s.IssuersFile != "" || s.ClientCA != "" || slices.ContainsFunc(keys, func(k store.Key) bool { return k.Live(now) })
}

// mendNoKey says what to do if no key of an operator is left among so many keys. serve makes a key
// only if there is none.
func (s *serveCmd) mendNoKey(keys int) string {
	switch {
	case keys > 0:
		return "cedarpost keys recover makes a key of an operator"
	case s.BootstrapKeyFile != "":
		return "start serve, which makes the first key and writes it to " + s.BootstrapKeyFile
	}
	return "start serve with --bootstrap-key-file FILE, which makes the first key"
}

// refusal is a reason why serve does not start.
type refusal struct {
	setting string
	err     error
	mend    string
}

// refusals returns the combinations of settings that are not safe. docs/deployment.md lists them.
func (s *serveCmd) refusals(k *kong.Context) (list []refusal) {
	refuse := func(setting, mend, format string, args ...any) {
		list = append(list, refusal{setting, fmt.Errorf(format, args...), mend})
	}
	if s.passwordOutsideOfFile(k) == "--database-url" && !s.Development {
		refuse("database-url", "give the URL with --database-url-file", "%w", about("database-url", errPasswordInArguments))
	}
	if s.Migrate && !s.Development {
		refuse("migrate", "run cedarpost migrate with a login of its own",
			"--migrate needs --development-database, because a login that can migrate can rewrite the log; run cedarpost migrate with a login of its own")
	}
	if len(s.AuditKeyFile)+len(s.AuditAgentKey) > 0 && s.AuditCheckpointFile == "" {
		refuse("audit-checkpoint-file", "name a file on another disk than the database's",
			"--audit-key-file and --audit-agent-key need --audit-checkpoint-file: without that file, an earlier state of the database could be signed although batches are lost")
	}
	if s.DrainDelay > maxDrainDelay {
		refuse("drain-delay", "give a few seconds more than the load balancer takes to notice", "--drain-delay must be at most %v", maxDrainDelay)
	}
	if s.Pprof && !onLoopback(s.OpsListen) {
		refuse("pprof", "serve the operations plane on a loopback address", "--pprof: profiles have no protection of their own, and --ops-listen %s is open to other machines", s.OpsListen)
	}
	if err := server.CheckOrigins(s.CORSOrigin); err != nil {
		refuse("cors-origin", "list each origin", "%w", about("cors-origin", err))
	}
	for _, plane := range [][2]string{{"listen", s.Listen}, {"admin-listen", s.AdminListen}} {
		if _, _, err := net.SplitHostPort(plane[1]); err == nil && s.TLSCert == "" && !s.AllowPlaintext && !onLoopback(plane[1]) {
			refuse(plane[0], "give --tls-cert and --tls-key",
				"--%s: %s is open to other machines: give --tls-cert and --tls-key, or --allow-plaintext when something else encrypts", plane[0], plane[1])
		}
	}
	return list
}

// signing returns how the log is signed.
func (s *serveCmd) signing() decisionlog.Signing {
	return decisionlog.Signing{KeyFiles: s.AuditKeyFile, Agent: s.AuditAgent, AgentKeys: s.AuditAgentKey, CheckpointFile: s.AuditCheckpointFile}
}

// secretFiles lists the files with secrets and certificates that settings name.
func (s *serveCmd) secretFiles() (list []server.SecretFile) {
	add := func(setting string, files ...string) {
		for _, file := range files {
			if file != "" {
				list = append(list, server.SecretFile{Setting: setting, Path: file})
			}
		}
	}
	add("database-url-file", s.DatabaseURLFile)
	add("read-database-urls-file", s.ReadDatabaseURLsFile)
	add("tls-cert", s.TLSCert)
	add("tls-key", s.TLSKey)
	add("client-ca", s.ClientCA)
	add("audit-key-file", s.AuditKeyFile...)
	add("mask-key-file", s.MaskKeyFile)
	return list
}

func planeURLs(srv *server.Server, tls bool) string {
	urls := fmt.Sprintf("decision=%s admin=%s", planeURL(srv, "decision", tls), planeURL(srv, "admin", tls))
	if srv.Addr("ops") != "" {
		urls += " ops=" + planeURL(srv, "ops", false)
	}
	return urls
}

// planeURL returns the URL of a plane for clients on this machine.
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
