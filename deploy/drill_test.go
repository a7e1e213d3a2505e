package deploy

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.yaml.in/yaml/v4"
)

// faster is by how much the durations of the rules are divided in the drill, and the time between two runs
// of the work of each hour. windows in the rules are at least leastWindow: the drill scrapes each second.
const (
	faster      = 60
	leastWindow = 10 * time.Second
	patience    = 4 * time.Minute // for an alert to fire or to end, on a busy machine
)

// The fault of each alert is made for real, with two servers, Postgres, a standby and Prometheus. The alert fires, the
// commands of the runbook are run, the fault is taken away, and the alert is over. docs/alerts-transcript.md is what happened.
func TestDrillAlerts(t *testing.T) {
	if os.Getenv("CEDARPOST_DRILL_ALERTS") == "" {
		t.Skip("takes many minutes: make drill-alerts")
	}
	d := newDrill(t)
	faults := d.faults()
	sections := runbook(t)
	only := os.Getenv("DRILL_ONLY") // for those who work on a fault
	chosen := func(s section) bool { return only == "" || regexp.MustCompile(only).MatchString(s.name) }
	for _, s := range sections {
		if faults[s.name].make == nil {
			t.Errorf("the alert %s has no fault", s.name)
		}
	}
	// These take minutes to fire. Their faults are there while those before them are made.
	slow := []string{"CedarpostBackgroundFails", "CedarpostBackgroundStalls"}
	for _, s := range sections {
		if slices.Contains(slow, s.name) && chosen(s) {
			d.begin(s, faults[s.name])
		}
	}
	for _, s := range sections {
		if !chosen(s) {
			continue
		}
		if !slices.Contains(slow, s.name) {
			d.begin(s, faults[s.name])
		}
		d.end(s, faults[s.name])
	}
	d.awaitAll()
	if only != "" {
		t.Log("\n" + d.transcript(sections))
		return
	}
	if err := os.WriteFile("../docs/alerts-transcript.md", []byte(d.transcript(sections)), 0o644); err != nil {
		t.Fatal(err)
	}
}

// fault is how the fault of one alert is made and taken away.
type fault struct {
	what    string // the fault, in a sentence
	done    string // what was done about it, in a sentence
	on      string // the server that the fault is on: one, two, or "" if the alert may name either
	make    func()
	undo    func()
	removed func() // after the alert is over, if that has to wait
}

// result is what happened with one alert.
type result struct {
	fired, over time.Duration
	alert       firing
	looked      string
	began, done time.Time
	later       bool // looked whether it is over only when all others had been tried
}

// firing is an alert as Prometheus lists it.
type firing struct {
	Labels, Annotations map[string]string
	State               string
	ActiveAt            time.Time
}

type drill struct {
	t       *testing.T
	dir     string
	world   *world
	results map[string]*result
	rules   map[string]string // the shortened rules, by alert
	url     string            // of Prometheus
	log     func(format string, args ...any)
}

// alerts lists the alerts of a name that fire, or that fire or are pending.
func (d *drill) alerts(name string, states ...string) (list []firing) {
	d.t.Helper()
	var answer struct {
		Status string
		Data   struct{ Alerts []firing }
	}
	waitFor(d.t, "Prometheus lists its alerts", func() bool { // no answer must not count as no alert
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		req, _ := http.NewRequestWithContext(ctx, http.MethodGet, d.url+"/api/v1/alerts", http.NoBody)
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			return false
		}
		defer res.Body.Close()
		return json.NewDecoder(res.Body).Decode(&answer) == nil && answer.Status == "success"
	})
	for _, a := range answer.Data.Alerts {
		if a.Labels["alertname"] == name && slices.Contains(states, a.State) {
			list = append(list, a)
		}
	}
	return list
}

func (d *drill) begin(s section, f fault) {
	d.t.Helper()
	if f.make == nil {
		return
	}
	for end := time.Now().Add(patience); len(d.alerts(s.name, "firing", "pending")) > 0 && time.Now().Before(end); {
		time.Sleep(time.Second) // an earlier fault caused it, too
	}
	d.log("%s: %s", s.name, f.what)
	d.results[s.name] = &result{began: time.Now()}
	f.make()
}

