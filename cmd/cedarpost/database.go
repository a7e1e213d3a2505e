package main

import (
	"errors"
	"fmt"

	"github.com/alecthomas/kong"

	"github.com/cedarpost/cedarpost/store"
)

const databaseURLEnv = "CEDARPOST_DATABASE_URL"

// databaseFlags say which database to use.
type databaseFlags struct {
	DatabaseURL       string `name:"database-url" help:"Postgres URL. Other users of this machine can see the arguments of a process, so rather use the environment or a file." env:"CEDARPOST_DATABASE_URL" placeholder:"URL" group:"server"`
	DatabaseURLFile   string `name:"database-url-file" help:"File with the Postgres URL." env:"CEDARPOST_DATABASE_URL_FILE" type:"path" placeholder:"FILE" group:"server"`
	PlaintextDatabase bool   `name:"allow-plaintext-database" help:"Connect to a database on another machine without sslmode=verify-full, because something else encrypts." env:"CEDARPOST_ALLOW_PLAINTEXT_DATABASE" group:"server"`
}

// url returns the URL of the database, "" if none is given.
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

// required returns the URL. It is an error of wrong usage if none is given, and an error if the
// connection would leave this machine without TLS that verifies the database.
func (f *databaseFlags) required(k *kong.Context) (string, error) {
	url, err := f.url(k)
	if err == nil && url == "" {
		err = misuse("no database: set %s, or give --database-url or --database-url-file", databaseURLEnv)
	}
	if err == nil {
		from := "database-url"
		if f.DatabaseURL == "" {
			from = "database-url-file"
		}
		err = f.checkTransport(from, url)
	}
	return url, err
}

// checkTransport refuses URLs of a flag whose connections leave this machine without TLS that verifies
// the database, unless the user allows it.
func (f *databaseFlags) checkTransport(flag string, urls ...string) error {
	for _, url := range urls {
		if err := store.CheckTransport(url); errors.Is(err, store.ErrPlaintext) && !f.PlaintextDatabase {
			return about(flag, fmt.Errorf("%w\nor give --allow-plaintext-database, if something else encrypts", err))
		} else if err != nil && !errors.Is(err, store.ErrPlaintext) {
			return about(flag, err)
		}
	}
	return nil
}
