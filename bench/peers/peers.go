package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/cedarpost/cedarpost/store/localpg"
)

const (
	constantName  = "constant"
	cedarpostName = "cedarpost"
)

// kind is a server that can be measured.
type kind struct {
	name       string
	tool       *tool  // nil: it is of this repository
	question   string // what it can express of the question
	recorded   string // what it records of an answer
	constant   bool   // it answers only what is measured
	objectOnly bool   // its answers have no fields
	start      func(s *starter, ctx context.Context, p *peer, shop *shop) error
	body       func(p *peer, questions []question, batch bool) any
	read       func(body []byte, batch bool) ([]answer, error)
}

// all are the servers, in the order of the tables.
var all = []*kind{
	{name: constantName, question: "none: the same bytes each time", recorded: "no", constant: true,
		start: (*starter).constant, body: askCedarpost, read: readCedarpost},
	{name: "opa", tool: &opaTool, question: "order and fields, by stored data", recorded: "no",
		start: (*starter).opa, body: askOPA, read: readOPA},
	{name: "opa-log", tool: &opaTool, question: "as opa", recorded: "decision log on, to a file: after the answer, not synced",
		start: (*starter).opa, body: askOPA, read: readOPA},
	{name: "cerbos", tool: &cerbosTool, question: "order and fields; the caller sends all attributes", recorded: "no",
		start: (*starter).cerbos, body: askCerbos, read: func(body []byte, _ bool) ([]answer, error) { return readCerbos(body) }},
	{name: "cerbos-audit", tool: &cerbosTool, question: "as cerbos", recorded: "decision log on, to a file: after the answer, not synced",
		start: (*starter).cerbos, body: askCerbos, read: func(body []byte, _ bool) ([]answer, error) { return readCerbos(body) }},
	{name: "openfga", tool: &openfgaTool, question: "the order only, by stored data (Check, BatchCheck); no second factor", recorded: "no", objectOnly: true,
		start: (*starter).openfga,
		body:  func(p *peer, questions []question, batch bool) any { return askOpenFGA(p, questions, false, batch) },
		read:  func(body []byte, batch bool) ([]answer, error) { return readOpenFGA(body, false, batch) }},
	{name: "openfga-fields", tool: &openfgaTool, question: "order and fields, by stored data: a BatchCheck of five; no second factor", recorded: "no",
		start: (*starter).openfga,
		body:  func(p *peer, questions []question, batch bool) any { return askOpenFGA(p, questions, true, batch) },
		read:  func(body []byte, batch bool) ([]answer, error) { return readOpenFGA(body, true, batch) }},
	{name: cedarpostName, question: "order and fields, by stored data", recorded: "strict: committed and synced before the answer",
		start: (*starter).cedarpost, body: askCedarpost, read: readCedarpost},
}

func askCedarpost(_ *peer, questions []question, batch bool) any {
	return cedarpostBody(questions, batch)
}
func askOPA(_ *peer, questions []question, batch bool) any { return opaBody(questions, batch) }
func askCerbos(p *peer, questions []question, _ bool) any  { return cerbosBody(p.shop, questions) }

func askOpenFGA(p *peer, questions []question, withFields, batch bool) any {
	body := openfgaBody(questions, withFields, batch)
	body["authorization_model_id"] = p.model
	return body
}

func names() (list []string) {
	for _, k := range all {
		list = append(list, k.name)
	}
	return list
}

// call is where one kind of question goes.
type call struct{ path, method string } // of HTTP, and of gRPC

// peer is a server that runs, or is missing.
type peer struct {
	*kind
	missing       error // why it is not measured
	shop          *shop
	pids          []int // the roots of its trees of processes
	address       string
	grpcAddress   string // "": it has no gRPC
	single, batch call   // without a path: it has no such call
	headers       map[string]string
	model         string                                   // of OpenFGA
	grpcFields    object                                   // further fields of a message over gRPC
	records       func(ctx context.Context) (int64, error) // nil: it writes none
}

// takes reports whether the server has a call for the load.
func (p *peer) takes(l load) bool {
	return p.callFor(l).path != "" && (!l.grpc || p.grpcAddress != "")
}

func (p *peer) callFor(l load) call {
	if l.batch {
		return p.batch
	}
	return p.single
}

// written returns how many answers the server has recorded, or -1 if it records none.
func (p *peer) written(ctx context.Context) (int64, error) {
	if p.records == nil {
		return -1, nil
	}
	return p.records(ctx)
}

var client = &http.Client{Timeout: 20 * time.Second}

// check asks over HTTP and compares the answers with the expected ones.
func (p *peer) check(ctx context.Context, questions []question) error {
	batch := len(questions) > 1
	body, err := p.post(ctx, p.callFor(load{batch: batch}).path, p.body(p, questions, batch))
	if err != nil {
		return err
	}
	answers, err := p.read(body, batch)
	if err != nil {
		return fmt.Errorf("%w: %.300s", err, body)
	}
	return check(questions, answers, p.objectOnly)
}

