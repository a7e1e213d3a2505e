package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

func testLog(sh *shell) func(*testing.T) {
	return func(t *testing.T) {
		counted := func(by string, args ...string) []string {
			return append([]string{"decisions", "count", "--by", by}, args...)
		}
		sh.exits(t, 0, says("PRINCIPAL", `Shop::User::"bob"`, "decisions since"), counted("principal")...)
		sh.exits(t, 0, says("DENY at FIELD  0        1       1"), counted("outcome", "--denied-at", "field")...)
		sh.exits(t, 0, says("shop/owner-views"), counted("policy", "--decision", "allow")...)
		sh.exits(t, 0, says("0 decisions since"), counted("action", "--caller", "nobody")...)
		sh.exits(t, 0, says(`"total":"1"`), counted("action", "--denied-at", "field", "-o", "json")...)
		sh.exits(t, 2, says("this command has to read all decisions", "give --since"), counted("action", "--since", "48h")...)
		sh.exits(t, 0, says("FIELD", "customer.email"), counted("field")...)
		sh.exits(t, 0, says("RESOURCE", `Shop::Order::"42"`), counted("Resource")...)
		sh.exits(t, 2, nil, counted("weather")...)

		sh.exits(t, 0, says("log_read", "bootstrap", "/cedarpost.v1.AuditService/CountDecisions", "rows"), "events", "--kind", "log_read")
		sh.exits(t, 0, says("no events"), "events", "--caller", "nobody")
		if r := sh.exits(t, 0, nil, "events", "--subject", "/cedarpost.v1.AuditService/CountDecisions", "--since", "1h", "--limit", "3", "-o", "json"); len(lines(r.out)) != 3 {
			t.Errorf("--limit 3:\n%s", r.out)
		}

		sh.exits(t, 2, says("--trace-id has to read all decisions", "give --since"), "decisions", "--trace-id", "t")
		sh.exits(t, 0, says("no decisions"), "decisions", "--trace-id", "t", "--since", "24h")
		sh.exits(t, 0, says("no decisions"), "decisions", "--revision", "999999", "--since", "1h")
		sh.exits(t, 0, says("no decisions"), "decisions", "--masked-value", "@"+write(t, t.TempDir(), "v", `"x"`), "--since", "1h")
		testListGoesOn(t, sh)
		sh.exits(t, 2, says("--follow"), "decisions", "--masked-value", "1", "--follow")

		for format, want := range map[string]string{
			"ndjson": `"decision":{"decisionId":"`, "csv": "leaf,row,kind,time,id,caller", "ocsf": `"class_uid":6003`,
		} {
			r := sh.exits(t, 0, says(want), "decisions", "export", "--format", format)
			if n := len(lines(r.out)); n < 20 {
				t.Errorf("%s has %d lines", format, n)
			}
		}
		r := sh.exits(t, 0, nil, "decisions", "export", "--from-leaf", "3")
		if !strings.HasPrefix(r.out, `{"leaf":3,"row":0,`) {
			t.Errorf("from leaf 3: %.200s", r.out)
		}
		if r := sh.exits(t, 0, nil, "decisions", "export", "--since", "2100-01-01T00:00:00Z"); r.out != "" {
			t.Errorf("of the future: %.200s", r.out)
		}
		t.Run("killed", testExportKilled(sh))
		t.Run("rotated", testExportRotated(sh))
		t.Run("another log", func(t *testing.T) {
			state := write(t, t.TempDir(), "state", `{"leaf":2,"header":"00","file":"","size":0}`)
			sh.exits(t, 1, says("belongs to another log"), "decisions", "export", "--resume", state)
			state = write(t, t.TempDir(), "state", `{"leaf":1000000,"header":"00","file":"","size":0}`)
			sh.exits(t, 1, says("belongs to another log"), "decisions", "export", "--resume", state)
		})
		t.Run("follow", testListFollow(sh))
	}
}

func empty(file string) bool {
	info, err := os.Stat(file)
	return err != nil || info.Size() == 0
}

// testExportKilled kills an export repeatedly. In the end, each decision is in the file once.
func testExportKilled(sh *shell) func(*testing.T) {
	return func(t *testing.T) {
		dir := t.TempDir()
		file, state := filepath.Join(dir, "log.ndjson"), filepath.Join(dir, "state.json")
		export := []string{"decisions", "export", "--to", file, "--resume", state}
		var asked []string
		for round := range 4 {
			cmd := exec.Command(binary, append(export, "--follow")...)
			cmd.Env = sh.env
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			for range 10 {
				r := sh.exits(t, 0, nil, ask("ViewOrder", "42", "-o", "json")...)
				var got struct{ DecisionID string }
				if err := json.Unmarshal([]byte(r.out), &got); err != nil {
					t.Fatal(err)
				}
				asked = append(asked, got.DecisionID)
			}
			if round == 3 {
				// A follower that is asked to end writes the received rows first.
				for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
					if text, _ := os.ReadFile(file); strings.Contains(string(text), asked[len(asked)-1]) {
						break
					}
				}
				_ = cmd.Process.Signal(syscall.SIGTERM)
				if err := cmd.Wait(); err != nil {
					t.Errorf("asked to end: %v", err)
				}
				break
			}
			time.Sleep(time.Duration(round) * 700 * time.Millisecond)
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			// The file ends as if the export was in the middle of a line.
			f, err := os.OpenFile(file, os.O_APPEND|os.O_WRONLY, 0)
			if os.IsNotExist(err) || empty(state) {
				continue // it was killed before it began
			}
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprint(f, `{"leaf":`)
			f.Close()
		}
		sh.exits(t, 0, nil, export...)
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		seen := map[string]int{}
		last := int64(-1)
		for _, line := range lines(string(text)) {
			var row struct {
				Leaf     int64
				Decision struct{ DecisionID string }
			}
			if err := json.Unmarshal([]byte(line), &row); err != nil || row.Leaf < last {
				t.Fatalf("%v: %s", err, line)
			}
			last = row.Leaf
			seen[row.Decision.DecisionID]++
		}
		for _, id := range asked {
			if seen[id] != 1 {
				t.Errorf("decision %s is in the file %d times", id, seen[id])
			}
		}
		sh.exits(t, 1, says("is not empty"), "decisions", "export", "--to", file)
	}
}

