package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/alecthomas/kong"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/internal/keyfile"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/policies"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/localpg"
)

// devMark is in the URL of the private Postgres. A dev that finds this URL in its environment,
// because the shell has read a dev.env, ignores it and starts its own Postgres.
const devMark = "application_name=cedarpost-dev"

type devCmd struct {
	Data        string   `help:"Folder for the database, the keys and dev.env (default ${default})." env:"CEDARPOST_DATA" type:"path" default:".cedarpost" placeholder:"DIR"`
	Dirs        []string `arg:"" optional:"" name:"dir" help:"Bundle folders to publish in place of the example." type:"path"`
	Watch       bool     `help:"Publish the folders again whenever a file in them changes."`
	Development bool     `name:"development-database" help:"Publish the folders to the database of --database-url, over what is there." env:"CEDARPOST_DEVELOPMENT_DATABASE"`
	Empty       bool     `help:"Do not load the example bundle." env:"CEDARPOST_EMPTY"`
	// Alone at a shell, nobody else could approve.
	Approvals bool `help:"Ask for the approvals that bundle.yaml names (default: no, bundles are published without)." env:"CEDARPOST_APPROVALS" negatable:""`
	databaseFlags
	listenFlags `set:"loglevel=warn"`

	watching sync.WaitGroup
}

// Help is the long help of dev.
func (*devCmd) Help() string {
	return `Starts a private Postgres in the data folder, or uses the one of --database-url, migrates it, and serves. If the database has no bundle, dev loads the example bundle and its entities. With folders, it publishes these instead, and imports the entities.json of a bundle that is new; with --watch it does so again for what you save, and shows what is wrong on stderr. An entity that you remove from entities.json stays stored. Publishing in this way needs no approvals, and may break callers that ask as before.

It then writes dev.env into the data folder, for other shells and programs,

  . .cedarpost/dev.env
  cedarpost authorize --principal Shop::User::bob --action Shop::Action::ViewOrder --resource Shop::Order::42 --context '{"mfa":false}' --fields all

and prints one line to stdout: ready decision=URL admin=URL ops=URL env=FILE. Data and keys stay in the folder for the next start. dev.env is removed when dev stops.`
}

// Run serves until ctx ends.
func (d *devCmd) Run(ctx context.Context, k *kong.Context, c *console) (err error) {
	given, err := d.url(k)
	if err != nil {
		return err
	}
	if strings.Contains(given, devMark) && !onCommandLine(k, "database-url") {
		given = ""
	}
	if d.Watch && len(d.Dirs) == 0 {
		return misuse("--watch needs the folders to watch")
	}
	if given != "" && len(d.Dirs) > 0 && !d.Development {
		return misuse("dev publishes folders without the approvals and the checks of a real database: give --development-database, if that of --database-url is one for development, or leave its URL out")
	}
	if err := d.tryPorts(ctx); err != nil {
		return err
	}
	if err := os.MkdirAll(d.Data, 0o755); err != nil {
		return err
	}
	unlock, err := lockFolder(d.Data)
	if err != nil {
		return err
	}
	defer unlock()
	envFile := filepath.Join(d.Data, "dev.env")
	// A dev that was killed leaves a file with the ports of its own servers.
	if err := os.Remove(envFile); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}

	telemetry, err := d.observe(ctx, c.err)
	if err != nil {
		return err
	}
	defer telemetry.Close()
	log := telemetry.log
	url := given
	if url == "" {
		pg, err := localpg.Start(ctx, localpg.Config{Dir: d.Data, Durable: true})
		if ctx.Err() != nil && err != nil {
			return ctx.Err() // the interruption caused the error
		}
		if err != nil {
			return err
		}
		watched := watch(pg, log)
		defer func() {
			close(watched)
			err = errors.Join(err, pg.Stop())
		}()
		url = pg.URL() + "&" + devMark
	}
	tuneMemory(log)
	return d.serve(ctx, k, c, telemetry, url, envFile)
}

// watch logs an error if the private Postgres ends by itself. The server keeps running, and
// answers that it is unavailable.
func watch(pg *localpg.Server, log *slog.Logger) chan struct{} {
	stopping := make(chan struct{})
	go func() {
		select {
		case <-stopping:
		case <-pg.Done():
			select {
			case <-stopping: // dev stops it
				return
			default:
			}
			log.Error("the private Postgres has ended, so nothing can be decided: stop dev and start it again", "log", pg.LogFile())
		}
	}()
	return stopping
}

// serve runs the server on a database, with the keys and the example of dev.
func (d *devCmd) serve(ctx context.Context, k *kong.Context, c *console, telemetry *observed, url, envFile string) error {
	log := telemetry.log
	if err := store.Migrate(ctx, url, log); err != nil {
		return err
	}
	db, err := telemetry.open(ctx, d.store(secret.New(url), nil))
	if err != nil {
		return err
	}
	defer db.Close()
	keyFile := filepath.Join(d.Data, "bootstrap.key")
	if _, err := access.BootstrapKey(ctx, db, keyFile, true); err != nil {
		return err
	}
	if d.MaskKeyFile == "" {
		d.MaskKeyFile = filepath.Join(d.Data, "mask.key")
		if err := decisionlog.MakeMaskKey(d.MaskKeyFile); err != nil {
			return err
		}
	}
	config, err := d.config(db, log)
	if err != nil {
		return err
	}
	telemetry.configure(&config)
	config.NoApprovals = !d.Approvals
	config.Start = startOf(k)
	if config.Signing, err = d.signing(); err != nil {
		return err
	}
	srv, err := server.New(ctx, config)
	if err != nil {
		return d.explain(err)
	}
	telemetry.SendMetrics(srv.Gatherer())

	serving, stop := context.WithCancel(ctx)
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- srv.Run(serving) }()
	if err := d.prepare(serving, c, srv, url, keyFile, envFile); err != nil {
		stop()
		d.watching.Wait()
		return errors.Join(err, <-ended)
	}
	err = <-ended
	stop()
	d.watching.Wait()
	return errors.Join(err, os.Remove(envFile))
}

