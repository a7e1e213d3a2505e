//go:build unix

package localpg

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// BinEnv names the environment variable with the folder of the binaries. If it is set, no
// other folder is searched.
const BinEnv = "CEDARPOST_POSTGRES_BIN"

// FindBinaries finds the folder with the programs initdb and postgres: that of [BinEnv],
// that of pg_config, one in the PATH, or one of packages, the newest version first. The
// error is [ErrNoPostgres], and says how to install them.
func FindBinaries() (dir string, err error) {
	if dir := os.Getenv(BinEnv); dir != "" {
		if !hasBinaries(dir) {
			return "", fmt.Errorf("%w: %s=%s has no initdb and postgres", ErrNoPostgres, BinEnv, dir)
		}
		return dir, nil
	}
	var dirs []string
	if output, err := exec.Command("pg_config", "--bindir").Output(); err == nil {
		dirs = append(dirs, strings.TrimSpace(string(output)))
	}
	if postgres, err := exec.LookPath("postgres"); err == nil {
		if postgres, err = filepath.EvalSymlinks(postgres); err == nil {
			dirs = append(dirs, filepath.Dir(postgres))
		}
	}
	for _, pattern := range []string{
		"/usr/lib/postgresql/*/bin",         // Debian, Ubuntu
		"/usr/pgsql-*/bin",                  // postgresql.org's packages for Red Hat
		"/usr/libexec/postgresql*",          // Alpine
		"/opt/homebrew/opt/postgresql*/bin", // Homebrew on Apple silicon
		"/usr/local/opt/postgresql*/bin",    // Homebrew on Intel
		"/home/linuxbrew/.linuxbrew/opt/postgresql*/bin",
	} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			return "", err
		}
		slices.SortStableFunc(found, func(a, b string) int { return version(b) - version(a) })
		dirs = append(dirs, found...)
	}
	for _, dir := range dirs {
		if hasBinaries(dir) {
			return dir, nil
		}
	}
	return "", fmt.Errorf(`%w: found no folder with initdb and postgres. Install it with one of
	apt-get install postgresql
	dnf install postgresql-server
	apk add postgresql
	brew install postgresql@17
or set %s to that folder, or use a server that runs already with --database-url`, ErrNoPostgres, BinEnv)
}

func hasBinaries(dir string) bool {
	for _, name := range []string{"initdb", "postgres"} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.IsDir() || info.Mode().Perm()&0o111 == 0 {
			return false
		}
	}
	return true
}

var versionDigits = regexp.MustCompile(`(?:postgresql|pgsql)\D*(\d+)`)

// version is the number in the path of a folder of binaries, or 0.
func version(dir string) int {
	match := versionDigits.FindStringSubmatch(dir)
	if match == nil {
		return 0
	}
	n, err := strconv.Atoi(match[1])
	if err != nil {
		return 0
	}
	return n
}