// testExportRotated rotates the file of a follower in all the ways of logrotate. In the end, each
// decision is once in one of the files.
func testExportRotated(sh *shell) func(*testing.T) {
	return func(t *testing.T) {
		dir := t.TempDir()
		file, state := filepath.Join(dir, "log.ndjson"), filepath.Join(dir, "state.json")
		read := func(name string) string {
			text, err := os.ReadFile(name)
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Fatal(err)
			}
			return string(text)
		}
		files := []string{file}
		var asked []string
		var cmd *exec.Cmd
		start := func() {
			cmd = exec.Command(binary, "decisions", "export", "--to", file, "--resume", state, "--follow")
			cmd.Env, cmd.Stderr = sh.env, os.Stderr
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
		}
		// Rows written less than a second before a kill are not in the state yet. If the file
		// is rotated before the next start, they are written again.
		repeated := map[string]bool{}
		var steps []int
		kill := func() {
			if len(steps) > 1 {
				for _, id := range asked[steps[len(steps)-2]:] {
					repeated[id] = true
				}
			}
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
		all := func() (text string) {
			for _, name := range files {
				text += read(name)
			}
			return text
		}
		// decide asks for a few decisions, and waits until the newest is in a file. Right after
		// a rename, that can be the old file.
		decide := func() {
			t.Helper()
			id := ""
			for range 5 {
				r := sh.exits(t, 0, nil, ask("ViewOrder", "42", "-o", "json")...)
				var got struct{ DecisionID string }
				if err := json.Unmarshal([]byte(r.out), &got); err != nil {
					t.Fatal(err)
				}
				id = got.DecisionID
				asked = append(asked, id)
			}
			for range 1200 {
				if strings.Contains(all(), id) {
					return
				}
				time.Sleep(50 * time.Millisecond)
			}
			t.Fatalf("decision %s does not come into any file", id)
		}
		old := func() string {
			name := fmt.Sprintf("%s.%d", file, len(files))
			files = append(files, name)
			return name
		}
		copyTruncate := func() {
			if err := os.WriteFile(old(), []byte(read(file)), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(file, 0); err != nil {
				t.Fatal(err)
			}
		}
		rename := func() {
			if err := os.Rename(file, old()); err != nil {
				t.Fatal(err)
			}
		}
		start()
		steps = append(steps, len(asked))
		decide()
		for says, rotate := range map[string]func(){
			"copied and cut off": copyTruncate,
			"renamed":            rename,
			"renamed, and told so": func() {
				rename()
				_ = cmd.Process.Signal(syscall.SIGHUP)
			},
			"renamed, with a new file": func() {
				rename()
				if err := os.WriteFile(file, nil, 0o600); err != nil {
					t.Fatal(err)
				}
				_ = cmd.Process.Signal(syscall.SIGHUP)
			},
			"told so for nothing": func() { _ = cmd.Process.Signal(syscall.SIGHUP) },
			"renamed while it does not run": func() {
				kill()
				rename()
				start()
			},
			"cut off, and killed a little later": func() {
				copyTruncate()
				decide()
				kill()
				start()
			},
			"renamed, and killed a little later": func() {
				rename()
				decide()
				kill()
				start()
			},
		} {
			t.Log(says)
			steps = append(steps, len(asked))
			rotate()
			decide()
			for tries := 0; read(file) == ""; tries++ {
				if tries == 50 {
					t.Fatal("nothing comes into the file after it was rotated")
				}
				decide()
			}
		}
		_ = cmd.Process.Signal(syscall.SIGTERM)
		if err := cmd.Wait(); err != nil {
			t.Errorf("asked to end: %v", err)
		}
		seen := map[string]int{}
		for _, name := range files {
			for _, line := range lines(read(name)) {
				var row struct{ Decision struct{ DecisionID string } }
				if err := json.Unmarshal([]byte(line), &row); err != nil {
					t.Fatalf("%s: %v: %.100q", name, err, line)
				}
				seen[row.Decision.DecisionID]++
			}
		}
		for _, id := range asked {
			if seen[id] < 1 || seen[id] > 1 && !repeated[id] {
				t.Errorf("decision %s is in the files %d times", id, seen[id])
			}
		}
	}
}
