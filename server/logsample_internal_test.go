package server

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"testing"

	"pgregory.net/rapid"
)

// Each line is written or counted exactly once. The number of written lines of an interval is
// bounded for each message, so that one message does not hide another.
func TestSampledLinesAreCounted(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var out bytes.Buffer
		s := newSampler(slog.NewJSONHandler(&out, nil))
		log := slog.New(s)
		sent, written := map[string]int64{}, map[string]int64{}
		for range rapid.IntRange(1, 3).Draw(t, "intervals") {
			out.Reset()
			for range rapid.IntRange(0, 40).Draw(t, "callers") {
				message := rapid.SampledFrom([]string{"call refused", "call failed"}).Draw(t, "message")
				caller, n := rapid.IntRange(0, 500).Draw(t, "caller"), rapid.IntRange(1, 30).Draw(t, "calls")
				for i := range n {
					log.Warn(message, "caller", fmt.Sprint(caller), "peer", i, "err", i)
				}
				sent[message] += int64(n)
			}
			s.sum()
			lines := map[string]int{}
			for d := json.NewDecoder(&out); d.More(); {
				var line struct {
					Message string `json:"msg"`
					More    int64
				}
				if err := d.Decode(&line); err != nil {
					t.Fatal(err)
				}
				lines[line.Message]++
				written[line.Message] += max(line.More, 1)
			}
			for message, n := range lines {
				if n > sampleLines+sampleSums+1 {
					t.Fatalf("%d lines of %q in one interval", n, message)
				}
			}
		}
		for message, n := range sent {
			if written[message] != n {
				t.Fatalf("%d lines of %q are written or counted, want %d", written[message], message, n)
			}
		}
	})
}

// The number of lines that are told apart is bounded.
func TestSampledKeysAreBounded(t *testing.T) {
	s := newSampler(slog.DiscardHandler)
	for i := range 10_000 {
		s.seen.count(sampleKey{message: "call refused", values: [5]string{3: fmt.Sprint(i)}}, slog.Value{})
	}
	if n := len(s.seen.lines); n > sampleKeys+1 {
		t.Errorf("%d kinds of lines are kept", n)
	}
	s.sum()
	s.sum()
	if n := len(s.seen.lines); n != 0 {
		t.Errorf("%d kinds of lines are kept after an interval without any", n)
	}
}

func TestAddressOf(t *testing.T) {
	for peer, want := range map[string]string{
		"192.0.2.7:80": "192.0.2.7", "[::ffff:192.0.2.7]:80": "192.0.2.7", "[2001:db8:1:2:3:4:5:6]:80": "2001:db8:1:2::", "[fe80::1%eth0]:80": "fe80::",
		"": "invalid IP", "@": "invalid IP", "192.0.2.7": "invalid IP",
	} {
		if got := addressOf(peer).String(); got != want {
			t.Errorf("%q: %s, want %s", peer, got, want)
		}
	}
}

// Lines of net/http about one address are counted together, whatever their port.
func TestLinesOfHTTP(t *testing.T) {
	var out bytes.Buffer
	s := newSampler(slog.NewTextHandler(&out, nil))
	log := httpLog(s)
	for port := range 50 {
		log.Printf("http: TLS handshake error from 192.0.2.7:%d: EOF", port)
		log.Printf("http2: server: error reading preface from client [2001:db8::%x]:1: read: reset", port)
		log.Printf("http: something else: %s", "with a reason")
	}
	s.sum()
	if n := bytes.Count(out.Bytes(), []byte("\n")); n != 6 {
		t.Errorf("%d lines, want 6:\n%s", n, out.String())
	}
	for _, want := range []string{`reason="http: TLS handshake error"`, "address=192.0.2.7 ", "address=2001:db8:: ", "more=49", "err=EOF"} {
		if !bytes.Contains(out.Bytes(), []byte(want)) {
			t.Errorf("no %s in:\n%s", want, out.String())
		}
	}
}
