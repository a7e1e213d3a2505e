package server_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// lines is a log that several goroutines write to.
type lines struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *lines) count(of string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.text.String(), of)
}

// logLines is an option that keeps the log of a server.
func logLines(l *lines) servertest.Option {
	return func(c *server.Config) { c.Log = slog.New(slog.NewTextHandler(l, nil)) }
}

// number returns the value of a metric.
func number(t *testing.T, s *servertest.Server, name string) float64 {
	t.Helper()
	text := metric(t, s, name)
	n, err := strconv.ParseFloat(text, 64)
	if err != nil {
		t.Fatalf("%s is %q", name, text)
	}
	return n
}

// If the checkpoint file cannot be written, the start fails. If it can, its content stays as it
// is.
func TestStartTriesTheCheckpointFile(t *testing.T) {
	db := storetest.Open(t)
	dir := t.TempDir()
	key, _ := servertest.LogKey(t, "test.example/log")
	start := func(file string) error {
		_, err := server.New(t.Context(), server.Config{
			DB: db, Listen: "127.0.0.1:0", AdminListen: "127.0.0.1:0", OpsListen: "127.0.0.1:0", MaskKey: secret.New(strings.Repeat("k", 32)),
			Log: slog.New(slog.DiscardHandler), Signing: decisionlog.Signing{KeyFiles: []string{key}, CheckpointFile: file},
		})
		return err
	}
	pipe := filepath.Join(dir, "pipe")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for file, want := range map[string]string{
		filepath.Join(key, "checkpoints"):            "not a directory",
		filepath.Join(dir, "missing", "checkpoints"): "no such file or directory",
		dir:         "is a directory",
		"/dev/full": "/dev/full is not a regular file",
		pipe:        pipe + " is not a regular file",
	} {
		if err := start(file); err == nil || !strings.Contains(err.Error(), "checkpoint file: ") || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", file, err, want)
		}
	}
	file := filepath.Join(dir, "checkpoints")
	for _, text := range []string{"", "kept\n\nand cut o"} {
		if text != "" {
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := start(file); err != nil {
			t.Error(err)
		}
		if got, err := os.ReadFile(file); err != nil || string(got) != text {
			t.Errorf("the file holds %q, %v, want %q", got, err, text)
		}
	}
}

