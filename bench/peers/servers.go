package main

import (
	"bytes"
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/store/localpg"
)

// Here is how each server is started and gets the example shop.

var (
	//go:embed forms/shop.rego
	regoPolicy []byte
	//go:embed forms/order.yaml
	cerbosPolicy []byte
	//go:embed forms/model.json
	openfgaModel []byte
)

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
	err := s.launch(p, s.options.cedarpost, "dev", "--data", s.folder(p), "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0", "--rate-limit", "0")
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
