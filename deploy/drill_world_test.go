package deploy

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/cedarpost/cedarpost/internal/privateca"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store/localpg"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// node is one server of the drill, a process.
type node struct {
	name, ops, decision, admin string // addresses
	args                       []string
	log, clock                 string   // files
	telemetry                  []string // variables of its environment
	reader                     *os.File // of its stderr, whose lines go to log
	cmd                        *exec.Cmd
	dead                       <-chan struct{}
}

// world is what the faults are made in.
type world struct {
	t        *testing.T
	dir      string
	binary   string
	pg       *localpg.Server
	standby  *localpg.Server
	proxy    *servertest.Proxy // between server one and Postgres
	one, two *node
	ca       *privateca.Pair
	client   *http.Client
	token    string // of the operator
}

func (w *world) file(name string) string { return filepath.Join(w.dir, name) }

func newWorld(t *testing.T, dir string) *world {
	w := &world{t: t, dir: dir, binary: filepath.Join(dir, "cedarpost"), pg: storetest.NewServer(t)}
	w.build()
	w.run("migrate")
	w.standby = storetest.NewStandby(t, w.pg)
	w.proxy = servertest.NewProxy(t, w.pg.URL())
	w.certificates()
	w.run("audit", "keygen", "--name", "audit.example.org/cedarpost", w.file("audit.key"))
	write(t, w.file("mask.key"), strings.Repeat("ab", 32)+"\n")
	for _, name := range []string{"one", "two"} {
		if err := os.Mkdir(w.file(name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	write(t, w.file("standbys"), w.standby.URL()+"\n")
	w.one = w.node("one", w.proxy.URL(), "read-database-urls-file="+w.file("standbys"), "max-connections=60", "max-connections-per-address=60", "max-decisions=32")
	w.two = w.node("two", w.pg.URL(), "record-mode=buffered", "cache-mib=0", "max-connections-per-address=2048")
	w.start(w.one)
	w.start(w.two)
	text := read(t, w.file("operator.key"))
	w.token = strings.TrimSpace(string(text))
	w.run("grants", "put", "bootstrap", "break-glass", "--bundle", "shop")
	w.run("apply", "../policies/shop")
	w.run("entities", "import", "../policies/shop/entities.json")
	w.askAlways()
	return w
}

// build makes the program. Its clock can be set, and the work of each hour is done each minute.
func (w *world) build() {
	w.t.Helper()
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		w.t.Fatal(err)
	}
	library := filepath.Join(strings.TrimSpace(string(root)), "src", "time")
	clock := filepath.Join(library, "time.go")
	replace := map[string]string{filepath.Join(library, "drill.go"): absolute(w.t, "testdata/drill/time.txt")}
	for file, edits := range map[string][]string{
		clock: {"	sec, nsec, mono := runtimeNow()\n", "	sec, nsec, mono := runtimeNow()\n	sec += drillOffset.Load()\n"},
		absolute(w.t, "../server/housekeeping.go"): {"= 5 * time.Minute", "= 5 * time.Second", "= time.Hour", "= time.Hour / " + fmt.Sprint(faster)},
	} {
		text := string(read(w.t, file))
		for i := 0; i < len(edits); i += 2 {
			if strings.Count(text, edits[i]) != 1 {
				w.t.Fatalf("%s has not one %q", file, edits[i])
			}
			text = strings.Replace(text, edits[i], edits[i+1], 1)
		}
		replace[file] = w.file(filepath.Base(file))
		write(w.t, replace[file], text)
	}
	overlay, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		w.t.Fatal(err)
	}
	write(w.t, w.file("overlay.json"), string(overlay))
	cmd := exec.Command("go", "build", "-overlay", w.file("overlay.json"), "-ldflags=-w", "-o", w.binary, "../cmd/cedarpost")
	if out, err := cmd.CombinedOutput(); err != nil {
		w.t.Fatalf("%v\n%s", err, out)
	}
}

func absolute(t testing.TB, file string) string {
	t.Helper()
	path, err := filepath.Abs(file)
	if err != nil {
		t.Fatal(err)
	}
	return path
}

// certificates makes a CA and a certificate of the servers.
func (w *world) certificates() {
	var err error
	w.ca, err = privateca.Issue(&x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0)}, nil)
	if err != nil {
		w.t.Fatal(err)
	}
	write(w.t, w.file("ca.pem"), string(w.ca.CertPEM()))
	w.certificate("one", 90*24*time.Hour)
	w.certificate("two", 90*24*time.Hour)
	roots := x509.NewCertPool()
	roots.AddCert(w.ca.Cert)
	w.client = &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: "localhost"}, MaxIdleConnsPerHost: 8, ForceAttemptHTTP2: true}}
}

