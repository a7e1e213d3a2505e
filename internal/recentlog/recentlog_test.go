package recentlog_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"slices"
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
	if len(lines) != 101 {
		t.Fatalf("%d lines", len(lines))
	}
	for i, line := range lines[:100] {
		var got struct {
			Level, Msg, Server string
			G                  struct{ N int }
		}
		if err := json.Unmarshal(line, &got); err != nil || got.Msg != fmt.Sprint("line ", 350+i) || got.Server != "a" || got.G.N != 350+i || got.Level != "WARN" {
			t.Fatalf("%d: %v: %s", i, err, line)
		}
	}
	if last := lines[100]; len(last) != 4096 || last[4095] != '\n' || !bytes.Contains(last, []byte(`"msg":"long"`)) {
		t.Errorf("%d bytes: %.100s", len(last), last)
	}
	if text := out.String(); strings.Contains(text, "line") || !strings.Contains(text, "long") {
		t.Errorf("the log has %.200s", text)
	}
}

// Lines that anybody can cause push out neither errors nor other warnings.
func TestLinesOfStrangersKeepTheirShare(t *testing.T) {
	h := recentlog.Wrap(slog.DiscardHandler)
	log, around := slog.New(h), slog.New(h.Around(slog.DiscardHandler)).With("from", "around")
	for i := range 25 {
		around.Error("not recorded", "n", i)
		log.Warn("slow", "n", i)
	}
	for i := range 1000 {
		log.Warn("refused", "n", i)
		log.Warn("failed", "n", i)
	}
	var got []string
	for _, line := range h.Lines() {
		var l struct {
			Msg, From string
			N         int
		}
		if err := json.Unmarshal(line, &l); err != nil {
			t.Fatal(err)
		}
		got = append(got, fmt.Sprint(l.Msg, l.From, " ", l.N))
	}
	var want []string
	for i := range 20 {
		want = append(want, fmt.Sprint("not recordedaround ", 5+i), fmt.Sprint("slow ", 5+i))
	}
	for i := range 20 {
		want = append(want, fmt.Sprint("refused ", 980+i), fmt.Sprint("failed ", 980+i))
	}
	if !slices.Equal(got, want) {
		t.Errorf("kept %v", got)
	}
	for i := range 1000 {
		log.Error(fmt.Sprint("error ", i))
		log.Warn(fmt.Sprint("warning ", i))
	}
	if n := len(h.Lines()); n != 200 {
		t.Errorf("%d lines", n)
	}
}