// signing makes the key of the log, if there is none.
func (d *devCmd) signing() (decisionlog.Signing, error) {
	key := filepath.Join(d.Data, "audit.key")
	if _, err := makeAuditKey(key, "localhost/cedarpost-dev"); err != nil && !errors.Is(err, fs.ErrExist) {
		return decisionlog.Signing{}, fmt.Errorf("audit key: %w", err)
	}
	made, err := auditlog.ReadKey(key)
	if err == nil {
		err = os.WriteFile(filepath.Join(d.Data, "audit.pub"), []byte(made.Verifier+"\n"), 0o644)
	}
	if err != nil {
		return decisionlog.Signing{}, fmt.Errorf("audit key: %w", err)
	}
	return decisionlog.Signing{KeyFiles: []string{key}, CheckpointFile: filepath.Join(d.Data, "checkpoints")}, nil
}

// prepare loads the example, writes dev.env, and prints the ready line.
func (d *devCmd) prepare(ctx context.Context, c *console, srv *server.Server, url, keyFile, envFile string) error {
	admin, err := dial(planeURL(srv, "admin", false), adminEnv, keyFile, clientTLSFlags{})
	if err != nil {
		return err
	}
	folders := &devFolders{dirs: d.Dirs, admin: admin, console: c, entities: map[string][]byte{}}
	before := folders.looks()
	switch {
	case len(d.Dirs) > 0:
		if err := folders.publish(ctx); err != nil && !d.Watch {
			return err
		}
	case !d.Empty:
		if err := loadExample(ctx, admin); err != nil {
			return fmt.Errorf("load the example: %w", err)
		}
	}
	if d.Watch {
		d.watching.Go(func() { folders.watch(ctx, before) })
	}
	key, err := readSecret(keyFile)
	if err != nil {
		return err
	}
	vars := [][2]string{{apiEnv, planeURL(srv, "decision", false)}, {adminEnv, admin.url}, {tokenEnv, key}, {databaseURLEnv, url}}
	if srv.Addr("ops") != "" {
		vars = append(vars, [2]string{opsEnv, planeURL(srv, "ops", false)})
	}
	err = writeEnv(envFile, vars)
	if err != nil {
		return err
	}
	if !d.Approvals {
		fmt.Fprintln(c.err, "Bundles are published without the approvals that their bundle.yaml asks for (--no-approvals is the default of dev); --approvals enforces them.")
	}
	fmt.Fprintf(c.err, "In another shell: . %s\n", quoteShell(envFile))
	fmt.Fprintf(c.out, "ready %s env=%s\n", planeURLs(srv, false), envFile)
	return nil
}

// loadExample publishes the example bundle and imports its entities, unless the database has
// another bundle.
func loadExample(ctx context.Context, admin *peer) error {
	b, err := bundle.Read(policies.Shop(), "shop")
	if err != nil {
		return err
	}
	live, err := call(ctx, admin, admin.policies().ListBundles, &cedarpostv1.ListBundlesRequest{})
	if err != nil {
		return err
	}
	switch bundles := live.GetBundles(); {
	case len(bundles) == 0:
		if _, err := upload(ctx, admin, &cedarpostv1.BundleHeader{Name: b.Name}, b.Files); err != nil {
			return admin.explain(err)
		}
	case len(bundles) > 1 || bundles[0].GetName() != b.Name:
		return nil
	}
	// If there are no entities, an earlier dev was stopped between the two steps.
	stored, err := call(ctx, admin, admin.entities().ListEntities, &cedarpostv1.ListEntitiesRequest{PageSize: 1})
	if err != nil || len(stored.GetEntities()) > 0 {
		return err
	}
	i := newImporter(admin, &input{name: bundle.EntitiesName, format: formatJSON, r: bytes.NewReader(b.Entities)}, nil)
	return admin.explain(i.run(ctx))
}

// lockFolder makes a second dev on the same folder fail. The lock of a private Postgres is not
// enough, because with --database-url there is none.
func lockFolder(dir string) (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(dir, "dev.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("another cedarpost dev is running on %s\nstop it, or give another folder with --data", dir)
		}
		return nil, err
	}
	return func() { _ = f.Close() }, nil
}

// writeEnv writes variables for a shell into a file that only its owner can read.
func writeEnv(file string, vars [][2]string) error {
	var b strings.Builder
	b.WriteString("# Made by cedarpost dev, which removes it when it stops. Read it with: . " + quoteShell(file) + "\n")
	for _, v := range vars {
		b.WriteString("export " + v[0] + "=" + quoteShell(v[1]) + "\n")
	}
	return keyfile.Write(file, []byte(b.String()))
}

// quoteShell quotes a word for a POSIX shell.
func quoteShell(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