// certificate writes the certificate of a server.
func (w *world) certificate(name string, life time.Duration) {
	w.t.Helper()
	pair, err := privateca.Issue(&x509.Certificate{DNSNames: []string{"localhost"}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(life)}, w.ca)
	if err != nil {
		w.t.Fatal(err)
	}
	key, err := pair.KeyPEM()
	if err != nil {
		w.t.Fatal(err)
	}
	write(w.t, w.file(name+".key.pem"), string(key))
	write(w.t, w.file(name+".pem"), string(pair.CertPEM()))
}

func (w *world) node(name, databaseURL string, args ...string) *node {
	port := func() string { return freePort(w.t) }
	n := &node{name: name, ops: port(), decision: port(), admin: port(), log: w.file(name + ".log"), clock: w.file(name + ".clock")}
	write(w.t, n.clock, "0\n")
	write(w.t, w.file(name+".url"), databaseURL)
	config := fmt.Sprintf("name: %s\ndatabase-url-file: %s\ndevelopment-database: true\nlisten: %s\nadmin-listen: %s\nops-listen: %s\ndrain-delay: 0s\ntls-cert: %s\ntls-key: %s\nclient-ca: %s\nclient-trust-domain: example.org\naudit-key-file: %s\naudit-checkpoint-file: %s\nmask-key-file: %s\nbootstrap-key-file: %s\n",
		name, w.file(name+".url"), n.decision, n.admin, n.ops, w.file(name+".pem"), w.file(name+".key.pem"), w.file("ca.pem"), w.file("audit.key"), w.file(name+"/checkpoints"), w.file("mask.key"), w.file("operator.key"))
	for _, a := range args {
		key, value, _ := strings.Cut(a, "=")
		config += key + ": " + value + "\n"
	}
	write(w.t, w.file(name+".yaml"), config)
	n.args = []string{"serve", "--config", w.file(name + ".yaml")}
	return n
}

// start starts a server, and waits until it is ready.
func (w *world) start(n *node) {
	w.t.Helper()
	n.cmd = exec.Command(w.binary, n.args...)
	n.cmd.Env = append(append(clean(), "DRILL_CLOCK_FILE="+n.clock), n.telemetry...)
	out, err := n.cmd.StdoutPipe()
	if err != nil {
		w.t.Fatal(err)
	}
	stderr := w.pipe(n)
	n.cmd.Stderr = stderr
	n.dead = start(w.t, n.cmd, n.log)
	_ = stderr.Close() // the process has its own
	line, _ := bufio.NewReader(out).ReadString('\n')
	if !strings.HasPrefix(line, "ready ") {
		text, _ := os.ReadFile(n.log)
		w.t.Errorf("server %s: %q\n%s", n.name, line, text)
	}
}

// pipe returns what a server writes its log to. The lines go to the file of its log, until n.reader is closed.
func (w *world) pipe(n *node) (stderr *os.File) {
	w.t.Helper()
	log, err := os.OpenFile(n.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		w.t.Fatal(err)
	}
	reader, stderr, err := os.Pipe()
	if err != nil {
		w.t.Fatal(err)
	}
	go func() {
		_, _ = io.Copy(log, reader)
		_ = reader.Close()
		_ = log.Close()
	}()
	n.reader = reader
	return stderr
}

func clean() (env []string) {
	for _, kv := range os.Environ() {
		if !strings.HasPrefix(kv, "CEDARPOST_") && !strings.HasPrefix(kv, "PG") {
			env = append(env, kv)
		}
	}
	return append(env, "TZ=UTC", "LC_ALL=C.UTF-8")
}

func (w *world) server(name string) *node {
	if name == "two" {
		return w.two
	}
	return w.one
}

// env are the variables that the runbook expects.
func (w *world) env(on string) []string {
	n := w.server(on)
	return append(clean(), "PATH="+w.dir+":"+os.Getenv("PATH"), "OPS=http://"+n.ops, "LOG="+n.log, "DATABASE_URL="+w.pg.URL(), "CEDARPOST_CA="+w.file("ca.pem"),
		"CEDARPOST_TOKEN_FILE="+w.file("operator.key"), "CEDARPOST_ADMIN_URL=https://localhost:"+port(n.admin), "CEDARPOST_API_URL=https://localhost:"+port(n.decision),
		"CEDARPOST_CONFIG="+w.file(n.name+".yaml"), "PGCONNECT_TIMEOUT=5", "DRILL_CLOCK_FILE="+n.clock)
}

func port(address string) string { return address[strings.LastIndex(address, ":")+1:] }

