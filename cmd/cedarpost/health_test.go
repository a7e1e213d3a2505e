package main

import (
	"net/http"
	"net/http/httptest"
	"testing"
)

// What the server says comes line by line, and control characters in it do not.
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
