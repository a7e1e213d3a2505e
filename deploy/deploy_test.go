// Package deploy has no code of its own: it is what an installation needs besides the program. Its tests keep the alert
// rules, the dashboard, the runbook and the metrics of a real server together.
package deploy

import (
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v4"

	"github.com/cedarpost/cedarpost/internal/privateca"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/server/telemetry"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

func TestMain(m *testing.M) { storetest.Main(m) }

const (
	rulesFile     = "prometheus/cedarpost.rules.yaml"
	testsFile     = "prometheus/cedarpost.rules.test.yaml"
	dashboardFile = "grafana/cedarpost.json"
	runbookFile   = "../docs/runbook.md"
)

// alertRule is one alert of the rules.
type alertRule struct {
	Alert, Expr, For    string
	Labels, Annotations map[string]string
}

func readRules(t testing.TB) (rules []alertRule) {
	t.Helper()
	var file struct {
		Groups []struct {
			Name  string
			Rules []alertRule
		}
	}
	if err := yaml.Unmarshal(read(t, rulesFile), &file); err != nil {
		t.Fatal(err)
	}
	for _, g := range file.Groups {
		rules = append(rules, g.Rules...)
	}
	return rules
}

func read(t testing.TB, file string) []byte {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

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

// section is a part of the runbook about one alert.
type section struct{ name, text string }

func runbook(t testing.TB) (list []section) {
	t.Helper()
	for _, part := range strings.Split(string(read(t, runbookFile)), "\n### ")[1:] {
		name, text, _ := strings.Cut(part, "\n")
		text, _, _ = strings.Cut(text, "\n## ")
		list = append(list, section{name, text})
	}
	return list
}

// Each alert has a section of the runbook in the order of the rules, each section has an alert, and each says
// what the alert means, how to look, what to do, and when it is over.
func TestEachAlertHasItsSection(t *testing.T) {
	t.Parallel()
	var alerts, sections []string
	for _, r := range readRules(t) {
		alerts = append(alerts, r.Alert)
		if want := "docs/runbook.md#" + strings.ToLower(r.Alert); r.Annotations["runbook_url"] != want {
			t.Errorf("%s: runbook_url is %q, want %q", r.Alert, r.Annotations["runbook_url"], want)
		}
		if r.Labels["severity"] != "page" && r.Labels["severity"] != "ticket" {
			t.Errorf("%s: severity is %q", r.Alert, r.Labels["severity"])
		}
		for _, a := range []string{"summary", "description"} {
			if r.Annotations[a] == "" {
				t.Errorf("%s has no %s", r.Alert, a)
			}
		}
	}
	for _, s := range runbook(t) {
		sections = append(sections, s.name)
		for _, part := range []string{"**Means.** ", "**Look.**", "**Do.** ", "**Over** "} {
			if strings.Count(s.text, "\n"+part) != 1 {
				t.Errorf("the section %s has not one %q", s.name, part)
			}
		}
	}
	alerts = slices.Compact(alerts) // an alert may have a rule for each severity
	if !slices.Equal(alerts, sections) {
		t.Errorf("alerts:   %v\nsections: %v", alerts, sections)
	}
}

// Each alert has a unit test in which it fires, and one in which it does not.
func TestEachAlertHasUnitTests(t *testing.T) {
	t.Parallel()
	var file struct {
		Tests []struct {
			Name  string
			Exprs []struct {
				Expr    string
				Samples []any `yaml:"exp_samples"`
			} `yaml:"promql_expr_test"`
		}
	}
	if err := yaml.Unmarshal(read(t, testsFile), &file); err != nil {
		t.Fatal(err)
	}
	fires, silent := map[string]int{}, map[string]int{}
	for _, test := range file.Tests {
		alert, _, _ := strings.Cut(test.Name, " ")
		if len(test.Exprs) != 1 || !strings.Contains(test.Exprs[0].Expr, `"`+alert+`"`) {
			t.Errorf("%s: not one expression about %s", test.Name, alert)
			continue
		}
		if len(test.Exprs[0].Samples) > 0 {
			fires[alert]++
		} else {
			silent[alert]++
		}
	}
	for _, r := range readRules(t) {
		if fires[r.Alert] == 0 || silent[r.Alert] == 0 {
			t.Errorf("%s: %d tests in which it fires, %d in which it does not", r.Alert, fires[r.Alert], silent[r.Alert])
		}
	}
}

// panel is one panel of the dashboard.
type panel struct {
	ID                       int
	Type, Title, Description string
	Datasource               struct{ UID string }
	GridPos                  struct{ X, Y, W, H int }
	FieldConfig              struct{ Defaults struct{ Unit string } }
	Targets                  []struct{ Expr, RefID string }

	exprs []string
}

func readDashboard(t testing.TB) (panels []panel) {
	t.Helper()
	var file struct {
		Panels     []panel
		Templating struct{ List []struct{ Name, Type string } }
	}
	if err := json.Unmarshal(read(t, dashboardFile), &file); err != nil {
		t.Fatal(err)
	}
	var variables []string
	for _, v := range file.Templating.List {
		variables = append(variables, v.Name)
	}
	if want := []string{"datasource", "job", "instance"}; !slices.Equal(variables, want) {
		t.Errorf("the variables are %v, want %v", variables, want)
	}
	for i := range file.Panels {
		p := &file.Panels[i]
		for _, target := range p.Targets {
			p.exprs = append(p.exprs, target.Expr)
		}
	}
	return file.Panels
}

// The panels of the dashboard have ids of their own and do not overlap; each but a row has a unit, a description,
// the data source of the variable, and queries for the chosen servers. A panel that names an alert names one that exists.
func TestDashboard(t *testing.T) {
	t.Parallel()
	ids, taken := map[int]bool{}, map[[2]int]string{}
	alert := regexp.MustCompile(`Cedarpost[A-Z]\w+`)
	rules := readRules(t)
	for _, p := range readDashboard(t) {
		if p.ID == 0 || ids[p.ID] {
			t.Errorf("panel %q: id %d is taken", p.Title, p.ID)
		}
		ids[p.ID] = true
		for x := p.GridPos.X; x < p.GridPos.X+p.GridPos.W; x++ {
			for y := p.GridPos.Y; y < p.GridPos.Y+p.GridPos.H; y++ {
				if other := taken[[2]int{x, y}]; other != "" || x >= 24 {
					t.Fatalf("panel %q lies on %q, or beyond the right edge", p.Title, other)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
		if p.Type == "row" {
			continue
		}
		if p.Title == "" || p.Description == "" || p.FieldConfig.Defaults.Unit == "" || p.Datasource.UID != "${datasource}" || len(p.exprs) == 0 {
			t.Errorf("panel %d %q has no title, description, unit, variable data source or query", p.ID, p.Title)
		}
		for _, expr := range p.exprs {
			names := selector.FindAllStringSubmatch(expr, -1)
			if !strings.Contains(expr, "ALERTS{") && strings.Count(expr, `{job="$job", instance=~"$instance"`) != len(names) {
				t.Errorf("panel %q asks for more than the chosen servers: %s", p.Title, expr)
			}
		}
		for _, name := range alert.FindAllString(p.Description, -1) {
			if !slices.ContainsFunc(rules, func(r alertRule) bool { return r.Alert == name }) {
				t.Errorf("panel %q names the alert %s", p.Title, name)
			}
		}
	}
	if len(ids) < 20 {
		t.Errorf("only %d panels", len(ids))
	}
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

// The queries of the dashboard are valid PromQL: promtool checks them as rules. It is part of make alerts.
func TestQueriesOfDashboard(t *testing.T) {
	t.Parallel()
	promtool := os.Getenv("CEDARPOST_PROMTOOL")
	if promtool == "" {
		t.Skip("needs promtool: make alerts")
	}
	type rule struct {
		Record, Expr string
	}
	var rules []rule
	variables := strings.NewReplacer("$__rate_interval", "1m", "$job", "cedarpost", "$instance", ".*")
	for _, p := range readDashboard(t) {
		for i, expr := range p.exprs {
			rules = append(rules, rule{fmt.Sprintf("panel:%d:%d", p.ID, i), variables.Replace(expr)})
		}
	}
	text, err := yaml.Marshal(map[string]any{"groups": []any{map[string]any{"name": "dashboard", "rules": rules}}})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "dashboard.yaml")
	if err := os.WriteFile(file, text, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(promtool, "check", "rules", "--lint=none", file).CombinedOutput()
	if err != nil || !strings.Contains(string(out), fmt.Sprintf("SUCCESS: %d rules found", len(rules))) {
		t.Errorf("%v\n%s", err, out)
	}
}
