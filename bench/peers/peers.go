package main

import (
	"bytes"
	"context"
	_ "embed"
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
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/store/localpg"
)

var (
	//go:embed forms/shop.rego
	regoPolicy []byte
	//go:embed forms/order.yaml
	cerbosPolicy []byte
	//go:embed forms/model.json
	openfgaModel []byte
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

func (s *starter) constant(_ context.Context, p *peer, _ *shop) (err error) {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	if p.address, err = free(); err != nil {
		return err
	}
	p.grpcAddress = p.address
	p.single, p.batch = cedarpostCalls[0], cedarpostCalls[1]
	return s.launch(p, self, "constant", p.address)
}

var cedarpostCalls = [2]call{
	{cedarpostv1connect.AuthorizationServiceAuthorizeProcedure, "cedarpost.v1.AuthorizationService/Authorize"},
	{cedarpostv1connect.AuthorizationServiceAuthorizeBatchProcedure, "cedarpost.v1.AuthorizationService/AuthorizeBatch"},
}

func (s *starter) cedarpost(ctx context.Context, p *peer, _ *shop) error {
	// The database is in the data folder, with the settings of cedarpost dev.
	err := s.launch(p, s.options.cedarpost, "dev", "--data", s.folder(p), "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0")
	if err != nil {
		return err
	}
	ended := s.processes[len(s.processes)-1].ended
	for deadline := time.Now().Add(2 * time.Minute); ; {
		// dev writes the file when it serves.
		env, err := os.ReadFile(filepath.Join(s.folder(p), "dev.env"))
		if err == nil {
			return p.readEnv(string(env))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ended:
			return fmt.Errorf("it has ended: %w", lastLine(filepath.Join(s.folder(p), "output")))
		case <-time.After(100 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return errors.New("cedarpost dev was not ready within two minutes")
		}
	}
}

// readEnv takes addresses and key from dev.env.
func (p *peer) readEnv(env string) error {
	vars := map[string]string{}
	for line := range strings.Lines(env) {
		if name, value, ok := strings.Cut(strings.TrimPrefix(strings.TrimSpace(line), "export "), "="); ok {
			vars[name] = strings.Trim(value, "'")
		}
	}
	var ok bool
	if p.address, ok = strings.CutPrefix(vars["CEDARPOST_API_URL"], "http://"); !ok {
		return errors.New("dev.env has no CEDARPOST_API_URL")
	}
	p.grpcAddress = p.address
	p.single, p.batch = cedarpostCalls[0], cedarpostCalls[1]
	p.headers = map[string]string{"authorization": "Bearer " + vars["CEDARPOST_TOKEN"]}
	metrics := vars["CEDARPOST_OPS_URL"] + "/metrics"
	p.records = func(ctx context.Context) (int64, error) {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, metrics, nil)
		if err != nil {
			return 0, err
		}
		body, err := do(req)
		if err != nil {
			return 0, err
		}
		return countDecisions(string(body))
	}
	return nil
}

// countDecisions adds up cedarpost_decisions_total, which counts recorded decisions.
func countDecisions(metrics string) (total int64, err error) {
	for line := range strings.Lines(metrics) {
		if rest, ok := strings.CutPrefix(line, "cedarpost_decisions_total{"); ok {
			_, value, _ := strings.Cut(rest, "} ")
			n, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				return 0, err
			}
			total += int64(n)
		}
	}
	return total, nil
}

func (s *starter) opa(ctx context.Context, p *peer, shop *shop) error {
	program, err := p.tool.build(ctx, s.bin())
	if err != nil {
		return err
	}
	data, err := json.Marshal(object{"users": shop.users, "orders": shop.orders})
	if err != nil {
		return err
	}
	dataFile, err := s.write(p, "data.json", data)
	if err != nil {
		return err
	}
	policyFile, err := s.write(p, "shop.rego", regoPolicy)
	if err != nil {
		return err
	}
	if err := p.listens(false); err != nil {
		return err
	}
	p.single, p.batch = call{path: "/v1/data/shop/answer"}, call{path: "/v1/data/shop/answers"}
	args := []string{"run", "--server", "--addr", p.address, "--log-level", "error", "--skip-version-check"}
	if p.name == "opa-log" {
		args = append(args, "--set", "decision_logs.console=true")
		p.records = countLines(filepath.Join(s.folder(p), "output"), `"type":"openpolicyagent.org/decision_logs"`)
	}
	return s.launch(p, program, append(args, dataFile, policyFile)...)
}

