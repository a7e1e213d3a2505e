package main

import (
	"context"
	"io"
	"net/http"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/cedarpost/cedarpost/server/telemetry/telemetrytest"
	"github.com/cedarpost/cedarpost/store/storetest"
)

func TestBadTelemetryVariables(t *testing.T) {
	t.Parallel()
	sh := newShell("OTEL_TRACES_SAMPLER=sometimes")
	serve := append([]string{"serve", "--development-database", "--database-url", "postgres://localhost:1/none"}, anyPort...)
	sh.exits(t, codeUsage, says("OTEL_TRACES_SAMPLER", "must be always_on"), serve...)
	sh.exits(t, codeFailed, says("OTEL_TRACES_SAMPLER", "must be always_on"), "doctor", "--database-url", "postgres://localhost:1/none")
	r := newShell("OTEL_EXPORTER_OTLP_HEADERS=swordfish").exits(t, codeUsage, says("OTEL_EXPORTER_OTLP_HEADERS"), serve...)
	if strings.Contains(r.out+r.err, "swordfish") {
		t.Errorf("the header is shown: %s", r.err)
	}
	for env, want := range map[string]string{
		"OTEL_EXPORTER_OTLP_ENDPOINT=http://collector.example.org":                                          "OTEL_EXPORTER_OTLP_ENDPOINT: must be a URL with https",
		"OTEL_EXPORTER_OTLP_ENDPOINT=https://collector.example.org OTEL_EXPORTER_OTLP_TRACES_INSECURE=true": "OTEL_EXPORTER_OTLP_TRACES_INSECURE: contradicts",
	} {
		sh := newShell(strings.Fields(env)...)
		sh.exits(t, codeUsage, says(want), serve...)
		sh.exits(t, codeFailed, says(want), "doctor", "--database-url", "postgres://localhost:1/none")
	}
	allowed := newShell("OTEL_EXPORTER_OTLP_ENDPOINT=http://collector.example.org")
	allowed.exits(t, codeFailed, says("warn  OTEL_EXPORTER_OTLP_ENDPOINT", "because of --allow-plaintext-telemetry"), "doctor", "--allow-plaintext-telemetry", "--database-url", "postgres://localhost:1/none")
	newShell().exits(t, codeFailed, says("allow-plaintext-telemetry", "it has no effect, because no telemetry"), "doctor", "--allow-plaintext-telemetry", "--database-url", "postgres://localhost:1/none")
}

// The built program sends all three signals, goes on when the reader of its log is gone, and ends in time.
func TestServeSendsTelemetry(t *testing.T) {
	t.Parallel() // it takes long
	out := telemetrytest.New(t)
	dir := t.TempDir()
	keyFile := dir + "/key"
	sh := newShell("OTEL_EXPORTER_OTLP_ENDPOINT="+out.URL, "OTEL_EXPORTER_OTLP_HEADERS=x-key=swordfish", "OTEL_SERVICE_NAME=my-pdp",
		"OTEL_BSP_SCHEDULE_DELAY=20", "OTEL_BLRP_SCHEDULE_DELAY=20", "OTEL_METRIC_EXPORT_INTERVAL=100")
	args := append([]string{"serve", "--development-database", "--bootstrap-key-file", keyFile, "--database-url-file", write(t, dir, "url", storetest.New(t)+"\n")}, anyPort...)
	cmd := exec.Command(binary, args...)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Env, cmd.Stderr = sh.env, w
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill() }()
	_ = w.Close()
	buf := make([]byte, 4096)
	n, err := stdout.Read(buf)
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{ready: string(buf[:n])}
	_ = r.Close() // from here on nobody reads the log

	client := newShell("CEDARPOST_TOKEN_FILE="+keyFile, "CEDARPOST_ADMIN_URL="+d.url("admin"), "CEDARPOST_API_URL="+d.url("decision"))
	stranger := newShell("CEDARPOST_TOKEN=nonsense", "CEDARPOST_API_URL="+d.url("decision"))
	lost := regexp.MustCompile(`cedarpost_log_lines_lost_total [1-9]`)
	refused := func() { stranger.exits(t, codeFailed, says("unauthenticated"), ask("ViewOrder", "42")...) }
	refused()
	eventually(t, "a line is lost", func() bool {
		refused()
		return lost.MatchString(scrape(t, d.url("ops")+"/metrics"))
	})
	client.exits(t, 0, says("shop: published"), "apply", "../../policies/shop")
	client.exits(t, 0, nil, "entities", "import", "../../policies/shop/entities.json")
	client.exits(t, 0, says("ALLOW"), ask("ViewOrder", "42")...)
	metrics := scrape(t, d.url("ops")+"/metrics")
	for _, want := range []string{`cedarpost_authentication_failures_total{reason="unknown key"}`, `cedarpost_telemetry_failures_total{signal="traces"} 0`} {
		if !strings.Contains(metrics, want) {
			t.Errorf("no %s in /metrics", want)
		}
	}
	_ = cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Errorf("ended with %v", err)
	}
	found := map[string]bool{}
	for _, s := range out.Spans() {
		found[s.Name] = true
	}
	for _, want := range []string{"cedarpost.v1.AuthorizationService/Authorize", "load", "decide", "record", "commit", "append_batch"} {
		if !found[want] {
			t.Errorf("no span %s", want)
		}
	}
	if got := out.About("service.name"); got != "my-pdp" {
		t.Errorf("service %q", got)
	}
	if out.Metrics()["cedarpost_decisions_total"] == nil {
		t.Error("no metric was sent")
	}
	lines := ""
	for _, l := range out.Lines() {
		lines += l.Body.GetStringValue() + "\n"
	}
	if !strings.Contains(lines, "call refused without a key") {
		t.Errorf("the log lines that were sent: %s", lines)
	}
	key, err := os.ReadFile(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	for _, secret := range []string{strings.TrimSpace(string(key)), "swordfish"} {
		if strings.Contains(string(out.Raw()), secret) {
			t.Errorf("%s was sent", secret)
		}
	}
}

