package main

import (
	"archive/tar"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"regexp"
	"runtime"
	"strings"
	"time"

	"github.com/alecthomas/kong"

	"github.com/cedarpost/cedarpost/internal/keyfile"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/store"
)

const (
	supportTimeout  = 30 * time.Second
	maxSupportBytes = 32 << 20 // of one file; the rest is cut off
)

type supportCmd struct {
	OpsURL string `name:"ops-url" help:"URL of the operations plane (default ${default})." env:"CEDARPOST_OPS_URL" default:"http://127.0.0.1:9090" placeholder:"URL" group:"client"`
	databaseFlags
	Out string `name:"out" help:"File to write (default: cedarpost-support-TIME.tar.gz in this folder). It is made with mode 0600, and must not exist." type:"path" placeholder:"FILE"`
}

// Help is the long help of support-bundle.
func (*supportCmd) Help() string {
	return `Writes one archive for a bug report: the versions of this command and of the server, the settings that the server was started with (without secrets), its health, its metrics, its newest warnings and errors, a dump of its goroutines, and, if a database is given, facts about it: version, migrations, settings, sizes of tables. MANIFEST.json says what is in it, and what is missing and why.

The server gives settings, errors and goroutines only if its operations listener is on a loopback address, so run the command on its machine, or in its container.

What looks like a key, a token or a password is replaced by ***. Names of callers and addresses stay in: read the archive before you give it away.

Exits with 0 if the archive is complete, and with 6 if something is missing.`
}

// supportFile is one file of the archive, or why there is none.
type supportFile struct {
	Name  string `json:"name"`
	From  string `json:"from"`
	Bytes int    `json:"bytes"`
	Cut   bool   `json:"cut,omitempty"` // it was longer
	// Missing is why the file is missing, or "".
	Missing string `json:"missing,omitempty"`
	content []byte
}

// Run collects and writes.
func (s *supportCmd) Run(ctx context.Context, k *kong.Context, c *console) error {
	now := time.Now().UTC()
	out := cmp.Or(s.Out, "cedarpost-support-"+now.Format("20060102T150405Z")+".tar.gz")
	if _, err := os.Lstat(out); err == nil {
		return fmt.Errorf("%s exists already; give another file with --out", out)
	}
	base := strings.TrimRight(s.OpsURL, "/")
	if _, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/readyz", http.NoBody); err != nil || !strings.Contains(base, "://") {
		return misuse("%q is not a URL like http://127.0.0.1:9090 (see %s)", clean(scrub(s.OpsURL)), opsEnv)
	}
	ctx, cancel := context.WithTimeout(ctx, supportTimeout)
	defer cancel()
	files := []supportFile{s.version()}
	for _, part := range []struct{ name, path string }{
		{"server.json", "/debug/start"}, {"health.json", "/readyz?format=json"}, {"startup.json", "/startupz?format=json"},
		{"metrics.txt", "/metrics"}, {"errors.jsonl", "/debug/errors"}, {"goroutines.txt", "/debug/goroutines"},
	} {
		files = append(files, fetch(ctx, part.name, base, part.path))
	}
	files = append(files, s.database(ctx, k))
	archive, err := packSupport(now, files)
	if err != nil {
		return err
	}
	if err := keyfile.Write(out, archive); err != nil {
		return err
	}
	fmt.Fprintf(c.out, "%s\n", clean(out))
	missing := false
	for _, f := range files {
		if f.Missing != "" {
			missing = true
			fmt.Fprintf(c.err, "missing: %s: %s\n", f.Name, clean(f.Missing))
		}
	}
	if missing {
		return exitWith(codeWarnings)
	}
	return nil
}

// version returns the version of this command.
func (*supportCmd) version() supportFile {
	version, commit := buildVersion()
	return jsonFile("client.json", "this command", map[string]any{
		"version": version, "commit": commit, "engine": engine.Version, "go": runtime.Version(),
		"os": runtime.GOOS, "arch": runtime.GOARCH, "cpus": runtime.NumCPU(),
	}, nil)
}

