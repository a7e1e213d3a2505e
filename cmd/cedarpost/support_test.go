package main

import (
	"archive/tar"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/cedarpost/cedarpost/store/storetest"
)

// unpack returns the files of a support bundle.
func unpack(t *testing.T, file string) map[string]string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for r := tar.NewReader(z); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		files[strings.TrimPrefix(h.Name, "cedarpost-support/")] = string(text)
	}
}

// missingIn returns why files of a support bundle are missing.
func missingIn(t *testing.T, files map[string]string) map[string]string {
	t.Helper()
	var manifest struct {
		Files []struct {
			Name, Missing string
			Bytes         int
		}
	}
	if err := json.Unmarshal([]byte(files["MANIFEST.json"]), &manifest); err != nil {
		t.Fatal(err)
	}
	missing := map[string]string{}
	for _, f := range manifest.Files {
		if f.Missing != "" {
			missing[f.Name] = f.Missing
		} else if len(files[f.Name]) != f.Bytes {
			t.Errorf("%s has %d bytes, the manifest says %d", f.Name, len(files[f.Name]), f.Bytes)
		}
	}
	return missing
}

// A support bundle has what a bug report needs, and no secret.
func TestSupportBundle(t *testing.T) {
	pg := storetest.NewServer(t)
	newShell(databaseURLEnv+"="+pg.URL()).exits(t, 0, nil, "migrate")
	dir := t.TempDir()
	login := storetest.Login(t, pg.URL(), "cedarpost_app", "cedarpost_writer", "cedarpost_auditor")
	parsed, err := url.Parse(login)
	if err != nil {
		t.Fatal(err)
	}
	password, _ := parsed.User.Password()
	keyFile := filepath.Join(dir, "key")
	// The URL with its password is a setting, and not in a file.
	sh := newShell(databaseURLEnv+"="+login, "CEDARPOST_BOOTSTRAP_KEY_FILE="+keyFile)
	serve := append([]string{"serve", "--log-level=error"}, anyPort...)
	d := sh.start(t, serve...)
	key, err := os.ReadFile(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	const strangeToken = "eyJhbGciOiJSUzI1NiJ9.c3RyYW5nZS10b2tlbg.c2lnbmF0dXJl"
	secrets := map[string][]byte{
		"password": []byte(password), "API key": []byte(strings.TrimSpace(string(key))), "token": []byte(strangeToken),
	}
	for _, token := range []string{strangeToken, strings.TrimSpace(string(key)), "cdp_abcdefghijkl_wrong"} {
		_, _ = askOnce(d.url("decision"), token, "1")
	}

	archive := filepath.Join(dir, "support.tar.gz")
	ops := "--ops-url=" + d.url("ops")
	sh.exits(t, 0, says(archive), "support-bundle", ops, "--out", archive)
	files := unpack(t, archive)
	if missing := missingIn(t, files); len(missing) != 0 {
		t.Errorf("missing %v", missing)
	}
	for name, want := range map[string][]string{
		"client.json":    {`"version"`, `"engine"`},
		"server.json":    {`"settings_digest"`, `"version"`, `"decision-retention":"90d"`, fmt.Sprintf("postgres://%s@", parsed.User.Username())},
		"health.json":    {`{"ready":true,"reasons":[],"warnings":[`},
		"startup.json":   {`"ready":true`},
		"metrics.txt":    {"cedarpost_ready 1", `cedarpost_not_ready{reason="database"} 0`},
		"errors.jsonl":   {`"level":"WARN"`, "no audit key: the log is not signed"},
		"goroutines.txt": {"goroutine ", "server.(*Server).Run"},
		"database.json":  {`"server_version"`, `"missing_migrations": null`, `"decisions"`},
	} {
		for _, text := range want {
			if !strings.Contains(files[name], text) {
				t.Errorf("%s has no %s:\n%.2000s", name, text, files[name])
			}
		}
	}
	for file, text := range files {
		for name, secret := range secrets {
			for _, form := range forms(secret) {
				if strings.Contains(text, form) {
					t.Errorf("%s has the %s", file, name)
				}
			}
		}
	}
	sh.exits(t, 1, says("exists already"), "support-bundle", ops, "--out", archive)
	sh.exits(t, 2, says("is not a URL like"), "support-bundle", "--ops-url=localhost")

	// Other machines get neither errors nor goroutines, and the manifest says what is missing.
	open := sh.start(t, append(slices.Clone(serve), "--ops-listen=0.0.0.0:0")...)
	for _, path := range []string{"start", "errors", "goroutines"} {
		res, err := http.Get(open.url("ops") + "/debug/" + path)
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if res.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %d", path, res.StatusCode)
		}
	}
	second := filepath.Join(dir, "second.tar.gz")
	newShell().exits(t, codeWarnings, says("missing: goroutines.txt: 404", "missing: database.json: no database given"), "support-bundle", "--ops-url="+open.url("ops"), "--out", second)
	files = unpack(t, second)
	if missing := missingIn(t, files); len(missing) != 4 || files["metrics.txt"] == "" || files["errors.jsonl"] != "" {
		t.Errorf("missing %v", missing)
	}
}

