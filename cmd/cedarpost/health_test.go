package main

import (
	"net/http"
	"net/http/httptest"
	"testing"
)

// The output has the lines of the server, without its control characters.
func TestHealthPrintsLines(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte("ready\nwarning: signing: a\nwarning: clock: \x1b[31mb\n"))
	}))
	defer s.Close()
	r := newShell().exits(t, 0, nil, "health", "--ops-url="+s.URL)
	if want := "ready\nwarning: signing: a\nwarning: clock: \\u{1b}[31mb\n"; r.out != want {
		t.Errorf("got %q, want %q", r.out, want)
	}
}