// run runs a command of Cedarpost against server two, or a command on the database.
func (w *world) run(args ...string) string {
	w.t.Helper()
	cmd := exec.Command(w.binary, args...)
	if w.two != nil && w.two.cmd != nil {
		cmd.Env = w.env("two")
		for i, kv := range cmd.Env {
			if strings.HasPrefix(kv, "CEDARPOST_CONFIG=") {
				cmd.Env = append(cmd.Env[:i], cmd.Env[i+1:]...)
				break
			}
		}
	} else {
		cmd.Env = append(clean(), "CEDARPOST_DATABASE_URL="+w.pg.URL())
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		w.t.Errorf("cedarpost %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// sql runs statements as a superuser.
func (w *world) sql(statements string) {
	w.t.Helper()
	conn := w.session()
	defer conn.Close(context.Background())
	if _, err := conn.Exec(context.Background(), statements); err != nil {
		w.t.Error(err)
	}
}

func (w *world) session() *pgx.Conn {
	w.t.Helper()
	conn, err := pgx.Connect(context.Background(), w.pg.URL())
	if err != nil {
		w.t.Fatal(err)
	}
	return conn
}

// while calls do again and again, in so many goroutines, until the returned function is called.
func (w *world) while(n int, pause time.Duration, do func(ctx context.Context)) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	for range n {
		running.Go(func() {
			for ctx.Err() == nil {
				do(ctx)
				select {
				case <-ctx.Done():
				case <-time.After(pause):
				}
			}
		})
	}
	return func() { cancel(); running.Wait() }
}

// ask asks a server whether alice may view an order.
func (w *world) ask(ctx context.Context, client *http.Client, n *node, token, order string) (int, string) {
	return post(ctx, client, "https://"+n.decision+"/cedarpost.v1.AuthorizationService/Authorize", token,
		fmt.Sprintf(`{"principal": {"type": "Shop::User", "id": "alice"}, "action": {"type": "Shop::Action", "id": "ViewOrder"}, "resource": {"type": "Shop::Order", "id": %q}, "context": {"mfa": true}}`, order))
}

// askAlways asks both servers some questions each second, until the test ends.
func (w *world) askAlways() {
	for _, n := range []*node{w.one, w.two} {
		w.t.Cleanup(w.while(2, 200*time.Millisecond, func(ctx context.Context) {
			w.ask(ctx, w.client, n, w.token, fmt.Sprint(rand.IntN(1_000_000)))
		}))
	}
}

// newClient returns a client with connections of its own.
func (w *world) newClient() *http.Client {
	t := w.client.Transport.(*http.Transport).Clone()
	t.MaxIdleConnsPerHost = 1000
	w.t.Cleanup(t.CloseIdleConnections)
	return &http.Client{Timeout: 10 * time.Second, Transport: t}
}

// key makes a caller, and returns its key, when both servers know it.
func (w *world) key(name string) string {
	w.t.Helper()
	w.run("keys", "create", name, "--role", "enforcer", "--bundle", "*", "--out", w.file(name+".apikey"))
	key := strings.TrimSpace(string(read(w.t, w.file(name+".apikey"))))
	for _, n := range []*node{w.one, w.two} {
		waitFor(w.t, "server "+n.name+" knows the key of "+name, func() bool {
			status, _ := w.ask(context.Background(), w.client, n, key, "42")
			return status != 0 && status != http.StatusUnauthorized
		})
	}
	return key
}

// scrub replaces what differs from run to run, and what is of this machine.
func (w *world) scrub(text string) string {
	text = strings.ReplaceAll(text, w.dir+"/", "/etc/cedarpost/")
	for _, n := range []*node{w.one, w.two} {
		text = strings.NewReplacer(n.ops, n.name+":9090", n.admin, n.name+":8081", n.decision, n.name+":8080", "localhost:"+port(n.admin), n.name+":8081").Replace(text)
	}
	for _, r := range []struct{ pattern, with string }{
		{`postgres://[^ "?]*@127\.0\.0\.1:\d+/cedarpost(\?sslmode=disable)?`, "postgres://…@db/cedarpost"},
		{`127\.0\.0\.1:\d+`, "127.0.0.1:5432"}, {`port \d+ failed`, "port 5432 failed"}, {`127\.0\.0\.1 port \d+`, "127.0.0.1 port 9090"},
		{`[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}`, "019f6e2b-…"},
		{`/tmp/[^ "]*`, "/tmp/…"},
	} {
		text = regexp.MustCompile(r.pattern).ReplaceAllString(text, r.with)
	}
	var out strings.Builder
	for line := range strings.Lines(text) {
		if runes := []rune(strings.TrimRight(line, " \n")); len(runes) > 400 {
			line = string(runes[:400]) + "…"
		}
		out.WriteString(strings.TrimRight(line, " \n") + "\n")
	}
	return out.String()
}
