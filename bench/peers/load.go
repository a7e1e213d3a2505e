package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// afterwards is how long after the load CPU time still counts, so that work that a server puts off
// is in its figure.
const afterwards = time.Second

// load is what a turn does.
type load struct {
	connections int // each has one question, or one batch, at a time
	batch       bool
	grpc        bool
}

func (l load) String() string {
	protocol, what := "JSON", ""
	if l.grpc {
		protocol = "gRPC"
	}
	if l.batch {
		what = fmt.Sprintf(", batches of %d", batchSize)
	}
	return fmt.Sprintf("%s, %d connections%s", protocol, l.connections, what)
}

// outcome is what a load generator reports.
type outcome struct {
	requests int // answered with success
	errors   int // all others that were answered or failed
	took     time.Duration
	p50, p99 time.Duration
}

// turn is the result of one turn of one server.
type turn struct {
	outcome
	samples  int // answers that were read and compared meanwhile
	bad      int // of these: wrong, or errors
	cpu      usage[time.Duration]
	late     usage[time.Duration] // of this, after the load
	memory   usage[int64]         // at the end of the load
	recorded int64                // records that were written; -1: the server writes none
}

func (t turn) rate() float64 { return float64(t.requests) / t.took.Seconds() }

// loader runs load generators.
type loader struct {
	dir string // for files of the moment
	ghz string // program; "": there is none
}

// drive runs one turn. Its CPU time is that of the load and of the time afterwards.
func (l *loader) drive(ctx context.Context, p *peer, load load, length time.Duration) (t turn, err error) {
	before, err := cpu(os.DirFS("/proc"), p.pids)
	if err != nil {
		return t, fmt.Errorf("%s: %w", p.name, err)
	}
	written, err := p.written(ctx)
	if err != nil {
		return t, fmt.Errorf("%s: records: %w", p.name, err)
	}
	sampling, stop := context.WithCancel(ctx)
	sampled := make(chan [2]int)
	go func() {
		samples, bad := sample(sampling, p, load)
		sampled <- [2]int{samples, bad}
	}()
	t.outcome, err = l.generate(ctx, p, load, length)
	stop()
	counts := <-sampled
	t.samples, t.bad = counts[0], counts[1]
	if err != nil {
		return t, fmt.Errorf("%s, %v: %w", p.name, load, err)
	}
	if t.memory, err = memory(os.DirFS("/proc"), p.pids); err != nil {
		return t, fmt.Errorf("%s: %w", p.name, err)
	}
	end, err := cpu(os.DirFS("/proc"), p.pids)
	if err != nil {
		return t, fmt.Errorf("%s: %w", p.name, err)
	}
	if err := pause(ctx, afterwards); err != nil {
		return t, err
	}
	after, err := cpu(os.DirFS("/proc"), p.pids)
	if err != nil {
		return t, fmt.Errorf("%s: %w", p.name, err)
	}
	t.cpu = usage[time.Duration]{after.server - before.server, after.database - before.database}
	t.late = usage[time.Duration]{after.server - end.server, after.database - end.database}
	now, err := p.written(ctx)
	t.recorded = now - written
	if now < 0 {
		t.recorded = -1
	}
	return t, err
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// sample asks five times a second over HTTP, and compares the answers, until ctx ends.
func sample(ctx context.Context, p *peer, load load) (samples, bad int) {
	for pause(ctx, 200*time.Millisecond) == nil {
		err := p.check(ctx, load.questions())
		if ctx.Err() != nil {
			return samples, bad
		}
		if samples++; err != nil {
			bad++
			fmt.Fprintf(os.Stderr, "%s: a bad answer under load: %v\n", p.name, err)
		}
	}
	return samples, bad
}

// questions are those of one request.
func (l load) questions() []question {
	if l.batch {
		return batchQuestions
	}
	return []question{oneQuestion}
}

func (l *loader) generate(ctx context.Context, p *peer, load load, length time.Duration) (outcome, error) {
	to, message := p.callFor(load), p.body(p, load.questions(), load.batch)
	if fields, ok := message.(object); ok && load.grpc {
		maps.Copy(fields, p.grpcFields)
	}
	body, err := json.Marshal(message)
	if err != nil {
		return outcome{}, err
	}
	file := filepath.Join(l.dir, "body.json")
	if err := os.WriteFile(file, body, 0o600); err != nil {
		return outcome{}, err
	}
	if load.grpc {
		return l.runGhz(ctx, p, to.method, file, load.connections, length)
	}
	return l.runH2load(ctx, p, to.path, file, load.connections, length)
}

func (l *loader) runH2load(ctx context.Context, p *peer, path, body string, connections int, length time.Duration) (outcome, error) {
	log := filepath.Join(l.dir, "h2load.log")
	if err := os.Remove(log); err != nil && !errors.Is(err, os.ErrNotExist) {
		return outcome{}, err
	}
	args := []string{"--h1", "-t", "1", "-c", strconv.Itoa(connections), "-D", strconv.Itoa(int(length.Seconds())),
		"-d", body, "--log-file", log, "-H", "content-type: application/json"}
	for name, value := range p.headers {
		args = append(args, "-H", name+": "+value)
	}
	output, err := exec.CommandContext(ctx, "h2load", append(args, "http://"+p.address+path)...).CombinedOutput()
	if err != nil {
		return outcome{}, fmt.Errorf("h2load: %w: %s", err, bytes.TrimSpace(output))
	}
	o, err := parseH2load(string(output))
	if err != nil {
		return outcome{}, err
	}
	o.took = length
	f, err := os.Open(log)
	if err != nil {
		return outcome{}, err
	}
	defer f.Close()
	o.p50, o.p99, err = parseH2loadLog(f)
	return o, err
}

var (
	h2loadRequests = regexp.MustCompile(`(?m)^requests: (\d+) total, \d+ started, (\d+) done, (\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout$`)
	h2loadStatus   = regexp.MustCompile(`(?m)^status codes: (\d+) 2xx, (\d+) 3xx, (\d+) 4xx, (\d+) 5xx$`)
)

// parseH2load reads what h2load prints at its end.
func parseH2load(output string) (outcome, error) {
	requests, status := h2loadRequests.FindStringSubmatch(output), h2loadStatus.FindStringSubmatch(output)
	if requests == nil || status == nil {
		return outcome{}, fmt.Errorf("h2load printed no counts: %q", output)
	}
	var n [6]int
	for i, text := range requests[1:] {
		n[i], _ = strconv.Atoi(text) // the expression admits digits only
	}
	ok, _ := strconv.Atoi(status[1])
	done, failed := n[1], n[3]
	return outcome{requests: ok, errors: max(done-ok, failed)}, nil
}

// parseH2loadLog returns percentiles from h2load's log: a line for each request with its start,
// its status and its microseconds, and tabs between. Without an answer with success they are 0.
func parseH2loadLog(r io.Reader) (p50, p99 time.Duration, err error) {
	var times []time.Duration
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		fields := strings.Split(lines.Text(), "\t")
		if len(fields) < 3 {
			return 0, 0, fmt.Errorf("h2load's log: %q", lines.Text())
		}
		us, err := strconv.ParseInt(fields[2], 10, 64)
		if err != nil {
			return 0, 0, fmt.Errorf("h2load's log: %w", err)
		}
		if strings.HasPrefix(fields[1], "2") {
			times = append(times, time.Duration(us)*time.Microsecond)
		}
	}
	if err := lines.Err(); err != nil {
		return 0, 0, err
	}
	if len(times) == 0 {
		return 0, 0, nil
	}
	slices.Sort(times)
	return times[len(times)/2], times[len(times)*99/100], nil
}

