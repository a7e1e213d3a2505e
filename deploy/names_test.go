package deploy

import (
	"crypto/x509"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/internal/privateca"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/server/telemetry"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// metrics are what servers expose: for each metric its labels, and for each label its values.
type metrics map[string]map[string][]string

var (
	exposedHelp   = regexp.MustCompile(`^# HELP (\S+) (.*)\n?$`)
	exposedSample = regexp.MustCompile(`^([A-Za-z_]+)(?:\{(.*)\})? \S+`)
	exposedLabel  = regexp.MustCompile(`([a-z_]+)="((?:[^"\\]|\\.)*)"`)
)

func (m metrics) add(text string) {
	for line := range strings.Lines(text) {
		if h := exposedHelp.FindStringSubmatch(line); len(h) > 0 && m[h[1]] == nil {
			m[h[1]] = map[string][]string{}
		}
		s := exposedSample.FindStringSubmatch(line)
		if s == nil {
			continue
		}
		if m[s[1]] == nil { // such as the _bucket of a histogram
			m[s[1]] = map[string][]string{}
		}
		for _, l := range exposedLabel.FindAllStringSubmatch(s[2], -1) {
			m[s[1]][l[1]] = append(m[s[1]][l[1]], l[2])
		}
	}
}

// expose starts servers with all that has metrics, and returns the metrics and their helps.
func expose(t *testing.T) (all metrics, helps map[string]string) {
	t.Helper()
	databaseURL, dir := storetest.New(t), t.TempDir()
	certFile, keyFile := writePair(t, dir)
	standbys := func(c *server.Config) {
		db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(databaseURL), ReadURLs: []secret.Secret{secret.New(databaseURL)},
			Server: "tls", Event: decisionlog.ChangeEvents("tls")})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(db.Close)
		c.DB = db
	}
	plain := servertest.On(t, databaseURL, func(c *server.Config) {
		c.FirstHousekeeping = time.Millisecond
		c.Collectors = append(c.Collectors, telemetry.NewLines(io.Discard).Lost())
	})
	encrypted := servertest.On(t, databaseURL, standbys, func(c *server.Config) {
		c.TLSCert, c.TLSKey, c.Clients.CA, c.Clients.TrustDomains = certFile, keyFile, certFile, []string{"example.org"}
		c.SecretFiles = []server.SecretFile{{Setting: "tls-key", Path: keyFile}}
	})
	plain.MustLoadShop()
	servertest.DecideSome(t, plain, 20)
	if _, err := plain.Authorization.Authorize(t.Context(), servertest.AskShop("mallory", "ViewOrder", "42", true)); err != nil {
		t.Fatal(err)
	}
	all, helps = metrics{}, map[string]string{}
	servertest.Eventually(t, "the work of each hour has been done", func() bool {
		text := servertest.Metrics(t, plain) + servertest.Metrics(t, encrypted)
		all.add(text)
		for line := range strings.Lines(text) {
			if h := exposedHelp.FindStringSubmatch(line); h != nil {
				helps[h[1]] = h[2]
			}
		}
		done := all["cedarpost_background_success_timestamp_seconds"]["task"]
		return slices.Contains(done, "retention") && slices.Contains(done, "sweep")
	})
	// What no server has without a fault, or not in its first minutes.
	all.add(`cedarpost_telemetry_failures_total{signal="traces"} 0` + "\n" + `cedarpost_telemetry_dropped_total{signal="traces"} 0` + "\n")
	all.add(`cedarpost_principal_tokens_refused_total{reason="x"} 1` + "\n" + `cedarpost_history_swept_rows_total{table="x"} 1`)
	// What Prometheus adds.
	all.add(`up 1` + "\n" + `ALERTS{alertname="x",alertstate="firing",severity="page"} 1`)
	return all, helps
}

