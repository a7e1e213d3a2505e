package cedarpost_test

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
)

// killed is what the child process of TestKilledClient prints from time to time.
type killed struct {
	// Answered is how many answers the child has got. Certain is how many of them are
	// in the log for certain: decisions, and uses whose report was confirmed. Reported
	// is the number of the latter.
	Answered, Certain, Reported int64
	// At is the time by the child's clock.
	At time.Duration
}

const killEnv = "CEDARPOST_TEST_KILL"

// A client that is killed loses the uses that it has not reported, and nothing else.
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
	// The child dies after three reports.
	var all []killed
	lines, reports := bufio.NewScanner(out), 0
	hear := func() error {
		var said killed
		err := json.Unmarshal(lines.Bytes(), &said)
		if err == nil {
			if len(all) > 0 && said.Reported > all[len(all)-1].Reported {
				reports++
			}
			all = append(all, said)
		}
		return err
	}
	for reports < 3 && lines.Scan() {
		if err := hear(); err != nil {
			t.Fatalf("%s: %v", lines.Text(), err)
		}
	}
	// A report may arrive at any time.
	for end := all[len(all)-1].At + rand.N(200*time.Millisecond); all[len(all)-1].At < end && lines.Scan(); {
		if err := hear(); err != nil {
			t.Fatalf("%s: %v", lines.Text(), err)
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for lines.Scan() { // what it printed before it died
		if hear() != nil {
			break // an incomplete line
		}
	}
	_ = cmd.Wait() // by a signal
	rows, uses := logged(t, s)
	said, covered := all[len(all)-1], time.Duration(0)
	for _, line := range all {
		if line.Answered <= rows+uses {
			covered = line.At
		}
	}
	t.Logf("of about %d answers the log has %d (%d decisions and %d uses): all but those of the last %v", said.Answered, rows+uses, rows, uses, said.At-covered)
	if reports < 3 || rows+uses < said.Certain {
		t.Errorf("%d reports; what was certain is not in the log", reports)
	}
}

// askForEver asks and prints its counts until it is killed.
func askForEver() {
	c, err := cedarpost.New(cedarpost.Config{ReportInterval: 100 * time.Millisecond})
	if err != nil {
		panic(err)
	}
	began := time.Now()
	for i := 0; ; i++ {
		if _, err := c.Authorize(context.Background(), view("alice", fmt.Sprint(i%10))); err != nil {
			panic(err)
		}
		if i%1000 == 0 {
			st := c.Stats()
			text, err := json.Marshal(killed{st.Decided + st.Reused, st.Decided + st.Reported, st.Reported, time.Since(began)})
			if err != nil {
				panic(err)
			}
			fmt.Println(string(text))
		}
	}
}
