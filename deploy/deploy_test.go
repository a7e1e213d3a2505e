// Package deploy has no code of its own: it is what an installation needs besides the program. Its tests keep the alert
// rules, the dashboard, the runbook and the metrics of a real server together.
package deploy

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v4"

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