func (s *starter) cerbos(ctx context.Context, p *peer, _ *shop) error {
	program, err := p.tool.build(ctx, s.bin())
	if err != nil {
		return err
	}
	if err := p.listens(true); err != nil {
		return err
	}
	policies := filepath.Join(s.folder(p), "policies")
	if err := os.MkdirAll(policies, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(policies, "order.yaml"), cerbosPolicy, 0o600); err != nil {
		return err
	}
	config := object{
		"server":    object{"httpListenAddr": p.address, "grpcListenAddr": p.grpcAddress},
		"storage":   object{"driver": "disk", "disk": object{"directory": policies}},
		"telemetry": object{"disabled": true},
	}
	if p.name == "cerbos-audit" {
		file := filepath.Join(s.folder(p), "audit.log")
		config["audit"] = object{"enabled": true, "decisionLogsEnabled": true, "backend": "file", "file": object{"path": file}}
		p.records = countLines(file, `"log.kind":"decision"`)
	}
	text, err := json.Marshal(config) // which is YAML
	if err != nil {
		return err
	}
	file, err := s.write(p, "config.yaml", text)
	if err != nil {
		return err
	}
	check := call{"/api/check/resources", "cerbos.svc.v1.CerbosService/CheckResources"}
	p.single, p.batch = check, check
	return s.launch(p, program, "server", "--config", file, "--log-level", "error")
}

// countLines returns a function that counts the lines of a file that have a text. It reads only
// what was appended since its last call.
func countLines(file, text string) func(context.Context) (int64, error) {
	var offset, count int64
	return func(context.Context) (int64, error) {
		f, err := os.Open(file)
		if errors.Is(err, os.ErrNotExist) {
			return 0, nil
		}
		if err != nil {
			return 0, err
		}
		defer f.Close()
		if _, err := f.Seek(offset, io.SeekStart); err != nil {
			return 0, err
		}
		appended, err := io.ReadAll(f)
		if err != nil {
			return 0, err
		}
		whole := bytes.LastIndexByte(appended, '\n') + 1
		count += int64(bytes.Count(appended[:whole], []byte(text)))
		offset += int64(whole)
		return count, nil
	}
}

func (s *starter) openfga(ctx context.Context, p *peer, shop *shop) error {
	program, err := p.tool.build(ctx, s.bin())
	if err != nil {
		return err
	}
	if err := p.listens(true); err != nil {
		return err
	}
	db, err := localpg.Start(ctx, localpg.Config{Dir: s.folder(p), Durable: true})
	if err != nil {
		return err
	}
	s.databases = append(s.databases, db)
	pid, err := os.ReadFile(filepath.Join(db.ClusterDir(), "data", "postmaster.pid"))
	if err != nil {
		return err
	}
	first, _, _ := strings.Cut(string(pid), "\n")
	postmaster, err := strconv.Atoi(first)
	if err != nil {
		return err
	}
	p.pids = append(p.pids, postmaster)
	datastore := []string{"--datastore-engine", "postgres", "--datastore-uri", db.URL()}
	migrate := exec.CommandContext(ctx, program, append([]string{"migrate"}, datastore...)...)
	migrate.Env = environment()
	if output, err := migrate.CombinedOutput(); err != nil {
		return fmt.Errorf("openfga migrate: %w: %s", err, bytes.TrimSpace(output))
	}
	args := append([]string{"run", "--http-addr", p.address, "--grpc-addr", p.grpcAddress, "--playground-enabled=false", "--metrics-enabled=false",
		"--log-level", "error", "--max-checks-per-batch-check", strconv.Itoa(batchSize * (len(fields) + 1))}, datastore...)
	if err := s.launch(p, program, args...); err != nil {
		return err
	}
	return p.fillOpenFGA(ctx, shop)
}

// fillOpenFGA writes the model and the shop's relations.
func (p *peer) fillOpenFGA(ctx context.Context, shop *shop) error {
	var made struct {
		ID    string `json:"id"`
		Model string `json:"authorization_model_id"`
	}
	for deadline := time.Now().Add(time.Minute); ; {
		body, err := p.post(ctx, "/stores", object{"name": "shop"})
		if err == nil {
			if err := json.Unmarshal(body, &made); err != nil {
				return err
			}
			break
		}
		if time.Now().After(deadline) {
			return err
		}
		if err := pause(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
	store := "/stores/" + made.ID
	body, err := p.post(ctx, store+"/authorization-models", json.RawMessage(openfgaModel))
	if err == nil {
		err = json.Unmarshal(body, &made)
	}
	if err != nil {
		return err
	}
	var tuples []object
	add := func(user, relation, to string) {
		tuples = append(tuples, object{"user": user, "relation": relation, "object": to})
	}
	for id, u := range shop.users {
		for _, role := range u.Roles {
			add("user:"+id, role, "shop:main")
		}
		if u.Suspended {
			add("user:"+id, "suspended", "shop:main")
		}
	}
	for id, o := range shop.orders {
		add("user:"+o.Owner, "owner", "order:"+id)
		add("shop:main", "shop", "order:"+id)
	}
	for len(tuples) > 0 {
		n := min(len(tuples), 100)
		if _, err := p.post(ctx, store+"/write", object{"authorization_model_id": made.Model, "writes": object{"tuple_keys": tuples[:n]}}); err != nil {
			return err
		}
		tuples = tuples[n:]
	}
	p.model = made.Model
	p.grpcFields = object{"store_id": made.ID}
	batch := call{store + "/batch-check", "openfga.v1.OpenFGAService/BatchCheck"}
	p.single, p.batch = call{store + "/check", "openfga.v1.OpenFGAService/Check"}, batch
	if p.name == "openfga-fields" {
		p.single = batch
	}
	return nil
}
