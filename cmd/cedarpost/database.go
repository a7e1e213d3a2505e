package main

import (
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"regexp"
	"sync"

	"github.com/alecthomas/kong"

	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/store"
)

const databaseURLEnv = "CEDARPOST_DATABASE_URL"

// databaseFlags say which database to use.
type databaseFlags struct {
	DatabaseURL       secret.Secret `name:"database-url" help:"Postgres URL. Other users of this machine can see the arguments of a process, so rather use the environment or a file." env:"CEDARPOST_DATABASE_URL" placeholder:"URL" group:"server"`
	DatabaseURLFile   string        `name:"database-url-file" help:"File with the Postgres URL." env:"CEDARPOST_DATABASE_URL_FILE" type:"path" placeholder:"FILE" group:"server"`
	PlaintextDatabase bool          `name:"allow-plaintext-database" help:"Connect to a database on another machine without sslmode=verify-full, because something else encrypts." env:"CEDARPOST_ALLOW_PLAINTEXT_DATABASE" group:"server"`
}

// url returns the URL of the database, "" if none is given.
func (f *databaseFlags) url(k *kong.Context) (string, error) {
	useFile, err := f.useFile(k)
	if err != nil {
		return "", err
	}
	if !useFile {
		return f.DatabaseURL.Reveal(), nil
	}
	url, err := readSecret(f.DatabaseURLFile)
	if err != nil {
		return "", about("database-url-file", err)
	}
	return url, nil
}

// required returns the URL. It is an error of wrong usage if none is given, and an error if the
// connection would leave this machine without TLS that verifies the database.
func (f *databaseFlags) required(k *kong.Context) (string, error) {
	url, err := f.url(k)
	if err == nil && url == "" {
		err = misuse("no database: set %s, or give --database-url or --database-url-file", databaseURLEnv)
	}
	if err == nil {
		from := "database-url"
		if f.DatabaseURL.IsZero() {
			from = "database-url-file"
		}
		err = f.checkTransport(from, secret.New(url))
	}
	return url, err
}

// checkTransport refuses URLs of a flag whose connections leave this machine without TLS that verifies
// the database, unless the user allows it.
func (f *databaseFlags) checkTransport(flag string, urls ...secret.Secret) error {
	for _, url := range urls {
		if err := store.CheckTransport(url.Reveal()); errors.Is(err, store.ErrPlaintext) && !f.PlaintextDatabase {
			return about(flag, fmt.Errorf("%w\nor give --allow-plaintext-database, if something else encrypts", err))
		} else if err != nil && !errors.Is(err, store.ErrPlaintext) {
			return about(flag, err)
		}
	}
	return nil
}

// useFile reports whether the URL is that of --database-url-file.
func (f *databaseFlags) useFile(k *kong.Context) (bool, error) {
	if f.DatabaseURLFile == "" || f.DatabaseURL.IsZero() {
		return f.DatabaseURLFile != "", nil
	}
	useFile := onCommandLine(k, "database-url-file")
	if useFile == onCommandLine(k, "database-url") {
		return false, misuse("both --database-url and --database-url-file are given; give one")
	}
	return useFile, nil
}

// live returns the URL for a command that runs for long. If it is that of a file, the file is read
// again for each new connection to the database.
func (f *databaseFlags) live(k *kong.Context, log *slog.Logger) (secret.Secret, error) {
	url, err := f.required(k)
	if err != nil {
		return secret.Secret{}, err
	}
	if useFile, err := f.useFile(k); err != nil || !useFile {
		return secret.New(url), err
	}
	return liveFile("database-url-file", log, url, func() (string, error) { return readSecret(f.DatabaseURLFile) }), nil
}

// errPasswordInArguments refuses a password that every user of the machine can read.
var errPasswordInArguments = errors.New("the URL has a password, and other users of this machine can see the arguments of a process: give the URL with --database-url-file, or --development-database, if it is one")

// passwordOutsideOfFile says where a password of the database is that is not in a file with
// limited rights, or "".
func (f *databaseFlags) passwordOutsideOfFile(k *kong.Context) string {
	useFile, err := f.useFile(k)
	switch {
	case err != nil:
		return ""
	case !useFile && hasPassword(f.DatabaseURL.Reveal()):
		if onCommandLine(k, "database-url") {
			return "--database-url"
		}
		return databaseURLEnv + " or the file of --config"
	case os.Getenv("PGPASSWORD") != "":
		return "PGPASSWORD"
	}
	return ""
}

// passwordParameter matches a password in a connection string of the form key=value.
var passwordParameter = regexp.MustCompile(`(^|\s)password\s*=`)

// hasPassword reports whether a password is written in a URL or a connection string.
func hasPassword(text string) bool {
	if u, err := url.Parse(text); err == nil && u.Scheme != "" {
		password, set := u.User.Password()
		return set && password != "" || u.Query().Get("password") != ""
	}
	return passwordParameter.MatchString(text)
}

// liveFile returns a secret that is read again from a file each time that it is revealed. first is
// what read returned at the start. While read fails, the last content stays in use, and the log has a
// line for each change of the reason.
func liveFile(flag string, log *slog.Logger, first string, read func() (string, error)) secret.Secret {
	var mu sync.Mutex
	last, trouble := first, ""
	return secret.Live(func() string {
		text, err := read()
		mu.Lock()
		defer mu.Unlock()
		now := ""
		if err != nil {
			now = err.Error()
		}
		if now != trouble {
			trouble = now
			if now == "" {
				log.Info("the file of a secret can be read again", "setting", flag)
			} else {
				log.Error("the file of a secret cannot be used, its content from before stays in use", "setting", flag, "err", err)
			}
		}
		if err == nil {
			last = text
		}
		return last
	})
}
