// Package main is the cedarpost command. It reads flags, calls the other packages, and prints
// results as text or JSON with an exit code. Decisions of any kind belong into those packages.
package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"reflect"
	"strings"
	"syscall"

	"github.com/alecthomas/kong"
)

// cli is the whole command line. A flag with an env tag is a setting: the environment and the
// YAML file of --config can give it too.
type cli struct {
	Config string `help:"YAML file with settings. A key is the name of a flag that shows an environment variable in its help." env:"CEDARPOST_CONFIG" type:"path" placeholder:"FILE"`

	Serve   serveCmd   `cmd:"" group:"run" help:"Serve decisions from a database."`
	Dev     devCmd     `cmd:"" group:"run" help:"Try things out: serve from a private Postgres, with the example bundle."`
	Migrate migrateCmd `cmd:"" group:"run" help:"Update the tables of a database to this version."`
	Health  healthCmd  `cmd:"" group:"run" help:"Ask a server whether it is ready."`
	Doctor  doctorCmd  `cmd:"" group:"run" help:"Check the settings of serve, the database, certificates, secrets and the signing of the log."`
	Support supportCmd `cmd:"" name:"support-bundle" group:"run" help:"Write one archive for a bug report about a running server."`
	TLS     tlsCmd     `cmd:"" name:"tls" group:"run" help:"Make certificates to try TLS with."`

	Init     initCmd     `cmd:"" group:"policy" help:"Write a small bundle to begin with."`
	Check    checkCmd    `cmd:"" group:"policy" help:"Check bundle folders and run their tests, without a server."`
	Lint     lintCmd     `cmd:"" group:"policy" help:"Look for policies and fields that are probably a mistake."`
	Apply    applyCmd    `cmd:"" group:"policy" help:"Publish a bundle folder."`
	Change   changeCmd   `cmd:"" group:"policy" help:"Propose a change of a bundle, check it, approve it and publish it."`
	Impact   impactCmd   `cmd:"" group:"policy" help:"Say what a change would have done to recorded decisions."`
	Bundles  bundlesCmd  `cmd:"" group:"policy" help:"List the published bundles, or fetch one."`
	Policies policiesCmd `cmd:"" group:"policy" help:"List the live policies, or show one."`
	Versions versionsCmd `cmd:"" group:"policy" help:"List the versions of a bundle: who published them, when and why."`
	Diff     diffCmd     `cmd:"" group:"policy" help:"Compare the live version with a folder, or two versions."`
	Pull     pullCmd     `cmd:"" group:"policy" help:"Fetch a version of a bundle into a folder."`
	Rollback rollbackCmd `cmd:"" group:"policy" help:"Publish an earlier version again, and freeze the bundle."`
	Freeze   freezeCmd   `cmd:"" group:"policy" help:"Keep a bundle as it is."`
	Unfreeze unfreezeCmd `cmd:"" group:"policy" help:"End the freeze of a bundle."`

	Authorize authorizeCmd `cmd:"" group:"ask" help:"Ask for one decision."`
	Entities  entitiesCmd  `cmd:"" group:"ask" help:"Read and change principals and resources."`
	Decisions decisionsCmd `cmd:"" group:"ask" help:"Read the decision log."`
	Audit     auditCmd     `cmd:"" group:"ask" help:"Prove and verify the log."`
	Events    eventsCmd    `cmd:"" group:"ask" help:"List the other entries of the log: changes, failed authentication, reads."`

	Whoami whoamiCmd `cmd:"" group:"access" help:"Say who the API key is, and what it may do."`
	Keys   keysCmd   `cmd:"" group:"access" help:"Make, list and end API keys."`
	Grants grantsCmd `cmd:"" group:"access" help:"Say which caller has which role."`

	Version versionCmd `cmd:"" group:"about" help:"Print the version."`
	Help    helpCmd    `cmd:"" group:"about" help:"Print help about a command."`
}

const description = `Cedarpost decides who may do what, on which object and which of its fields, and records every decision.

Settings come from flags, then the environment, then the YAML file of --config. Durations are like 500ms, 90m, 12h, 7d, 1d12h or 2w in all three. Commands that call a server send the API key in CEDARPOST_TOKEN or in the file of --token-file.

Exit codes: 0 ok, 1 failed, 2 wrong usage, 3 does not compile or validate, 4 tests failed, 5 denied, 6 passed with warnings (doctor, lint), or something is missing (support-bundle), 7 allows more than before (check --prove), 8 not proven (check --prove), 9 not published yet, because it needs approvals (apply).`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // the second signal ends the process at once
	os.Exit(run(ctx, os.Args[1:], newConsole()))
}

func run(ctx context.Context, args []string, c *console) int {
	dropEmptySettings()
	file := settings{}
	if len(args) == 1 && args[0] == "--version" { // a flag of other commands has this name, too
		args = []string{"version"}
	}
	parser := newParser(ctx, c, file)
	k, err := parser.Parse(args)
	if err == nil {
		err = withHelp(k.Run(c), k.Selected())
	} else {
		err = usageError(err)
	}
	if err == nil {
		return codeOK
	}
	failure := &exitError{code: codeFailed, err: err}
	if !errors.As(err, &failure) && errors.Is(err, context.Canceled) {
		failure.err = errors.New("interrupted")
	}
	if failure.err != nil {
		c.say(file.locate(failure.err))
	}
	return failure.code
}

func newParser(ctx context.Context, c *console, file settings) *kong.Kong {
	return kong.Must(&cli{},
		kong.Name("cedarpost"),
		kong.Description(description),
		kong.Writers(c.out, c.err),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true, WrapUpperBound: 100, NoExpandSubcommands: true}),
		kong.ExplicitGroups([]kong.Group{
			{Key: "run", Title: "Run the service"},
			{Key: "policy", Title: "Policies"},
			{Key: "ask", Title: "Decisions and data"},
			{Key: "access", Title: "Callers and their rights"},
			{Key: "about", Title: "About"},
			{Key: "server", Title: "Server"},
			{Key: "client", Title: "Connection"},
		}),
		kong.NamedMapper("word", kong.MapperFunc(word)),
		kong.WithBeforeResolve(file.load),
		kong.BindTo(ctx, (*context.Context)(nil)),
	)
}

// helpCmd is "cedarpost help COMMAND" for "cedarpost COMMAND --help".
type helpCmd struct {
	Command []string `arg:"" optional:"" help:"The command."`
}

// Run prints the help.
func (h *helpCmd) Run(ctx context.Context, c *console) error {
	// With a known command, --help prints and ends the process, so Parse does not return.
	_, err := newParser(ctx, c, settings{}).Parse(append(h.Command, "--help"))
	return usageError(err)
}

// dropEmptySettings removes empty settings from the environment. Container tools set a variable
// to the empty text to say that it is not given.
func dropEmptySettings() {
	for _, kv := range os.Environ() {
		if name, value, _ := strings.Cut(kv, "="); value == "" && strings.HasPrefix(name, "CEDARPOST_") {
			_ = os.Unsetenv(name)
		}
	}
}

// word reads the value of a flag that takes one of a few words, in upper or lower case.
func word(ctx *kong.DecodeContext, target reflect.Value) error {
	var given string
	if err := ctx.Scan.PopValueInto("word", &given); err != nil {
		return err
	}
	target.SetString(strings.ToLower(given))
	return nil
}
