package main

import (
	"github.com/alecthomas/kong"
)

const databaseURLEnv = "CEDARPOST_DATABASE_URL"

// databaseFlags say which database to use.
type databaseFlags struct {
	DatabaseURL     string `name:"database-url" help:"Postgres URL. Other users of this machine can see the arguments of a process, so rather use the environment or a file." env:"CEDARPOST_DATABASE_URL" placeholder:"URL" group:"server"`
	DatabaseURLFile string `name:"database-url-file" help:"File with the Postgres URL." env:"CEDARPOST_DATABASE_URL_FILE" type:"path" placeholder:"FILE" group:"server"`
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

// required returns the URL, and an error of wrong usage if none is given.
func (f *databaseFlags) required(k *kong.Context) (string, error) {
	url, err := f.url(k)
	if err == nil && url == "" {
		err = misuse("no database: set %s, or give --database-url or --database-url-file", databaseURLEnv)
	}
	return url, err
}