// database returns the facts of the database, if one is given.
func (s *supportCmd) database(ctx context.Context, k *kong.Context) supportFile {
	const name, from = "database.json", "the database"
	url, err := s.url(k)
	if err == nil && url == "" {
		err = fmt.Errorf("no database given: set %s, or give --database-url-file", databaseURLEnv)
	}
	if err == nil {
		url, err = s.required(k)
	}
	if err != nil {
		return jsonFile(name, from, nil, err)
	}
	facts, err := store.DescribeDatabase(ctx, url)
	return jsonFile(name, from, facts, err)
}

func jsonFile(name, from string, v any, err error) supportFile {
	f := supportFile{Name: name, From: from}
	if err == nil {
		f.content, err = json.MarshalIndent(v, "", "  ")
	}
	f.finish(err)
	return f
}

// fetch asks the operations plane for one file. A server that is not ready answers 503, with a body.
func fetch(ctx context.Context, name, base, path string) supportFile {
	f := supportFile{Name: name, From: "GET " + path}
	f.finish(func() error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+path, http.NoBody)
		if err != nil {
			return err
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		if res.StatusCode != http.StatusOK && res.StatusCode != http.StatusServiceUnavailable {
			why := res.Status
			if res.StatusCode == http.StatusNotFound || res.StatusCode == http.StatusForbidden {
				why += ": the server is older, has switched it off, or its operations listener is not on a loopback address"
			}
			return errors.New(why)
		}
		f.content, err = io.ReadAll(io.LimitReader(res.Body, maxSupportBytes+1))
		if len(f.content) > maxSupportBytes {
			f.content, f.Cut = f.content[:maxSupportBytes], true
		}
		return err
	}())
	return f
}

// finish takes secrets out of a file, and notes its length or why it is missing.
func (f *supportFile) finish(err error) {
	if err != nil {
		f.Missing, f.content = scrub(err.Error()), nil
		return
	}
	f.content = []byte(scrub(string(f.content)))
	f.Bytes = len(f.content)
}

// secretTexts match what looks like a secret. The server leaves secrets out already, so this is a second
// line of defense. The groups stay.
var secretTexts = []*regexp.Regexp{
	regexp.MustCompile(`cdp_[A-Za-z0-9_-]{8,}`), // an API key
	regexp.MustCompile(`(?i)(\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{8,}`),
	regexp.MustCompile(`\beyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*`),                             // a JSON Web Token
	regexp.MustCompile(`(\b[a-z][a-z0-9+.-]*://[^\s:/@"']*:)[^\s@"']+(@)`),                                // a URL with a password
	regexp.MustCompile(`(?i)((?:password|passwd|secret|token|authorization)"?\s*[=:]\s*"?)[^\s"&,;]{3,}`), // password=…, "token": "…"
	regexp.MustCompile(`(?s)(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?-----END [A-Z ]*PRIVATE KEY-----`),
}

// scrub replaces what looks like a secret by ***.
func scrub(text string) string {
	for _, re := range secretTexts {
		text = re.ReplaceAllString(text, "${1}***${2}")
	}
	return text
}

// packSupport makes the archive, with its manifest first.
func packSupport(now time.Time, files []supportFile) ([]byte, error) {
	manifest := jsonFile("MANIFEST.json", "this command", map[string]any{"made_at": now, "files": files}, nil)
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	t := tar.NewWriter(z)
	for _, f := range append([]supportFile{manifest}, files...) {
		if f.Missing != "" {
			continue
		}
		if err := t.WriteHeader(&tar.Header{Name: "cedarpost-support/" + f.Name, Mode: 0o600, Size: int64(len(f.content)), ModTime: now}); err != nil {
			return nil, err
		}
		if _, err := t.Write(f.content); err != nil {
			return nil, err
		}
	}
	if err := errors.Join(t.Close(), z.Close()); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
