package recentlog_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/cedarpost/cedarpost/internal/recentlog"
)

// Warnings and errors are kept whatever the level of the log is, the newest ones, in order and bounded.
func TestNewestLinesAreKept(t *testing.T) {
	var out bytes.Buffer
	h := recentlog.Wrap(slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelError}))
	if again := recentlog.Wrap(h); again != h {
		t.Error("wrapped twice")
	}
	log := slog.New(h).With("server", "a").WithGroup("g")
	log.Info("not kept")
	for i := range 450 {
		log.Warn(fmt.Sprint("line ", i), "n", i)
	}
	log.Error("long", "text", strings.Repeat("x", 100_000))
	lines := h.Lines()
	if len(lines) != 200 {
		t.Fatalf("%d lines", len(lines))
	}
	for i, line := range lines[:199] {
		var got struct {
			Level, Msg, Server string
			G                  struct{ N int }
		}
		if err := json.Unmarshal(line, &got); err != nil || got.Msg != fmt.Sprint("line ", 251+i) || got.Server != "a" || got.G.N != 251+i || got.Level != "WARN" {
			t.Fatalf("%d: %v: %s", i, err, line)
		}
	}
	if last := lines[199]; len(last) != 4096 || last[4095] != '\n' || !bytes.Contains(last, []byte(`"msg":"long"`)) {
		t.Errorf("%d bytes: %.100s", len(last), last)
	}
	if text := out.String(); strings.Contains(text, "line") || !strings.Contains(text, "long") {
		t.Errorf("the log has %.200s", text)
	}
}
