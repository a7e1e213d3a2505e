package cedarpost_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
)

// killed is what the child process of TestKilledClient says now and then.
type killed struct {
	// Answered is how many answers it has got, Certain how many of them are in the log
	// for certain: decisions, and uses whose report was confirmed.
	Answered, Certain int64
}

const killEnv = "CEDARPOST_TEST_KILL"

// A client that is killed has lost what it had not reported, and nothing else.
func TestKilledClient(t *testing.T) {
	if os.Getenv(killEnv) != "" {
		askForEver()
	}
	s := startShop(t)
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run", "^TestKilledClient$")
	cmd.Env = append(os.Environ(), killEnv+"=1", "CEDARPOST_API_URL="+s.API, "CEDARPOST_TOKEN="+s.Token)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// Three reports came through, then it dies.
	var said killed
	lines, reports := bufio.NewScanner(out), 0
	for reports < 3 && lines.Scan() {
		before := said.Certain
		if err := json.Unmarshal(lines.Bytes(), &said); err != nil {
			t.Fatalf("%s: %v", lines.Text(), err)
		}
		if said.Certain > before+1000 {
			reports++
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for lines.Scan() { // what it still said
		if err := json.Unmarshal(lines.Bytes(), &said); err != nil {
			break // half a line
		}
	}
	_ = cmd.Wait() // killed
	rows, uses := logged(t, s)
	t.Logf("at most %d answers, of which %d were certain to be in the log: it has %d (%d decisions and %d uses)", said.Answered, said.Certain, rows+uses, rows, uses)
	if reports < 3 || rows+uses < said.Certain {
		t.Errorf("%d reports; what was certain is not in the log", reports)
	}
}

// askForEver asks, and says how far it has come, until it is killed.
func askForEver() {
	c, err := cedarpost.New(cedarpost.Config{ReportInterval: 100 * time.Millisecond})
	if err != nil {
		panic(err)
	}
	for i := 0; ; i++ {
		if _, err := c.Authorize(context.Background(), view("alice", fmt.Sprint(i%10))); err != nil {
			panic(err)
		}
		if i%1000 == 0 {
			st := c.Stats()
			text, err := json.Marshal(killed{st.Decided + st.Reused, st.Decided + st.Reported})
			if err != nil {
				panic(err)
			}
			fmt.Println(string(text))
		}
	}
}
