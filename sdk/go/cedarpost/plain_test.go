package cedarpost

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// After an HTTP/1.1 server was replaced by one of HTTP/2, the client trusts it again,
// and checks fail open when that one is away.
func TestServerThatDidNotSpeakHTTP2(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	old := &http.Server{Handler: htmlPage(200), ReadHeaderTimeout: time.Minute}
	go func() { _ = old.Serve(l) }()
	c, err := New(Config{Servers: []string{"http://" + l.Addr().String()}, CacheBytes: -1, Timeout: time.Minute, noPings: true, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close(canceled()) }()
	open := hitCheck
	open.FailOpen = "reads may go on"
	if r, err := c.Authorize(t.Context(), open); !errors.Is(err, ErrUnavailable) || r.Allowed() || !strings.Contains(err.Error(), "does not speak HTTP/2") {
		t.Errorf("allowed %v, %v", r.Allowed(), err)
	}
	_ = old.Close()
	if r, err := c.Authorize(t.Context(), open); !errors.Is(err, ErrUnavailable) || r.Allowed() {
		t.Errorf("after it has gone: allowed %v, %v", r.Allowed(), err)
	}
	if l, err = net.Listen("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	stopping := func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusServiceUnavailable)
		_, _ = io.WriteString(w, `{"code": "unavailable", "message": "the server is stopping"}`)
	}
	renewed := &http.Server{Handler: http.HandlerFunc(stopping), Protocols: new(http.Protocols), ReadHeaderTimeout: time.Minute}
	renewed.Protocols.SetUnencryptedHTTP2(true)
	go func() { _ = renewed.Serve(l) }()
	defer func() { _ = renewed.Close() }()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) { // its breaker may be open
		if r, err := c.Authorize(t.Context(), open); err == nil && r.FailedOpen() {
			break
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}
