package cedarposthttp_test

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/cedarposthttp"
	"github.com/cedarpost/cedarpost/sdk/go/cedarposttest"
	"github.com/cedarpost/cedarpost/sdk/go/enforce"
)

const shop = "../../../policies/shop"

func action(id string) cedarpost.EntityUID { return cedarpost.UID("Shop::Action", id) }

// session is the result of authentication. These tests take it from a header.
type session struct {
	user string
	mfa  bool
}

type sessionKey struct{}

func signedIn(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s := session{r.Header.Get("X-User"), r.Header.Get("X-Mfa") != ""}
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), sessionKey{}, s)))
	})
}

func principal(ctx context.Context) (cedarpost.EntityUID, error) {
	s, _ := ctx.Value(sessionKey{}).(session)
	switch s.user {
	case "":
		return cedarpost.EntityUID{}, enforce.ErrNoPrincipal
	case "panic":
		panic("who is this?")
	}
	return cedarpost.UID("Shop::User", s.user), nil
}

func factors(ctx context.Context) (map[string]any, error) {
	s, _ := ctx.Value(sessionKey{}).(session)
	return map[string]any{"mfa": s.mfa}, nil
}

// world is a service that decides, a guard that asks it, and a record of the calls of
// handlers.
type world struct {
	t     *testing.T
	svc   *cedarposttest.Service
	guard *enforce.Guard
	mux   *cedarposthttp.Mux
	log   strings.Builder

	mu      sync.Mutex
	reached []string
}

func newWorld(t *testing.T, options ...func(*enforce.Config)) *world {
	t.Helper()
	w := &world{t: t, svc: cedarposttest.New(t, shop)}
	cfg := enforce.Config{
		Client: w.svc.Client(), Principal: principal, Context: factors,
		StepUp: map[string]enforce.Challenge{"step_up_mfa": {ACRValues: []string{"mfa"}, MaxAge: 5 * time.Minute}},
		Log:    slog.New(slog.NewTextHandler(&w.log, nil)),
	}
	for _, o := range options {
		o(&cfg)
	}
	var err error
	if w.guard, err = enforce.New(cfg); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.guard.Close)
	w.mux = cedarposthttp.NewMux(w.guard)
	return w
}

// reach is a handler that records its call.
func (w *world) reach(what string) http.HandlerFunc {
	return func(rw http.ResponseWriter, r *http.Request) {
		w.mu.Lock()
		w.reached = append(w.reached, what+" "+r.PathValue("id"))
		w.mu.Unlock()
		_, _ = io.WriteString(rw, "done")
	}
}

// take returns the calls since it was last called.
func (w *world) take() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	got := w.reached
	w.reached = nil
	return got
}

type answer struct {
	*http.Response
	status  int
	body    string
	problem map[string]any
}

// as sends a request as "bob", "bob+mfa" or "".
func (w *world) as(who, method, target, body string, header ...string) answer {
	return w.send(w.mux, who, method, target, body, header...)
}

func (w *world) send(h http.Handler, who, method, target, body string, header ...string) answer {
	w.t.Helper()
	r := httptest.NewRequest(method, target, strings.NewReader(body))
	user, mfa := strings.CutSuffix(who, "+mfa")
	r.Header.Set("X-User", user)
	if mfa {
		r.Header.Set("X-Mfa", "yes")
	}
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	rec := httptest.NewRecorder()
	signedIn(h).ServeHTTP(rec, r)
	return read(w.t, rec.Result())
}

func read(t *testing.T, res *http.Response) answer {
	t.Helper()
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	a := answer{Response: res, status: res.StatusCode, body: string(text)}
	if res.Header.Get("Content-Type") == "application/problem+json" && len(text) > 0 {
		if err := json.Unmarshal(text, &a.problem); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		for name := range a.problem {
			if !slices.Contains([]string{"type", "title", "status", "detail", "decision_id", "fields"}, name) {
				t.Errorf("the problem has a member %q", name)
			}
		}
		if int(a.problem["status"].(float64)) != res.StatusCode {
			t.Errorf("status %d, in the body %v", res.StatusCode, a.problem["status"])
		}
	}
	return a
}
