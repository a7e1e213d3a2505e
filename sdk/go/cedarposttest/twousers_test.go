package cedarposttest_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/cedarposttest"
)

// app is a small program that asks Cedarpost about orders. Its hooks put bugs into it.
type app struct {
	client *cedarpost.Client
	mux    *http.ServeMux
	routes []string

	mu     sync.Mutex
	orders map[string]string // id → the customer's address

	ask    func(cedarpost.Check) (allowed bool, ok bool) // if ok, its answer replaces that of the client
	refuse func(w http.ResponseWriter, id string)
}

func newApp(t *testing.T) *app {
	svc := cedarposttest.New(t, shop)
	a := &app{client: svc.Client(), mux: http.NewServeMux(), orders: map[string]string{"42": "1 Bob's Road", "99": "2 Carol Lane"}}
	a.refuse = func(w http.ResponseWriter, _ string) { http.Error(w, "forbidden", http.StatusForbidden) }
	a.handle("GET /orders/{id}", "ViewOrder", func(w http.ResponseWriter, id string) { _ = json.NewEncoder(w).Encode(a.orders[id]) })
	a.handle("PUT /orders/{id}", "EditOrder", func(_ http.ResponseWriter, id string) { a.orders[id] += "!" })
	// A customer may not delete an order. Taking back an edit needs the same right as
	// editing.
	a.handle("DELETE /orders/{id}", "EditOrder", func(_ http.ResponseWriter, id string) { delete(a.orders, id) })
	return a
}

// handle adds a route that asks first.
func (a *app) handle(pattern, action string, do func(http.ResponseWriter, string)) {
	a.routes = append(a.routes, pattern)
	a.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
		who, id := r.Header.Get("User"), r.PathValue("id")
		if who == "" {
			http.Error(w, "who are you?", http.StatusUnauthorized)
			return
		}
		check := view(who, id)
		check.Action.ID = action
		allowed, ok := false, false
		if a.ask != nil {
			allowed, ok = a.ask(check)
		}
		if !ok {
			res, err := a.client.Authorize(r.Context(), check)
			allowed = err == nil && res.Allowed()
		}
		a.mu.Lock()
		defer a.mu.Unlock()
		if _, there := a.orders[id]; !there {
			http.NotFound(w, r)
			return
		}
		if !allowed {
			a.refuse(w, id)
			return
		}
		do(w, id)
	})
}

func (a *app) kit() cedarposttest.TwoUsers {
	customer := func(name, order, address string) cedarposttest.User {
		return cedarposttest.User{
			Name: name, Authenticate: func(r *http.Request) { r.Header.Set("User", name) },
			Objects: map[string]cedarposttest.Object{"order": {Values: map[string]string{"id": order}}},
			Secrets: []string{address},
		}
	}
	return cedarposttest.TwoUsers{
		Handler: a.mux, Registered: a.routes,
		A: customer("bob", "42", "1 Bob's Road"), B: customer("carol", "99", "2 Carol Lane"),
		Routes: []cedarposttest.Route{
			{Pattern: "DELETE /orders/{id}", Object: "order"},
			{Pattern: "GET /orders/{id}", Object: "order"},
			{Pattern: "PUT /orders/{id}", Object: "order", Body: `{"address": "of {id}"}`},
		},
	}
}