func (l *loader) runGhz(ctx context.Context, p *peer, method, body string, connections int, length time.Duration) (outcome, error) {
	metadata, err := json.Marshal(p.headers)
	if err != nil {
		return outcome{}, err
	}
	n := strconv.Itoa(connections)
	cmd := exec.CommandContext(ctx, l.ghz, "--insecure", "--call", method, "--data-file", body,
		"--metadata", string(metadata), "--reflect-metadata", string(metadata),
		"--concurrency", n, "--connections", n, "--duration", length.String(), "--duration-stop", "wait", "--format", "json", p.grpcAddress)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	output, err := cmd.Output()
	if err != nil {
		return outcome{}, fmt.Errorf("ghz: %w: %s", err, bytes.TrimSpace(stderr.Bytes()))
	}
	return parseGhz(output)
}

// parseGhz reads the report of ghz --format json.
func parseGhz(report []byte) (outcome, error) {
	var r struct {
		Count        int
		Total        time.Duration
		Status       map[string]int `json:"statusCodeDistribution"`
		Distribution []struct {
			Percentage int
			Latency    time.Duration
		} `json:"latencyDistribution"`
	}
	if err := json.Unmarshal(report, &r); err != nil {
		return outcome{}, fmt.Errorf("ghz: %w", err)
	}
	o := outcome{requests: r.Status["OK"], errors: r.Count - r.Status["OK"], took: r.Total}
	for _, d := range r.Distribution {
		switch d.Percentage {
		case 50:
			o.p50 = d.Latency
		case 99:
			o.p99 = d.Latency
		}
	}
	return o, nil
}
