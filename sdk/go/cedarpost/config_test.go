package cedarpost

import (
	"context"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
)

func TestConfigThatCannotBe(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "missing")
	empty := filepath.Join(t.TempDir(), "empty")
	if err := os.WriteFile(empty, []byte("\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		cfg  Config
		says string
	}{
		"no URL":            {Config{Servers: []string{"localhost:8080"}}, "is not a URL"},
		"another scheme":    {Config{Servers: []string{"ftp://localhost"}}, "is not a URL"},
		"plain http":        {Config{Servers: []string{"http://pdp.example:8080"}}, "in the clear"},
		"plain http to any": {Config{Servers: []string{"http://0.0.0.0:8080"}}, "in the clear"},
		"a missing key":     {Config{TokenFile: missing}, "no such file"},
		"an empty key":      {Config{TokenFile: empty}, "no API key in it"},
		"a negative time":   {Config{Timeout: -1}, "Timeout is negative"},
		"rare reports":      {Config{ReportInterval: time.Minute}, "ReportInterval"},
		"a cutting client":  {Config{HTTPClient: &http.Client{Timeout: time.Second}}, "would cut the watch"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := New(c.cfg); err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("it says %v", err)
			}
		})
	}
}

// The zero value takes servers and key from the environment.
func TestConfigFromTheEnvironment(t *testing.T) {
	file := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(file, []byte(" secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("CEDARPOST_API_URL", "https://one:8080, https://two:8080")
	t.Setenv("CEDARPOST_TOKEN_FILE", file)
	t.Setenv("CEDARPOST_TOKEN", "another")
	var cfg Config
	if err := cfg.setDefaults(); err != nil {
		t.Fatal(err)
	}
	if len(cfg.Servers) != 2 || cfg.Servers[1] != "https://two:8080" || cfg.TokenFile != file || cfg.Token != "" {
		t.Errorf("%+v", cfg)
	}
	if cfg.Timeout != time.Second || cfg.MaxStaleness != 5*time.Second || cfg.CacheBytes != 32<<20 || cfg.ReportInterval != 5*time.Second {
		t.Errorf("%+v", cfg)
	}
}

// The client uses the new key after the key file was replaced. If the file is removed
// or broken, it goes on with the old key.
func TestKeyFileIsReadAgain(t *testing.T) {
	file := filepath.Join(t.TempDir(), "key")
	write := func(text string, at time.Time) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chtimes(file, at, at); err != nil {
			t.Fatal(err)
		}
	}
	now := time.Now()
	write("one\n", now)
	f := &secretFile{name: file, log: slog.New(slog.DiscardHandler)}
	if err := f.read(); err != nil {
		t.Fatal(err)
	}
	value := func() string { f.looked = time.Time{}; return f.value() }
	write("two", now.Add(time.Second))
	if got := value(); got != "two" {
		t.Errorf("replaced: %s", got)
	}
	write("", now.Add(2*time.Second))
	if got := value(); got != "two" {
		t.Errorf("emptied: %q", got)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if got := value(); got != "two" {
		t.Errorf("gone: %q", got)
	}
	write("three", now.Add(3*time.Second))
	if got := value(); got != "three" {
		t.Errorf("back: %s", got)
	}
}

var nowhere = connecthttp.NewTransport(http.DefaultClient, "http://127.0.0.1:1")

// Only a share of the questions is asked again, so that a service in trouble does not
// get several times the load.
func TestRetriesAreBounded(t *testing.T) {
	s := newServers([]string{"a"}, []connect.Transport{nowhere})
	n := 0
	for s.spend() {
		n++
	}
	if n != retryReserve {
		t.Errorf("%d retries at once", n)
	}
	for range 100 {
		s.earn()
	}
	n = 0
	for s.spend() {
		n++
	}
	if n != 100/retryShare {
		t.Errorf("%d retries for 100 questions", n)
	}
}

// A server that fails again and again is not asked for a while, and then asked once.
func TestBreaker(t *testing.T) {
	s := newServers([]string{"a", "b"}, []connect.Transport{nowhere, nowhere})
	a := s.list[0]
	for range breakAfter {
		done, err := a.breaker.Allow()
		if err != nil {
			t.Fatal(err)
		}
		done(connect.NewError(connect.CodeUnavailable, "away"))
	}
	for range 10 {
		if p, _ := s.pick(nil); p == a {
			t.Error("it is asked")
		}
	}
	// An error about a question does not count against the server.
	b := s.list[1]
	for range 10 * breakAfter {
		done, err := b.breaker.Allow()
		if err != nil {
			t.Fatal(err)
		}
		done(connect.NewError(connect.CodeInvalidArgument, "no such action"))
	}
	if p, _ := s.pick(nil); p != b {
		t.Error("it is left alone for the questions it was asked")
	}
}

// A question that failed at one server is asked again at another one, wherever other questions have moved
// the counter, and at the same one only if the others are not asked.
func TestAgainAtAnotherServer(t *testing.T) {
	s := newServers([]string{"a", "b"}, []connect.Transport{nowhere, nowhere})
	a, b := s.list[0], s.list[1]
	for range 10 {
		p, done := s.pick([]*peer{a})
		if p != b {
			t.Fatal("asked at the server that failed")
		}
		done(nil)
	}
	for range breakAfter {
		done, err := b.breaker.Allow()
		if err != nil {
			t.Fatal(err)
		}
		done(connect.NewError(connect.CodeUnavailable, "away"))
	}
	if p, _ := s.pick([]*peer{a}); p != a {
		t.Error("asked nowhere")
	}
}

// A call whose caller gave up does not count as a failure of the server.
func TestGivingUpIsNoFailure(t *testing.T) {
	c, err := New(Config{Servers: []string{"http://127.0.0.1:1"}, CacheBytes: -1})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for range 3 * breakAfter {
		if _, err := c.Authorize(ctx, hitCheck); err == nil {
			t.Fatal("an answer out of nowhere")
		}
	}
	if p, _ := c.servers.pick(nil); p == nil {
		t.Error("the server is left alone")
	}
	if err := c.Close(t.Context()); err != nil {
		t.Error(err)
	}
}
