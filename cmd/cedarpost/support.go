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
	"runtime"
	"strings"
	"sync"
	"time"

	"github.com/alecthomas/kong"

	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/store"
)

const (
	partTimeout     = 10 * time.Second // of one file of the server, which may hang
	databaseTimeout = 30 * time.Second
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

The server gives settings, errors and goroutines only if its operations listener is on a loopback address, and not with --no-debug, so run the command on its machine, or in its container.

Each part of the server has 10 s and the database 30 s, all at once, so a server that hangs keeps only its own parts out. What looks like a key, a token or a password is replaced by ***, but not in metrics. Names of callers and addresses stay in: read the archive before you give it away.

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
	base := strings.TrimRight(s.OpsURL, "/")
	if _, err := http.NewRequestWithContext(ctx, http.MethodGet, base+"/readyz", http.NoBody); err != nil || !strings.Contains(base, "://") {
		return misuse("%q is not a URL like http://127.0.0.1:9090 (see %s)", clean(scrub(s.OpsURL)), opsEnv)
	}
	// Made at once, so that nothing that appears meanwhile is replaced.
	file, err := os.OpenFile(out, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrExist) {
		return fmt.Errorf("%s exists already; give another file with --out", out)
	}
	if err != nil {
		return err
	}
	files := s.collect(ctx, k, base)
	archive, err := packSupport(now, files)
	if err == nil {
		_, err = file.Write(archive)
	}
	if err = errors.Join(err, file.Close()); err != nil {
		return errors.Join(err, os.Remove(out))
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

// collect gets all files at once, each within a time of its own: those that a server that hangs does not
// give must not keep the others from being had.
func (s *supportCmd) collect(ctx context.Context, k *kong.Context, base string) []supportFile {
	files := []supportFile{
		s.version(), {Name: "server.json", From: "/debug/start"}, {Name: "health.json", From: "/readyz?format=json"}, {Name: "startup.json", From: "/startupz?format=json"},
		{Name: "metrics.txt", From: "/metrics"}, {Name: "errors.jsonl", From: "/debug/errors"}, {Name: "goroutines.txt", From: "/debug/goroutines"},
	}
	client := &http.Client{
		Transport:     &http.Transport{Proxy: nil}, // not from the environment
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	defer client.CloseIdleConnections()
	var wg sync.WaitGroup
	for i := 1; i < len(files); i++ {
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, partTimeout)
			defer cancel()
			files[i] = fetch(ctx, client, files[i].Name, base, files[i].From)
		})
	}
	ctx, cancel := context.WithTimeout(ctx, databaseTimeout)
	defer cancel()
	facts := s.database(ctx, k)
	wg.Wait()
	return append(files, facts)
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
func fetch(ctx context.Context, client *http.Client, name, base, path string) supportFile {
	f := supportFile{Name: name, From: "GET " + path}
	f.finish(func() error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+path, http.NoBody)
		if err != nil {
			return err
		}
		res, err := client.Do(req)
		if err != nil {
			return err
		}
		defer res.Body.Close()
		if res.StatusCode != http.StatusOK && res.StatusCode != http.StatusServiceUnavailable {
			why := res.Status
			switch res.StatusCode {
			case http.StatusNotFound, http.StatusForbidden:
				why += ": the server is older, has switched it off (--no-debug, --no-metrics, --no-health), or its operations listener is not on a loopback address"
			case http.StatusTooManyRequests:
				why += ": the server made a dump in the last ten seconds; try again"
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

// finish takes secrets out of a file, and notes its length or why it is missing. Metrics have names and
// constants only, and a changed label could make two of them the same.
func (f *supportFile) finish(err error) {
	if err != nil {
		f.Missing, f.content = scrub(err.Error()), nil
		return
	}
	if f.Name != "metrics.txt" {
		f.content = []byte(scrub(string(f.content)))
	}
	f.Bytes = len(f.content)
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