// When the checkpoint file can no longer be written, decisions go on, and every server shows
// that the log is not signed, those without keys too.
func TestSigningThatFailsIsSeen(t *testing.T) {
	t.Parallel() // it takes long
	dir := t.TempDir()
	key, verifier := servertest.LogKey(t, "test.example/log")
	disk := filepath.Join(dir, "disk")
	if err := os.Mkdir(disk, 0o700); err != nil {
		t.Fatal(err)
	}
	var log lines
	began := time.Now().Add(-time.Minute)
	s := servertest.New(t, servertest.Signing(key, filepath.Join(disk, "checkpoints")), func(c *server.Config) { c.Signing.Overdue = time.Second }, logLines(&log))
	s.MustLoadShop()
	others := []*servertest.Server{
		s,
		servertest.On(t, s.URL, func(c *server.Config) { c.Signing.Overdue = time.Second }),
		servertest.On(t, s.URL, servertest.Signing(key, filepath.Join(disk, "checkpoints")), func(c *server.Config) { c.Signing.Overdue = time.Second }), // one of the two servers with keys signs
	}
	everywhere := func(what string, ok func(s *servertest.Server) bool) {
		t.Helper()
		for i, s := range others {
			servertest.Eventually(t, fmt.Sprintf("%s on server %d", what, i), func() bool { return ok(s) })
		}
	}
	inOrder := func(s *servertest.Server) bool {
		status, text := readyz(t, s)
		signed := time.UnixMilli(int64(1000 * number(t, s, "cedarpost_checkpoint_timestamp_seconds")))
		return number(t, s, "cedarpost_checkpoint_unsigned_batches") == 0 && signed.After(began) &&
			number(t, s, "cedarpost_checkpoint_size") > 0 && status == http.StatusOK && text == "ready"
	}
	failures := func(cause string) float64 {
		return number(t, s, `cedarpost_checkpoint_failures_total{cause="`+cause+`"}`)
	}
	servertest.DecideSome(t, s, 3)
	everywhere("a checkpoint", inOrder)
	servertest.Covered(t, s, verifier)

	// The directory goes away, and a file is in its place.
	away := filepath.Join(dir, "away")
	if err := errors.Join(os.Rename(disk, away), os.WriteFile(disk, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	servertest.DecideSome(t, s, 3)
	servertest.Eventually(t, "a failure to write the file", func() bool { return failures("file") > 0 })
	everywhere("a warning", func(s *servertest.Server) bool {
		status, text := readyz(t, s)
		return status == http.StatusOK && strings.HasPrefix(text, "ready\nwarning: signing: ") &&
			number(t, s, "cedarpost_checkpoint_unsigned_batches") > 0
	})
	servertest.Eventually(t, "a warning that names the cause", func() bool {
		_, text := readyz(t, s)
		return strings.Contains(text, "cannot read or write the checkpoint file")
	})
	servertest.DecideSome(t, s, 3)
	if failures("contradiction")+failures("database")+failures("foreign") > 0 || number(t, s, "cedarpost_checkpoint_refused") != 0 {
		t.Error("another cause is counted")
	}
	if log.count("no checkpoint signed") == 0 || log.count("checkpoint file: ") == 0 {
		t.Error("nothing in the log of the server")
	}

	// A full disk.
	if err := errors.Join(os.Remove(disk), os.Mkdir(disk, 0o700), os.Symlink("/dev/full", filepath.Join(disk, "checkpoints"))); err != nil {
		t.Fatal(err)
	}
	before := failures("file")
	servertest.Eventually(t, "a failure on a full disk", func() bool { return failures("file") > before })

	if err := errors.Join(os.RemoveAll(disk), os.Rename(away, disk)); err != nil {
		t.Fatal(err)
	}
	everywhere("a checkpoint again", inOrder)
}

// With a database without checkpoints and a server without keys, the time of the newest
// checkpoint is NaN, so no alert fires, and there is no warning.
func TestUnsignedLogIsNotWarnedOf(t *testing.T) {
	t.Parallel() // it takes long
	s := servertest.New(t, func(c *server.Config) { c.Signing.Overdue = time.Nanosecond })
	s.MustLoadShop()
	servertest.DecideSome(t, s, 3)
	servertest.Eventually(t, "batches are counted", func() bool { return number(t, s, "cedarpost_checkpoint_unsigned_batches") > 0 })
	// At the second look, these batches have waited for longer than Overdue.
	looks := `cedarpost_background_success_timestamp_seconds{task="watch_log"}`
	first := number(t, s, looks)
	servertest.Eventually(t, "the log is looked at again", func() bool { return number(t, s, looks) > first })
	if text := metric(t, s, "cedarpost_checkpoint_timestamp_seconds"); text != "NaN" {
		t.Errorf("the newest checkpoint is of %s", text)
	}
	if _, text := readyz(t, s); text != "ready" {
		t.Error(text)
	}
}

// skewedClock returns a URL of a database by which servers see another clock of Postgres, and sets how
// far that is ahead.
func skewedClock(t *testing.T, databaseURL string) (skewed string, set func(ahead string)) {
	t.Helper()
	conn := servertest.Session(t, databaseURL)
	// The schema replaces the clock of Postgres in the statements of the server.
	servertest.MustExec(t, conn, `
		create schema skewed;
		create table skewed.clock (ahead interval);
		insert into skewed.clock values ('0 s');
		create function skewed.clock_timestamp() returns timestamptz language sql volatile as
			'select pg_catalog.clock_timestamp() + ahead from skewed.clock';
		grant usage on schema skewed to public;
		grant select on skewed.clock to public`)
	u, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	q := u.Query()
	q.Set("search_path", "skewed,public,pg_catalog")
	u.RawQuery = q.Encode()
	return u.String(), func(ahead string) { servertest.MustExec(t, conn, "update skewed.clock set ahead = '"+ahead+"'") }
}

// The difference from the clock of the database is a metric. It is logged when it begins and
// when it ends. The server stays ready, however large it is.
func TestClockSkewIsSeen(t *testing.T) {
	t.Parallel() // it takes long
	skewed, set := skewedClock(t, storetest.New(t))
	var log lines
	s := servertest.On(t, skewed, logLines(&log))
	skew := func(by string, least, most float64) {
		t.Helper()
		set(by)
		servertest.Eventually(t, by, func() bool {
			n := number(t, s, "cedarpost_clock_skew_seconds")
			return n > least && n < most
		})
	}
	const begins, ends = "the clocks of this server and of its database differ", "the clocks of this server and of its database agree again"
	told := func(begun, ended int, reason string) {
		t.Helper()
		if log.count(begins) != begun || log.count(ends) != ended {
			t.Errorf("%d times begun, want %d; %d times ended, want %d", log.count(begins), begun, log.count(ends), ended)
		}
		if status, text := readyz(t, s); status != http.StatusOK || !strings.HasPrefix(text, reason) {
			t.Errorf("%d %q, want %q", status, text, reason)
		}
	}
	skew("0 s", -1, 1)
	told(0, 0, "ready")
	skew("4 h", -4*3600-2, -4*3600+2)
	told(1, 0, "ready\nwarning: clock: this server is -1")
	skew("-3 s", 1, 5) // a difference in the other direction is not logged again
	told(1, 0, "ready\nwarning: clock: this server is +")
	skew("0 s", -1, 1)
	told(1, 1, "ready")
	skew("-10 min", 598, 602)
	told(2, 1, "ready\nwarning: clock: this server is +")
}

// An expired certificate is served, the server is not ready, and metrics and the log show that.
func TestExpiredCertificateIsSeen(t *testing.T) {
	certFile, keyFile := server.WritePair(t, t.TempDir(), "expired", time.Now().Add(-time.Hour))
	var log lines
	s := servertest.New(t, logLines(&log), func(c *server.Config) { c.TLSCert, c.TLSKey = certFile, keyFile })
	if log.count("level=ERROR") == 0 || log.count("has expired at") != 1 {
		t.Error("not in the log")
	}
	if ends := number(t, s, `cedarpost_certificate_expiry_timestamp_seconds{use="server"}`) - float64(time.Now().Unix()); ends > -3590 || ends < -4*3600 {
		t.Errorf("ends in %v s", ends)
	}
	if status, text := readyz(t, s); status != http.StatusServiceUnavailable || !strings.HasPrefix(text, "not ready: the TLS certificate has expired at ") {
		t.Errorf("%d %q", status, text)
	}
	if n := number(t, s, `cedarpost_certificate_reload_failures_total{use="server"}`); n != 0 {
		t.Errorf("%v reload failures", n)
	}
}
