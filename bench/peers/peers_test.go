package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"
)

func read(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestH2loadIsRead(t *testing.T) {
	got, err := parseH2load(read(t, "h2load.txt"))
	if want := (outcome{requests: 13042}); err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
	got, err = parseH2load(read(t, "h2load-404.txt"))
	if want := (outcome{errors: 9}); err != nil || got != want {
		t.Errorf("failed requests: %+v, %v", got, err)
	}
	if _, err := parseH2load("the server refuses connections"); err == nil {
		t.Error("a text without counts is read")
	}
	var log strings.Builder
	for us := range 1000 {
		fmt.Fprintf(&log, "1795859289696634\t200\t%d\n", us)
	}
	p50, p99, err := parseH2loadLog(strings.NewReader(log.String()))
	if err != nil || p50 != 500*time.Microsecond || p99 != 990*time.Microsecond {
		t.Error(p50, p99, err)
	}
	// The last line of a recorded log has status 503, and does not count.
	p50, p99, err = parseH2loadLog(strings.NewReader(read(t, "h2load.log")))
	if err != nil || p50 != 103*time.Microsecond || p99 != 1533*time.Microsecond {
		t.Error(p50, p99, err)
	}
	for _, bad := range []string{"1795859289696634 200 1508", "1795859289696634\t200\tsoon"} {
		if _, _, err := parseH2loadLog(strings.NewReader(bad)); err == nil {
			t.Errorf("%q is read", bad)
		}
	}
}

func TestGhzIsRead(t *testing.T) {
	got, err := parseGhz([]byte(read(t, "ghz.json")))
	want := outcome{requests: 20, took: 7222892, p50: 295759, p99: 2303832}
	if err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
	got, err = parseGhz([]byte(read(t, "ghz-err.json")))
	if err != nil || got.requests != 0 || got.errors != 20 {
		t.Errorf("failed calls: %+v, %v", got, err)
	}
	if _, err := parseGhz([]byte("no report")); err == nil {
		t.Error("a text without a report is read")
	}
}

// proc is part of the /proc of a machine on which cedarpost dev runs with its Postgres, and OpenFGA
// is another process with a Postgres of its own.
func proc(t *testing.T) fstest.MapFS {
	t.Helper()
	files := fstest.MapFS{"uptime": {}, "self/stat": {}}
	for line := range strings.Lines(read(t, "stat.txt")) {
		pid, _, _ := strings.Cut(line, " ")
		files[pid+"/stat"] = &fstest.MapFile{Data: []byte(line)}
		files[pid+"/smaps_rollup"] = &fstest.MapFile{Data: []byte(read(t, "smaps_rollup"))}
	}
	return files
}

func TestUsageOfProcesses(t *testing.T) {
	files := proc(t)
	// A server that has started its Postgres: 22+5+49+44 ticks, and 1+3+24+30, 3+2 and 2 below.
	used, err := cpu(files, []int{20868})
	if want := (usage[time.Duration]{server: 1200 * time.Millisecond, database: 650 * time.Millisecond}); err != nil || used != want {
		t.Errorf("%+v, %v", used, err)
	}
	// A Postgres beside its server, with a command that Postgres has started.
	used, err = cpu(files, []int{900, 800})
	if want := (usage[time.Duration]{server: 70 * time.Millisecond, database: 120 * time.Millisecond}); err != nil || used != want {
		t.Errorf("%+v, %v", used, err)
	}
	const pss = 9788 << 10
	held, err := memory(files, []int{20868})
	if want := (usage[int64]{server: pss, database: 3 * pss}); err != nil || held != want {
		t.Errorf("%+v, %v", held, err)
	}
	if _, err := cpu(files, []int{12345}); err == nil {
		t.Error("a process that has ended has CPU time")
	}
	for _, bad := range []string{"", "1 cedarpost S 1", "x (a) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14", "1 (a) S 1 2", "1 (a) S 1 2 3 4 5 6 7 8 9 10 eleven 12 13 14"} {
		if _, err := parseStat(bad); err == nil {
			t.Errorf("%q is read", bad)
		}
	}
}

// The figures of a server are medians, and its ratio is that of turns of the same round: here the
// machine was half as fast in the third round.
func TestRowSumsUpTurns(t *testing.T) {
	turns := func(each ...int) (list []turn) {
		for _, n := range each {
			list = append(list, turn{outcome: outcome{requests: n, took: time.Second}, cpu: usage[time.Duration]{server: 300 * time.Millisecond, database: 100 * time.Millisecond}, recorded: int64(n)})
		}
		return list
	}
	constant := turns(4000, 4400, 2000)
	for i := range constant {
		constant[i].cpu.database = 0
	}
	r := sum(turns(1000, 1100, 500), constant)
	if r.rate != 1000 || r.ratio != 0.25 || r.recorded != 1 {
		t.Errorf("%+v", r)
	}
	if near := func(a, b float64) bool { return a > b*0.999 && a < b*1.001 }; !near(r.server, 900_000/2600.) || !near(r.database, 300_000/2600.) || !near(r.cpuRatio, 1_200_000/2600./(900_000/10400.)) {
		t.Errorf("%+v", r)
	}
}

func TestRecordsAreCounted(t *testing.T) {
	total, err := countDecisions("# TYPE cedarpost_decisions_total counter\ncedarpost_decisions_total{decision=\"allow\",denied_at=\"\"} 1.5e+06\ncedarpost_decisions_total{decision=\"deny\",denied_at=\"OBJECT\"} 2\ncedarpost_calls_total{code=\"ok\"} 7\n")
	if err != nil || total != 1_500_002 {
		t.Error(total, err)
	}
	file := filepath.Join(t.TempDir(), "log")
	count := countLines(file, `"kind":"decision"`)
	for _, step := range []struct {
		appended string
		want     int64
	}{
		{"", 0},
		{"{\"kind\":\"decision\"}\n{\"kind\":\"access\"}\n{\"kind\":\"deci", 1},
		{"sion\"}\n", 2},
	} {
		f, err := os.OpenFile(file, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteString(step.appended); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		if got, err := count(t.Context()); err != nil || got != step.want {
			t.Errorf("after %q: %d, %v", step.appended, got, err)
		}
	}
}

// Each server's form of an answer is read, and a wrong answer is noticed.
func TestAnswersAreCompared(t *testing.T) {
	list := []question{oneQuestion}
	batch := []question{{"alice", "1"}, {"dave", "2"}}
	const right, wrong = `"permitted":["total","status","id"]`, `"permitted":["id"]`
	for _, c := range []struct {
		name, body string
		questions  []question
	}{
		{"cedarpost", `{"decision":"ALLOW","fields":{` + right + `,"denied":["internal.notes"]}}`, list},
		{"opa", `{"result":{"allow":true,` + right + `}}`, list},
		{"cerbos", `{"results":[{"actions":{"view":"EFFECT_ALLOW","view:id":"EFFECT_ALLOW","view:status":"EFFECT_ALLOW","view:total":"EFFECT_ALLOW","view:internal.notes":"EFFECT_DENY"}}]}`, list},
		{"openfga", `{"allowed":true}`, list},
		{"openfga-fields", `{"result":{"0-view":{"allowed":true},"0-0":{"allowed":true},"0-1":{"allowed":true},"0-2":{"allowed":true},"0-3":{"allowed":false}}}`, list},
		{"cedarpost", `{"results":[{"response":{"decision":"ALLOW","fields":{"permitted":["id","status"]}}},{"response":{"decision":"ALLOW","fields":{"permitted":["id","internal.notes","status","total"]}}}]}`, batch},
		{"opa", `{"result":[{"allow":true,"permitted":["id","status"]},{"allow":true,"permitted":["id","status","total","internal.notes"]}]}`, batch},
		{"openfga", `{"result":{"0-view":{"allowed":true},"1-view":{"allowed":true}}}`, batch},
	} {
		k := all[slices.Index(names(), c.name)]
		reply := func(body string) error {
			answers, err := k.read([]byte(body), len(c.questions) > 1)
			if err != nil {
				return err
			}
			return check(c.questions, answers, k.objectOnly)
		}
		if err := reply(c.body); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		// One allow less is wrong.
		bad := strings.NewReplacer(right, wrong, "ALLOW", "DENY", "true", "false").Replace(c.body)
		if err := reply(bad); err == nil {
			t.Errorf("%s: %s is not noticed", c.name, bad)
		}
		if err := reply("{}"); err == nil {
			t.Errorf("%s: an empty answer is not noticed", c.name)
		}
	}
}

func TestFlagsAreChecked(t *testing.T) {
	o, err := parse([]string{"-peers", "opa,cedarpost", "-connections", "1,64", "-seconds", "2", "-sustained", "0"})
	if err != nil || len(o.peers) != 2 || !slices.Equal(o.connections, []int{1, 64}) || o.length != 2*time.Second || o.sustained != 0 {
		t.Errorf("%+v, %v", o, err)
	}
	for _, bad := range []string{"-peers=casbin", "-connections=0", "-connections=1,many", "-seconds=0", "-rounds=0", "-sustained=-1", "rest"} {
		if _, err := parse([]string{bad}); err == nil {
			t.Errorf("%s is accepted", bad)
		}
	}
}