func TestTwoUsersOfASoundProgram(t *testing.T) {
	a := newApp(t)
	a.kit().Run(t)
	if len(a.orders) != 0 {
		t.Errorf("the last tries, to delete, left %v", a.orders)
	}
	report, err := newApp(t).kit().Report(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if n := len(report.Tries); n != 3*6 {
		t.Errorf("%d tries", n)
	}
	if table := report.String(); !strings.Contains(table, "GET /orders/{id}     bob     order 99 of carol  403     ok\n") {
		t.Errorf("%s", table)
	}
}

// fails runs the kit, and compares its failures with the expected ones.
func fails(t *testing.T, kit cedarposttest.TwoUsers, want ...string) {
	t.Helper()
	report, err := kit.Report(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if got := report.Failures(); !slices.Equal(got, want) {
		t.Errorf("found\n\t%s\nwant\n\t%s", strings.Join(got, "\n\t"), strings.Join(want, "\n\t"))
	}
}

func TestTwoUsersFind(t *testing.T) {
	action := func(c cedarpost.Check) string { return c.Action.ID }
	t.Run("a hole in one route", func(t *testing.T) {
		a := newApp(t)
		a.ask = func(c cedarpost.Check) (bool, bool) { return true, action(c) == "ViewOrder" }
		fails(t, a.kit(),
			"GET /orders/{id}: bob read order 99 of carol: 200",
			"GET /orders/{id}: carol read order 42 of bob: 200")
	})
	t.Run("holes that hide each other", func(t *testing.T) {
		a := newApp(t)
		a.ask = func(cedarpost.Check) (bool, bool) { return true, true }
		after := " (an earlier try reached this object, which it must not)"
		gone := func(route, who, what string) string {
			return fmt.Sprintf("%s: %s asked for own %s: 404, not a success, so that no refusal proves anything%s", route, who, what, after)
		}
		fails(t, a.kit(),
			"GET /orders/{id}: bob read order 99 of carol: 200",
			"GET /orders/{id}: carol read order 42 of bob: 200",
			"PUT /orders/{id}: bob changed order 99 of carol: 200",
			"PUT /orders/{id}: carol changed order 42 of bob: 200",
			"DELETE /orders/{id}: bob deleted order 99 of carol: 200",
			"DELETE /orders/{id}: carol deleted order 42 of bob: 200",
			gone("GET /orders/{id}", "bob", "order 42"), gone("GET /orders/{id}", "carol", "order 99"),
			gone("PUT /orders/{id}", "bob", "order 42"), gone("PUT /orders/{id}", "carol", "order 99"),
			gone("DELETE /orders/{id}", "bob", "order 42"), gone("DELETE /orders/{id}", "carol", "order 99"))
	})
	t.Run("a check of the role alone", func(t *testing.T) {
		a := newApp(t)
		// A check without the object allows every order to a user who may edit some
		// order.
		a.ask = func(c cedarpost.Check) (bool, bool) {
			return slices.Contains([]string{"bob", "carol"}, c.Principal.ID), action(c) == "EditOrder"
		}
		report, err := a.kit().Report(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if f := report.Failures(); !slices.Contains(f, "PUT /orders/{id}: carol changed order 42 of bob: 200") {
			t.Errorf("%q", f)
		}
	})
	t.Run("a refusal that says too much", func(t *testing.T) {
		a := newApp(t)
		a.refuse = func(w http.ResponseWriter, id string) {
			w.WriteHeader(http.StatusForbidden)
			_ = json.NewEncoder(w).Encode(map[string]string{"error": "not yours", "address": a.orders[id]})
		}
		kit := a.kit()
		kit.Routes, kit.Registered = kit.Routes[1:2], nil
		fails(t, kit,
			`GET /orders/{id}: bob was refused order 99 of carol with 403, and the answer has "2 Carol Lane", a secret of carol`,
			`GET /orders/{id}: carol was refused order 42 of bob with 403, and the answer has "1 Bob's Road", a secret of bob`)
	})
	t.Run("a secret that is hard to see", func(t *testing.T) {
		const secret = `Jürgen & "Co", 1/2 Road`
		for want, refuse := range map[string]func(http.ResponseWriter){
			"a secret of carol": func(w http.ResponseWriter) {
				w.WriteHeader(http.StatusForbidden)
				_, _ = io.WriteString(w, `{"address": "J\u00fcrgen & \"Co\", 1\/2 Road"}`)
			},
			"and the answer has": func(w http.ResponseWriter) {
				w.WriteHeader(http.StatusForbidden)
				_ = http.NewResponseController(w).Flush() // otherwise there is no trailer
				w.Header().Set(http.TrailerPrefix+"X-Address", secret)
			},
			`no answer: it is encoded as "br"`: func(w http.ResponseWriter) {
				w.Header().Set("Content-Encoding", "br")
				w.WriteHeader(http.StatusForbidden)
			},
			"no answer: it has more than": func(w http.ResponseWriter) {
				w.WriteHeader(http.StatusForbidden)
				_, _ = io.WriteString(w, strings.Repeat(" ", 16<<20)+secret)
			},
		} {
			a := newApp(t)
			a.refuse = func(w http.ResponseWriter, _ string) { refuse(w) }
			kit := a.kit()
			kit.Routes, kit.Registered = kit.Routes[1:2], nil
			kit.B.Secrets = []string{secret}
			report, err := kit.Report(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if f := report.Failures(); len(f) == 0 || !strings.Contains(f[0], want) {
				t.Errorf("want %q, found %q", want, f)
			}
		}
	})
	t.Run("other answers than a refusal", func(t *testing.T) {
		a := newApp(t)
		a.refuse = func(w http.ResponseWriter, id string) {
			if id == "42" {
				w.WriteHeader(http.StatusInternalServerError)
				return
			}
			w.Header().Set("Location", "/login")
			w.WriteHeader(http.StatusFound)
		}
		kit := a.kit()
		kit.Routes, kit.Registered = kit.Routes[1:2], nil
		fails(t, kit,
			"GET /orders/{id}: bob asked for order 99 of carol: 302, not 403 or 404",
			"GET /orders/{id}: carol asked for order 42 of bob: 500, not 403 or 404")
	})
	t.Run("a route that asks nobody who they are", func(t *testing.T) {
		a := newApp(t)
		a.mux.HandleFunc("GET /all", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(`["2 Carol Lane"]`)) })
		kit := a.kit()
		kit.Routes, kit.Registered = []cedarposttest.Route{{Pattern: "GET /all"}}, nil
		fails(t, kit,
			"GET /all: a request without a user read it: 200",
			`GET /all: bob got what is bob's own, and the answer has "2 Carol Lane", a secret of carol`)
	})
	t.Run("tries that prove nothing", func(t *testing.T) {
		a := newApp(t)
		a.ask = func(cedarpost.Check) (bool, bool) { return false, true }
		kit := a.kit()
		kit.Routes, kit.Registered = kit.Routes[1:2], nil
		fails(t, kit,
			"GET /orders/{id}: bob asked for own order 42: 403, not a success, so that no refusal proves anything",
			"GET /orders/{id}: carol asked for own order 99: 403, not a success, so that no refusal proves anything")
	})
	t.Run("a handler that panics", func(t *testing.T) {
		a := newApp(t)
		a.refuse = func(http.ResponseWriter, string) { panic("no") }
		kit := a.kit()
		kit.Routes, kit.Registered = kit.Routes[1:2], nil
		report, err := kit.Report(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if f := report.Failures(); len(f) != 2 || !strings.HasPrefix(f[0], "GET /orders/{id}: bob asked for order 99 of carol: no answer: ") {
			t.Errorf("%q", f)
		}
	})
	t.Run("routes that are not tried", func(t *testing.T) {
		a := newApp(t)
		kit := a.kit()
		kit.Registered = append(kit.Registered, "GET /healthz", "POST /orders/{id}/refund", "GET /metrics")
		kit.Skip = map[string]string{"GET /healthz": "says nothing of anybody", "GET /metrics": "", "GET /gone": "old"}
		kit.Routes = append(kit.Routes[1:2:2], cedarposttest.Route{Pattern: "HEAD /orders/{id}", Object: "order"})
		fails(t, kit,
			"HEAD /orders/{id} is tried, and not registered",
			"PUT /orders/{id} is registered, and nothing tries it",
			"DELETE /orders/{id} is registered, and nothing tries it",
			"POST /orders/{id}/refund is registered, and nothing tries it",
			"GET /gone is skipped, and not registered",
			"GET /metrics is skipped for no reason")
	})
}

func TestTwoUsersRefuse(t *testing.T) {
	for want, spoil := range map[string]func(*cedarposttest.TwoUsers){
		"give Handler or URL, one of the two": func(k *cedarposttest.TwoUsers) { k.Handler = nil },
		"no routes to try":                    func(k *cedarposttest.TwoUsers) { k.Routes = nil },
		"the two users need two names":        func(k *cedarposttest.TwoUsers) { k.B.Name = "bob" },
		"carol cannot authenticate":           func(k *cedarposttest.TwoUsers) { k.B.Authenticate = nil },
		"a secret of bob is empty, and every answer contains the empty text":                  func(k *cedarposttest.TwoUsers) { k.A.Secrets = []string{""} },
		`route "/orders/{id}" is not like GET /orders/{id}`:                                   func(k *cedarposttest.TwoUsers) { k.Routes[0].Pattern = "/orders/{id}" },
		"DELETE /orders/{id}: a success of 404 looks like a refusal":                          func(k *cedarposttest.TwoUsers) { k.Routes[0].Success = 404 },
		"DELETE /orders/{id}: bob has no invoice":                                             func(k *cedarposttest.TwoUsers) { k.Routes[0].Object = "invoice" },
		"DELETE /orders/{id}: nothing says what {id} is for bob":                              func(k *cedarposttest.TwoUsers) { k.Routes[0].Object = "" },
		"DELETE /orders/{id}: the request is the same for the order of bob and that of carol": func(k *cedarposttest.TwoUsers) { k.B.Objects = k.A.Objects },
	} {
		kit := newApp(t).kit()
		spoil(&kit)
		if _, err := kit.Report(t.Context()); err == nil || err.Error() != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

// Values in a pattern, a query and a body reach the program.
func TestTwoUsersRequests(t *testing.T) {
	var mu sync.Mutex
	var got []string
	kit := newApp(t).kit()
	kit.Registered = nil
	kit.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		var body struct{ ID string }
		_ = json.NewDecoder(r.Body).Decode(&body)
		mu.Lock()
		defer mu.Unlock()
		got = append(got, fmt.Sprintf("%s %s %s %s %s %s", r.Header.Get("User"), r.Method, r.URL.Path, r.URL.Query().Get("of"), body.ID, r.Header.Get("Content-Type")))
		w.WriteHeader(http.StatusForbidden)
	})
	kit.A.Objects = map[string]cedarposttest.Object{"file": {Values: map[string]string{"id": "a b", "path": "x/y z"}}}
	kit.B.Objects = map[string]cedarposttest.Object{"file": {Values: map[string]string{"id": "c&d", "path": "q"}, Body: `{"id": "own"}`}}
	kit.Routes = []cedarposttest.Route{{
		Pattern: "POST example.com/files/{id}/{path...}", Object: "file", Query: "of={id}", Body: `{"id": "{id}"}`,
		Header: http.Header{"content-type": {"application/merge-patch+json"}},
	}}
	if _, err := kit.Report(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"carol POST /files/a b/x/y z a b a b application/merge-patch+json",
		"bob POST /files/c&d/q c&d own application/merge-patch+json",
		" POST /files/c&d/q c&d own application/merge-patch+json",
	} {
		if !slices.Contains(got, want) {
			t.Errorf("no %q in %q", want, got)
		}
	}
}