// A server whose stderr is a full pipe that nobody reads starts, records again after a commit has failed, and
// ends.
func TestServeWithFullPipe(t *testing.T) {
	t.Parallel() // it takes long
	dir, url := t.TempDir(), storetest.New(t)
	keyFile := dir + "/key"
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	fill(t, w)
	cmd := exec.Command(binary, append([]string{"serve", "--development-database", "--drain-delay=1s", "--bootstrap-key-file", keyFile, "--database-url-file", write(t, dir, "url", url+"\n")}, anyPort...)...)
	cmd.Env, cmd.Stderr = newShell().env, w
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	hangs := time.AfterFunc(3*time.Minute, func() { _ = cmd.Process.Kill() })
	defer hangs.Stop()
	defer func() { _ = cmd.Process.Kill() }()
	_ = w.Close()
	buf := make([]byte, 4096)
	n, err := stdout.Read(buf)
	if err != nil {
		t.Fatalf("not started: %v", err)
	}
	d := &daemon{ready: string(buf[:n])}
	client := newShell("CEDARPOST_TOKEN_FILE="+keyFile, "CEDARPOST_ADMIN_URL="+d.url("admin"), "CEDARPOST_API_URL="+d.url("decision"))
	client.exits(t, 0, says("shop: published"), "apply", "../../policies/shop")
	client.exits(t, 0, nil, "entities", "import", "../../policies/shop/entities.json")
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if _, err := conn.Exec(t.Context(), "alter table audit_batches rename to hidden"); err != nil {
		t.Fatal(err)
	}
	client.exits(t, codeFailed, says("unavailable"), ask("ViewOrder", "42")...)
	if _, err := conn.Exec(t.Context(), "alter table hidden rename to audit_batches"); err != nil {
		t.Fatal(err)
	}
	client.exits(t, 0, says("ALLOW"), ask("ViewOrder", "42")...)
	_ = cmd.Process.Signal(syscall.SIGTERM)
	if err := cmd.Wait(); err != nil {
		t.Errorf("ended with %v", err)
	}
}

// fill writes to a pipe until it is full.
func fill(t *testing.T, w *os.File) {
	t.Helper()
	fd := int(w.Fd())
	if err := syscall.SetNonblock(fd, true); err != nil {
		t.Fatal(err)
	}
	for err := error(nil); err == nil; {
		_, err = syscall.Write(fd, make([]byte, 512))
	}
	if err := syscall.SetNonblock(fd, false); err != nil {
		t.Fatal(err)
	}
}

func scrape(t *testing.T, url string) string {
	t.Helper()
	res, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}
