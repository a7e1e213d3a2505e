package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/server/servertest"
)

// TestKillUnderLoad kills the server at arbitrary moments while many callers wait for answers. The
// decision of every received answer must be in the table exactly once.
func TestKillUnderLoad(t *testing.T) { killUnderLoad(t, 3, "strict") }

// TestKillBufferedUnderLoad kills a server that answers before the commit. The number of missing
// decisions is within the bound, and the log records the crash.
func TestKillBufferedUnderLoad(t *testing.T) { killUnderLoad(t, 1, "buffered") }

// TestSoakKillUnderLoad is the long form.
func TestSoakKillUnderLoad(t *testing.T) {
	if os.Getenv("CEDARPOST_SOAK") == "" {
		t.Skip("long: make soak")
	}
	killUnderLoad(t, 40, "strict")
	killUnderLoad(t, 10, "buffered")
}

func killUnderLoad(t *testing.T, rounds int, mode string) {
	dir := dataDir(t)
	args := append([]string{"dev", "--data", dir, "--record-mode", mode}, anyPort...)
	answered := map[string]bool{}
	for round := range rounds {
		dev := newShell().start(t, args...)
		env := readEnv(t, filepath.Join(dir, "dev.env"))
		var mu sync.Mutex
		var wg sync.WaitGroup
		// Each round kills after another number of answers.
		killAfter := 300 + 137*round%400
		killed := make(chan struct{})
		got := 0
		for caller := range 16 {
			wg.Go(func() {
				for i := 0; ; i++ {
					a, err := askOnce(value(env, "CEDARPOST_API_URL"), value(env, "CEDARPOST_TOKEN"), fmt.Sprint((caller*31+i)%500))
					if err != nil {
						select {
						case <-killed:
							return
						case <-time.After(10 * time.Millisecond): // a busy machine answers late
							continue
						}
					}
					mu.Lock()
					answered[a.DecisionID] = true
					if got++; got == killAfter {
						close(killed)
					}
					mu.Unlock()
				}
			})
		}
		<-killed
		dev.stop(t, syscall.SIGKILL)
		wg.Wait()
	}
	dev := newShell().start(t, args...)
	env := readEnv(t, filepath.Join(dir, "dev.env"))
	database := value(env, "CEDARPOST_DATABASE_URL")
	recorded := servertest.DecisionIDs(t, database)
	missing := 0
	for id := range answered {
		if !recorded[id] {
			missing++
		}
	}
	const bound = 10_000 // of a buffered server
	if mode == "strict" && missing > 0 || missing > rounds*bound {
		t.Errorf("%d answered decisions are missing", missing)
	}
	// The header of a later batch records each crash.
	if _, err := askOnce(value(env, "CEDARPOST_API_URL"), value(env, "CEDARPOST_TOKEN"), "42"); err != nil {
		t.Fatal(err)
	}
	lost := map[string]string{"strict": "0", "buffered": fmt.Sprint(bound)}[mode]
	conn := servertest.Session(t, database)
	var crashes int
	var err error
	// A buffered server commits after it answers.
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		err = conn.QueryRow(t.Context(), `select count(*) from audit_batches,
			regexp_matches(convert_from(header, 'UTF8'), '^unclean \S+ '||$1||'$', 'ng')`, lost).Scan(&crashes)
		if err != nil || crashes == rounds {
			break
		}
	}
	if err != nil || crashes != rounds {
		t.Errorf("the log tells of %d crashes of %d, %v", crashes, rounds, err)
	}
	t.Logf("%d kills, %d answered, %d recorded, %d missing", rounds, len(answered), len(recorded), missing)
	dev.stop(t, syscall.SIGTERM)
}

// A server is killed right after the commit of a write. Its caller, which did not look at the reply, if there
// was one, sends the same request to the next server, and gets the answer of the first time.
func TestKilledBeforeItsReply(t *testing.T) {
	dir := dataDir(t)
	args := append([]string{"dev", "--data", dir}, anyPort...)
	const body = `{"idempotencyKey": "one of a kind", "operations": [{
		"put": {"uid": {"type": "Shop::Role", "id": "new"}}, "precondition": {"mustNotExist": true}}]}`
	write := func() (status int, answer map[string]any, err error) {
		env := readEnv(t, filepath.Join(dir, "dev.env"))
		req, err := http.NewRequest(http.MethodPost, value(env, "CEDARPOST_ADMIN_URL")+"/cedarpost.v1.EntityService/WriteEntities", strings.NewReader(body))
		if err != nil {
			return 0, nil, err
		}
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Authorization", "Bearer "+value(env, "CEDARPOST_TOKEN"))
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			return 0, nil, err
		}
		defer res.Body.Close()
		return res.StatusCode, answer, json.NewDecoder(res.Body).Decode(&answer)
	}
	dev := newShell().start(t, args...)
	newest := func() (n int64) {
		conn := servertest.Session(t, value(readEnv(t, filepath.Join(dir, "dev.env")), "CEDARPOST_DATABASE_URL"))
		if err := conn.QueryRow(t.Context(), "select n from revision").Scan(&n); err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := newest()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _, _ = write()
	}()
	for newest() == before {
		time.Sleep(time.Millisecond)
	}
	dev.stop(t, syscall.SIGKILL)
	<-ended
	dev = newShell().start(t, args...)
	status, answer, err := write()
	written, _ := answer["revision"].(map[string]any)
	if err != nil || status != http.StatusOK || written["number"] != fmt.Sprint(before+1) || answer["changed"] != float64(1) {
		t.Errorf("%d, %v, %v", status, answer, err)
	}
	if now := newest(); now != before+1 {
		t.Errorf("revision %d, then %d", before, now)
	}
	dev.stop(t, syscall.SIGTERM)
}

// answer has the parts of an answer that tests compare.
type answer struct {
	DecisionID, Decision string
	Revision             struct {
		Number int64 `json:",string"`
	}
}

// askOnce asks about one order with plain HTTP.
func askOnce(url, token, order string) (a answer, err error) {
	body, err := json.Marshal(map[string]any{
		"principal": map[string]string{"type": "Shop::User", "id": "dave"},
		"action":    map[string]string{"type": "Shop::Action", "id": "ViewOrder"},
		"resource":  map[string]string{"type": "Shop::Order", "id": order},
		"context":   map[string]bool{"mfa": true},
	})
	if err != nil {
		return a, err
	}
	req, err := http.NewRequest(http.MethodPost, url+"/cedarpost.v1.AuthorizationService/Authorize", bytes.NewReader(body))
	if err != nil {
		return a, err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", "Bearer "+token)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return a, err
	}
	defer res.Body.Close()
	if err := json.NewDecoder(res.Body).Decode(&a); err != nil {
		return a, err
	}
	if res.StatusCode != http.StatusOK || a.DecisionID == "" {
		return a, fmt.Errorf("status %d", res.StatusCode)
	}
	return a, nil
}