// What looks like a secret is replaced, and other text stays.
func TestScrub(t *testing.T) {
	for text, want := range map[string]string{
		"key cdp_abcdefghijkl_0123456789abcdef_01234567, caller ann":          "key ***, caller ann",
		"Authorization: Bearer abc.def-ghi":                                   "Authorization: *** ***",
		"postgres://bob:hunter2@db:5432/x?a=b":                                "postgres://bob:***@db:5432/x?a=b",
		"postgres://bob@db:5432/x":                                            "postgres://bob@db:5432/x",
		`{"password":"hunter2","host":"db"}`:                                  `{"password":"***","host":"db"}`,
		"host=db password=hunter2 user=bob":                                   "host=db password=*** user=bob",
		"-----BEGIN EC PRIVATE KEY-----\nMHc\n-----END EC PRIVATE KEY-----\n": "-----BEGIN EC PRIVATE KEY-----***\n",
		`cedarpost_not_ready{reason="database"} 0`:                            `cedarpost_not_ready{reason="database"} 0`,
		`"max-secret-age":"365d","token-file":"/run/key"`:                     `"max-secret-age":"365d","token-file":"/run/key"`,
		`{"err":"token: wrong_audience","reason":"token: expired"}`:           `{"err":"token: wrong_audience","reason":"token: expired"}`,
		`{"msg":"{\"password\":\"hunter2\",\"host\":\"db\"}"}`:                `{"msg":"{\"password\":\"***\",\"host\":\"db\"}"}`,
		`{"msg":"{\\\"password\\\": \\\"hunter2\\\",\\\"a\\\":1}"}`:           `{"msg":"{\\\"password\\\": \\\"***\\\",\\\"a\\\":1}"}`,
		`{"password":"hun\"ter2","host":"db"}`:                                `{"password":"***","host":"db"}`,
		`password='two words' host=db`:                                        `password='***' host=db`,
		`password="two words" host=db`:                                        `password="***" host=db`,
		"postgres://u:p@ss@host/db":                                           "postgres://u:***@host/db",
		"postgres://u:p/ss@host/db":                                           "postgres://u:***@host/db",
		"X-Api-Key: hunter2-and-3, api_key=hunter2;token=hunter2":             "X-Api-Key: ***, api_key=***;token=***",
		`{"api-key":"hunter2"}`:                                               `{"api-key":"***"}`,
		"https://blob.example.org/x?a=b&sig=hunter2%3D&c=d":                   "https://blob.example.org/x?a=b&sig=***&c=d",
		"postgres://db/x?sslkey=/run/hunter2&a=b":                             "postgres://db/x?sslkey=***&a=b",
		`{"msg":"-----BEGIN PRIVATE KEY-----\nMIGH\nAgEA`:                     `{"msg":"-----BEGIN PRIVATE KEY-----***`,
		"-----BEGIN PRIVATE KEY-----\nMIGHAgEAMBMG\nByqGSM49AgEG\n{\"a\":1}":  "-----BEGIN PRIVATE KEY-----***\n{\"a\":1}",
		"token " + "eyJhbGciOiJSUzI1NiJ9.e30.c2ln" + " refused":               "token *** refused",
	} {
		if got := scrub(text); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

// A server that hangs, or that sends elsewhere, does not keep the other facts out of the archive.
func TestSupportBundleOfAServerThatHangs(t *testing.T) {
	t.Parallel() // it takes long
	elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "from elsewhere") }))
	defer elsewhere.Close()
	over := make(chan struct{})
	const metrics = `cedarpost_authentication_failures_total{reason="token: expired"} 1` + "\n" + `cedarpost_decisions_total{action="A::\"password=x-y-z\""} 1` + "\n"
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/metrics":
			_, _ = io.WriteString(w, metrics)
		case "/debug/errors":
			http.Redirect(w, r, elsewhere.URL, http.StatusFound)
		case "/debug/goroutines":
			w.WriteHeader(http.StatusTooManyRequests)
		default:
			select {
			case <-over:
			case <-r.Context().Done():
			}
		}
	}))
	defer server.Close()
	defer close(over)
	pg := storetest.NewServer(t)
	sh := newShell(databaseURLEnv + "=" + pg.URL())
	sh.exits(t, 0, nil, "migrate")
	out := filepath.Join(t.TempDir(), "support.tar.gz")
	sh.exits(t, codeWarnings, says("missing: server.json"), "support-bundle", "--ops-url="+server.URL, "--out", out)
	files := unpack(t, out)
	missing := missingIn(t, files)
	for name, want := range map[string]string{"server.json": "deadline", "health.json": "deadline", "startup.json": "deadline", "errors.jsonl": "302", "goroutines.txt": "last ten seconds"} {
		if !strings.Contains(missing[name], want) {
			t.Errorf("%s is missing because of %q, want %q", name, missing[name], want)
		}
	}
	if len(missing) != 5 || !strings.Contains(files["database.json"], `"server_version"`) || files["metrics.txt"] != metrics {
		t.Errorf("missing: %v; %s", missing, files["metrics.txt"])
	}
}

// A file that is there is not replaced, whatever it is, and none is left if there is nothing to write.
func TestSupportBundleReplacesNothing(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	out, target := filepath.Join(dir, "link"), filepath.Join(dir, "target")
	if err := os.Symlink(target, out); err != nil { // it leads nowhere
		t.Fatal(err)
	}
	newShell().exits(t, codeFailed, says("exists already"), "support-bundle", "--ops-url=http://127.0.0.1:1", "--out", out)
	if _, err := os.Stat(target); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the link was followed: %v", err)
	}
	newShell().exits(t, codeFailed, says("not a directory"), "support-bundle", "--ops-url=http://127.0.0.1:1", "--out", filepath.Join(write(t, dir, "file", ""), "x"))

	// The file is there before the server is asked, so nothing can take its name meanwhile.
	early := filepath.Join(dir, "early")
	var taken atomic.Int32
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		if f, err := os.OpenFile(early, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600); err == nil {
			_ = f.Close()
			taken.Add(1)
		}
	}))
	defer server.Close()
	newShell().exits(t, codeWarnings, says("missing: database.json"), "support-bundle", "--ops-url="+server.URL, "--out", early)
	if taken.Load() != 0 {
		t.Error("the name was free while the server was asked")
	}
}