// end waits until the alert fires, looks as the runbook says, and takes the fault away.
func (d *drill) end(s section, f fault) {
	d.t.Helper()
	r := d.results[s.name]
	if r == nil {
		return
	}
	for deadline := time.Now().Add(patience); ; time.Sleep(500 * time.Millisecond) {
		list := d.alerts(s.name, "firing")
		i := slices.IndexFunc(list, func(a firing) bool { // a slow machine can make it fire for the other server
			return f.on == "" || a.Labels["instance"] == "" || a.Labels["instance"] == f.on
		})
		if i >= 0 {
			r.alert, r.fired = list[i], time.Since(r.began)
			if !strings.Contains(d.rules[s.name], " for ") { // it may have fired while others were tried
				r.fired = max(list[i].ActiveAt.Sub(r.began), time.Millisecond)
			}
			break
		}
		if time.Now().After(deadline) {
			d.t.Errorf("%s does not fire", s.name)
			break
		}
	}
	d.log("%s: fires after %v", s.name, r.fired.Round(time.Second/10))
	r.looked = d.look(s, cmp.Or(r.alert.Labels["instance"], f.on, "one"))
	f.undo()
	r.done = time.Now()
	if !regexp.MustCompile(`\[(1|2)m\]`).MatchString(d.rules[s.name]) { // else it is over later
		d.await(s.name, f)
	}
}

// await waits until an alert is over.
func (d *drill) await(name string, f fault) {
	d.t.Helper()
	r := d.results[name]
	for deadline := time.Now().Add(patience); r.over == 0; time.Sleep(500 * time.Millisecond) {
		if len(d.alerts(name, "firing")) == 0 {
			r.over = time.Since(r.done)
		} else if time.Now().After(deadline) {
			d.t.Errorf("%s is not over", name)
			return
		}
	}
	d.log("%s: over after %v", name, r.over.Round(time.Second/10))
	if f.removed != nil {
		f.removed()
	}
}

func (d *drill) awaitAll() {
	for name, r := range d.results {
		if r.over == 0 && r.fired > 0 {
			r.later = true
			d.await(name, fault{})
		}
	}
}

var shellBlock = regexp.MustCompile("(?s)\n\\*\\*Look\\.\\*\\*.*?\n```sh\n(.*?)```")

// mistake is what a command prints that no fault is the reason of.
var mistake = regexp.MustCompile(`(?m)^.*(syntax error|does not exist$|command not found|unknown flag|unexpected argument).*$`)

// look runs the commands of the runbook one by one, and returns them with what they print.
func (d *drill) look(s section, on string) string {
	d.t.Helper()
	block := shellBlock.FindStringSubmatch(s.text)
	if block == nil {
		d.t.Errorf("the runbook has no commands for %s", s.name)
		return ""
	}
	var out strings.Builder
	for line := range strings.Lines(block[1]) {
		ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
		cmd := exec.CommandContext(ctx, "bash", "-c", "server_log() { cat \"$LOG\"; }\n"+strings.ReplaceAll(line, ":8080", ":"+port(d.world.server(on).decision)))
		cmd.Env = d.world.env(on)
		text, _ := cmd.CombinedOutput() // a command may fail because of the fault
		cancel()
		if wrong := mistake.Find(text); wrong != nil {
			d.t.Errorf("the runbook's command for %s is wrong: %s%s", s.name, line, wrong)
		}
		fmt.Fprintf(&out, "$ %s%s", line, text)
	}
	return d.world.scrub(out.String())
}

// transcript writes what happened.
func (d *drill) transcript(sections []section) string {
	var out strings.Builder
	fmt.Fprintf(&out, `# Each alert, tried for real

%[1]smake drill-alerts%[1]s wrote this page. It starts two servers (%[1]sone%[1]s, and %[1]stwo%[1]s in buffered mode), Postgres with a standby, and Prometheus, which scrapes
each second; callers ask some questions each second. For each alert it makes the fault, waits until Prometheus says that the alert fires, runs
the commands of [runbook.md](runbook.md), takes the fault away, and waits until the alert is over.

To take minutes in place of days, the drill divides the durations in the rules by %[2]d (windows are at least %[3]v), and so the time between two
runs of the work of each hour. Thresholds are those of the rules, but the three hours of CedarpostBackgroundStalls are three minutes. The
build of the servers also takes the offset of its clock from a file. All else is the program as it is.
`, "`", faster, leastWindow)
	faults := d.faults()
	for _, s := range sections {
		r, f := d.results[s.name], faults[s.name]
		if r == nil {
			continue
		}
		fmt.Fprintf(&out, "\n## %s\n\n**Fault.** %s\n\n**Rule of the drill.** `%s`\n\n", s.name, f.what, strings.Join(strings.Fields(d.rules[s.name]), " "))
		if r.fired == 0 {
			out.WriteString("**It did not fire.**\n")
			continue
		}
		fmt.Fprintf(&out, "**Fires** after %v, `severity=%s`: %s\n\n", r.fired.Round(time.Second), r.alert.Labels["severity"], strings.TrimSpace(d.world.scrub(r.alert.Annotations["summary"])))
		over := "**Over** after"
		if r.later {
			over = "**Over** when it was looked at again, after"
		}
		fmt.Fprintf(&out, "```console\n%s```\n\n**Done.** %s %s %v.\n", r.looked, f.done, over, r.over.Round(time.Second))
	}
	return out.String()
}