// writePair writes a certificate that signs itself, and its key.
func writePair(t *testing.T, dir string) (certFile, keyFile string) {
	t.Helper()
	pair, err := privateca.Issue(&x509.Certificate{DNSNames: []string{"localhost"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(1, 0, 0)}, nil)
	if err != nil {
		t.Fatal(err)
	}
	key, err := pair.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	certFile, keyFile = filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	for file, text := range map[string][]byte{certFile: pair.CertPEM(), keyFile: key} {
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return certFile, keyFile
}

var (
	selector = regexp.MustCompile(`\b((?:cedarpost|go|process|up|ALERTS)(?:_[a-z_]*[a-z])?)\b(?:\{([^}]*)\})?`)
	matcher  = regexp.MustCompile(`([a-z_]+) *(=~|!=|=) *"((?:[^"\\]|\\.)*)"`)
	grouping = regexp.MustCompile(`\b(?:by|on|without|ignoring) *\(([^)]*)\)`)
	anyQuote = regexp.MustCompile(`"(?:[^"\\]|\\.)*"`)
)

// check reports what an expression names and no server has: metrics, labels, and values of labels.
func (m metrics) check(expr string) (wrong []string) {
	labels := map[string]bool{"job": true, "instance": true}
	found := 0
	for _, s := range selector.FindAllStringSubmatch(expr, -1) {
		has, ok := m[s[1]]
		if !ok {
			// A matcher of the name of an alert begins like a metric.
			if strings.Contains(expr, `"`+s[1]) {
				continue
			}
			wrong = append(wrong, "there is no metric "+s[1])
			continue
		}
		found++
		for l := range has {
			labels[l] = true
		}
		for _, x := range matcher.FindAllStringSubmatch(s[2], -1) {
			label, op, value := x[1], x[2], x[3]
			if label == "job" || label == "instance" {
				continue
			}
			if has[label] == nil {
				wrong = append(wrong, fmt.Sprintf("%s has no label %s", s[1], label))
				continue
			}
			if s[1] != "ALERTS" && label != "code" { // most codes come with faults only
				wrong = append(wrong, unknownValues(s[1], label, op, value, has[label])...)
			}
		}
	}
	if found == 0 {
		wrong = append(wrong, "no metric")
	}
	for _, g := range grouping.FindAllStringSubmatch(anyQuote.ReplaceAllString(expr, ""), -1) {
		for l := range strings.SplitSeq(g[1], ",") {
			if l = strings.TrimSpace(l); !labels[l] {
				wrong = append(wrong, "no metric of it has a label "+l)
			}
		}
	}
	return wrong
}

// unknownValues reports the values of a matcher that no sample has.
func unknownValues(metric, label, op, value string, has []string) (wrong []string) {
	if op != "=~" {
		if !slices.Contains(has, value) {
			wrong = append(wrong, fmt.Sprintf("%s has no %s %q", metric, label, value))
		}
		return wrong
	}
	for alternative := range strings.SplitSeq(value, "|") {
		r := regexp.MustCompile("^(?:" + alternative + ")$")
		if !slices.ContainsFunc(has, r.MatchString) {
			wrong = append(wrong, fmt.Sprintf("%s has no %s like %q", metric, label, alternative))
		}
	}
	return wrong
}

// The rules, the dashboard and the documents name only metrics, labels and values that a real server has. The
// rules name each metric whose help says to alert on it, and docs/operations.md each task.
func TestNamesOfMetrics(t *testing.T) {
	t.Parallel()
	all, helps := expose(t)
	rules := string(read(t, rulesFile))
	for _, r := range readRules(t) {
		for _, w := range all.check(r.Expr) {
			t.Errorf("alert %s: %s", r.Alert, w)
		}
	}
	for _, p := range readDashboard(t) {
		for _, expr := range p.exprs {
			for _, w := range all.check(strings.ReplaceAll(expr, "$__rate_interval", "1m")) {
				t.Errorf("panel %q: %s", p.Title, w)
			}
		}
	}
	for name, help := range helps {
		if strings.Contains(help, "lert on it") && !strings.Contains(rules, name) {
			t.Errorf("the help of %s says to alert on it, and no rule does", name)
		}
	}
	named := regexp.MustCompile(`\bcedarpost_[a-z_]*[a-z]\b`)
	for _, file := range documents(t) {
		for _, name := range named.FindAllString(string(read(t, file)), -1) {
			if all[name] == nil && !slices.Contains(notMetrics, name) {
				t.Errorf("%s: there is no metric %s", file, name)
			}
		}
	}
	operations := string(read(t, "../docs/operations.md"))
	for _, task := range all["cedarpost_background_failures_total"]["task"] {
		if !strings.Contains(operations, "| `"+task+"` |") {
			t.Errorf("docs/operations.md does not name the task %s", task)
		}
	}
}

// notMetrics are other names in documents.
var notMetrics = []string{
	"cedarpost_owner", "cedarpost_app", "cedarpost_writer", "cedarpost_auditor", // roles
	"cedarpost_migrate", "cedarpost_serve", "cedarpost_audit", "cedarpost_new", // logins, and a database
}

// documents are all pages of docs, and those of this folder.
func documents(t testing.TB) (files []string) {
	t.Helper()
	for _, root := range []string{"../docs", "."} {
		err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
			if strings.HasSuffix(path, ".md") {
				files = append(files, path)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return files
}

// The check of names finds each kind of mistake.
func TestCheckFindsMistakes(t *testing.T) {
	t.Parallel()
	m := metrics{}
	m.add("# HELP cedarpost_a_total A.\n# TYPE cedarpost_a_total counter\ncedarpost_a_total{why=\"x\",plane=\"admin\"} 1\n")
	for expr, want := range map[string]string{
		`rate(cedarpost_a_total{why="x", job="j"}[5m])`:  "",
		`sum by (plane) (cedarpost_a_total{why=~"x|y"})`: `cedarpost_a_total has no why like "y"`,
		`cedarpost_b_total > 0`:                          "there is no metric cedarpost_b_total",
		`cedarpost_a_total{cause="x"}`:                   "cedarpost_a_total has no label cause",
		`cedarpost_a_total{why="y"}`:                     `cedarpost_a_total has no why "y"`,
		`sum by (cause) (cedarpost_a_total)`:             "no metric of it has a label cause",
		`vector(1)`:                                      "no metric",
	} {
		if got := m.check(expr); (want == "") != (len(got) == 0) || want != "" && !strings.Contains(strings.Join(got, "; "), want) {
			t.Errorf("%s: %q, want %q", expr, got, want)
		}
	}
}
