package main

import (
	"fmt"
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

// A server that is not ready says all reasons, in lines or as JSON.
func TestHealthPrintsReasons(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		text := "not ready: a\nnot ready: b\nwarning: clock: c\n"
		if r.Header.Get("Accept") == "application/json" {
			text = `{"ready":false,"reasons":[{"name":"database","text":"a"}],"warnings":[]}` + "\n"
		}
		w.WriteHeader(http.StatusServiceUnavailable)
		fmt.Fprint(w, text)
	}))
	defer s.Close()
	if r := newShell().exits(t, 1, nil, "health", "--ops-url="+s.URL); r.err != "cedarpost: not ready: a\n  not ready: b\n  warning: clock: c\n" {
		t.Errorf("%q", r.err)
	}
	if r := newShell().exits(t, 1, nil, "health", "--ops-url="+s.URL, "-o", "json"); r.out != `{"ready":false,"reasons":[{"name":"database","text":"a"}],"warnings":[]}`+"\n" || r.err != "" {
		t.Errorf("%q %q", r.out, r.err)
	}
}