func newDrill(t *testing.T) *drill {
	d := &drill{t: t, dir: t.TempDir(), results: map[string]*result{}, rules: map[string]string{}, log: t.Logf}
	d.world = newWorld(t, d.dir)
	d.startPrometheus()
	return d
}

var durations = regexp.MustCompile(`\b(\d+)([mh])\b`)

// shorter divides a duration of the rules.
func shorter(text string, least time.Duration) string {
	return durations.ReplaceAllStringFunc(text, func(s string) string {
		span, err := time.ParseDuration(s)
		if err != nil {
			return s
		}
		span = max(span/faster, least)
		if span%time.Minute == 0 {
			return fmt.Sprintf("%dm", span/time.Minute)
		}
		return fmt.Sprintf("%ds", span/time.Second)
	})
}

// startPrometheus starts Prometheus with the rules, in which durations are shorter.
func (d *drill) startPrometheus() {
	t := d.t
	t.Helper()
	var rules map[string]any
	if err := yaml.Unmarshal(read(t, rulesFile), &rules); err != nil {
		t.Fatal(err)
	}
	for _, g := range rules["groups"].([]any) {
		for _, r := range g.(map[string]any)["rules"].([]any) {
			rule := r.(map[string]any)
			expr := strings.ReplaceAll(shorter(rule["expr"].(string), leastWindow), "3 * 3600", strconv.Itoa(3*3600/faster))
			rule["expr"] = expr
			d.rules[rule["alert"].(string)] = expr
			if span, ok := rule["for"].(string); ok {
				rule["for"] = shorter(span, 2*time.Second)
				d.rules[rule["alert"].(string)] += " for " + rule["for"].(string)
			}
		}
	}
	text, err := yaml.Marshal(rules)
	if err != nil {
		t.Fatal(err)
	}
	config := fmt.Sprintf(`{global: {scrape_interval: 1s, evaluation_interval: 1s, scrape_timeout: 1s}, rule_files: [rules.yaml], scrape_configs: [{job_name: cedarpost, static_configs: [
		{targets: [%q], labels: {instance: one}}, {targets: [%q], labels: {instance: two}}]}]}`, d.world.one.ops, d.world.two.ops)
	write(t, filepath.Join(d.dir, "rules.yaml"), string(text))
	write(t, filepath.Join(d.dir, "prometheus.yaml"), config)
	address := freePort(t)
	d.url = "http://" + address
	cmd := exec.Command(os.Getenv("CEDARPOST_PROMETHEUS"), "--config.file="+filepath.Join(d.dir, "prometheus.yaml"),
		"--storage.tsdb.path="+filepath.Join(d.dir, "prometheus"), "--web.listen-address="+address, "--log.level=error")
	start(t, cmd, filepath.Join(d.dir, "prometheus.log"))
	waitFor(t, "Prometheus", func() bool {
		res, err := http.Get(d.url + "/-/ready")
		if err != nil {
			return false
		}
		defer res.Body.Close()
		return res.StatusCode == http.StatusOK
	})
	// increase() counts from the first scrape on.
	query := d.url + "/api/v1/query?query=" + url.QueryEscape(`count(count_over_time(cedarpost_ready[1m]) >= 3) == 2`)
	waitFor(t, "three scrapes of both servers", func() bool {
		res, err := http.Get(query)
		if err != nil {
			return false
		}
		defer res.Body.Close()
		text, _ := io.ReadAll(res.Body)
		return strings.Contains(string(text), `"value"`)
	})
}

// start starts a program, and ends it after the test.
func start(t testing.TB, cmd *exec.Cmd, log string) (dead <-chan struct{}) {
	t.Helper()
	file, err := os.OpenFile(log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if cmd.Stdout == nil {
		cmd.Stdout = file
	}
	if cmd.Stderr == nil {
		cmd.Stderr = file
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		_ = cmd.Wait()
		close(ended)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		<-ended
	})
	return ended
}

func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(200 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

func write(t testing.TB, file, text string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func freePort(t testing.TB) string {
	t.Helper()
	for range 1000 {
		if l, err := net.Listen("tcp", fmt.Sprint("127.0.0.1:", 10_000+rand.IntN(10_000))); err == nil {
			_ = l.Close()
			return l.Addr().String()
		}
	}
	t.Fatal("no port is free")
	return ""
}

// post sends a message as JSON, and returns the status.
func post(ctx context.Context, client *http.Client, url, token, body string) (int, string) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader(body))
	if err != nil {
		return 0, err.Error()
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Content-Type", "application/json")
	res, err := client.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer res.Body.Close()
	text, _ := io.ReadAll(res.Body)
	return res.StatusCode, string(text)
}