func (p *peer) post(ctx context.Context, path string, body any) ([]byte, error) {
	text, err := json.Marshal(body)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+p.address+path, bytes.NewReader(text))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	for name, value := range p.headers {
		req.Header.Set(name, value)
	}
	return do(req)
}

func do(req *http.Request) ([]byte, error) {
	res, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err != nil {
		return nil, err
	}
	if res.StatusCode/100 != 2 {
		return nil, fmt.Errorf("%s %s: %s: %.300s", req.Method, req.URL.Path, res.Status, bytes.TrimSpace(answer))
	}
	return answer, nil
}

// starter starts servers, and stops all that it started.
type starter struct {
	options
	work      string // folder for data
	processes []*running
	databases []*localpg.Server
}

type running struct {
	cmd   *exec.Cmd
	ended chan struct{}
}

// start starts a server, waits until it answers, and checks its answers.
func (s *starter) start(ctx context.Context, k *kind, shop *shop) (*peer, error) {
	p := &peer{kind: k, shop: shop}
	if err := os.MkdirAll(s.folder(p), 0o755); err != nil {
		return nil, err
	}
	if err := k.start(s, ctx, p, shop); err != nil {
		return nil, err
	}
	for _, q := range trials {
		if k.constant && q != oneQuestion {
			continue
		}
		if err := s.answers(ctx, p, []question{q}); err != nil {
			return nil, err
		}
	}
	return p, s.answers(ctx, p, batchQuestions)
}

func (s *starter) folder(p *peer) string { return filepath.Join(s.work, p.name) }

func (s *starter) write(p *peer, name string, content []byte) (path string, err error) {
	path = filepath.Join(s.folder(p), name)
	return path, os.WriteFile(path, content, 0o600)
}

// answers waits until the server answers the questions. A wrong answer is an error at once.
func (s *starter) answers(ctx context.Context, p *peer, questions []question) error {
	last := s.processes[len(s.processes)-1]
	deadline := time.Now().Add(time.Minute)
	for {
		err := p.check(ctx, questions)
		if err == nil || errors.Is(err, errWrong) {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-last.ended:
			return fmt.Errorf("it has ended: %w", lastLine(filepath.Join(s.folder(p), "output")))
		case <-time.After(100 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("no answer within a minute: %w", err)
		}
	}
}

func lastLine(file string) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return errors.New(lines[len(lines)-1])
}

// launch starts a program. Its output goes to the file "output" in the server's folder.
func (s *starter) launch(p *peer, program string, args ...string) error {
	output, err := os.Create(filepath.Join(s.folder(p), "output"))
	if err != nil {
		return err
	}
	defer output.Close()
	cmd := exec.Command(program, args...) //nolint:noctx // stop ends it, in order
	cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = s.folder(p), environment(), output, output
	// Ctrl-C in the terminal must end this process only, which stops the servers.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	r := &running{cmd, make(chan struct{})}
	go func() {
		_ = cmd.Wait() // whoever waits for ended reads the output
		close(r.ended)
	}()
	s.processes = append(s.processes, r)
	p.pids = append(p.pids, cmd.Process.Pid)
	return nil
}

func (s *starter) bin() string { return filepath.Join(s.build, "bin") }

// stop ends all servers, after them their databases, and removes the data.
func (s *starter) stop() (err error) {
	for _, r := range s.processes {
		_ = r.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	}
	for _, r := range s.processes {
		select {
		case <-r.ended:
		case <-time.After(20 * time.Second):
			_ = r.cmd.Process.Kill()
			<-r.ended
		}
	}
	for _, db := range s.databases {
		err = errors.Join(err, db.Stop())
	}
	// The data of Postgres are elsewhere if its user cannot reach this folder (see store/localpg).
	links, _ := filepath.Glob(filepath.Join(s.work, "*", "postgres")) // the pattern is good
	for _, link := range links {
		if target, notLink := os.Readlink(link); notLink == nil {
			err = errors.Join(err, os.RemoveAll(target))
		}
	}
	return errors.Join(err, os.RemoveAll(s.work))
}

// environment is that of this process without settings of the servers, which would change what is
// measured.
func environment() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool {
		ours := strings.HasPrefix(v, "CEDARPOST_") && !strings.HasPrefix(v, localpg.BinEnv+"=")
		return ours || strings.HasPrefix(v, "OPA_") || strings.HasPrefix(v, "CERBOS_") || strings.HasPrefix(v, "OPENFGA_")
	})
}

// free returns an address of the loopback that nobody listens on.
func free() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // it ends at once
	if err != nil {
		return "", err
	}
	defer l.Close()
	return l.Addr().String(), nil
}

// listens gives the server free addresses.
func (p *peer) listens(overGRPC bool) (err error) {
	if p.address, err = free(); err == nil && overGRPC {
		p.grpcAddress, err = free()
	}
	return err
}
