package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

const (
	opsEnv        = "CEDARPOST_OPS_URL"
	healthTimeout = 5 * time.Second
	// maxHealthBytes is more than all reasons and warnings have.
	maxHealthBytes = 64 << 10
)

type healthCmd struct {
	OpsURL string `name:"ops-url" help:"URL of the operations plane (default ${default})." env:"CEDARPOST_OPS_URL" default:"http://127.0.0.1:9090" placeholder:"URL" group:"client"`
	outputFlags
}

// Help is the long help of health.
func (*healthCmd) Help() string {
	return `Ready means that the server can decide and record a request now. Exits with 0 if it is ready, otherwise with 1 and all reasons. -o json prints {"ready": …, "reasons": [{"name", "text"}], "warnings": […]} in both cases. A line that begins with "warning: " names a problem that an operator has to solve, even if the server is ready.`
}

// Run asks once.
func (h *healthCmd) Run(ctx context.Context, c *console) error {
	ctx, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimRight(h.OpsURL, "/")+"/readyz", http.NoBody)
	if err != nil {
		return misuse("%q is not a URL like http://127.0.0.1:9090 (see %s)", h.OpsURL, opsEnv)
	}
	if h.json() {
		req.Header.Set("Accept", "application/json")
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return fmt.Errorf("%w\nis the server running? (%s says where)", err, opsEnv)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(io.LimitReader(res.Body, maxHealthBytes))
	if err != nil {
		return err
	}
	text := strings.TrimSpace(string(body))
	if h.json() {
		if !json.Valid(body) {
			return errors.New("the server does not answer in JSON: it is older than this command")
		}
		fmt.Fprintln(c.out, text)
		if res.StatusCode != http.StatusOK {
			return exitWith(codeFailed)
		}
		return nil
	}
	if res.StatusCode != http.StatusOK {
		return errors.New(text)
	}
	for _, line := range strings.Split(text, "\n") {
		fmt.Fprintln(c.out, clean(line))
	}
	return nil
}
