package cedarposthttp_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/cedarposthttp"
)

// For any spelling of a path, the check is about the object that the handler gets.
func TestPathTricks(t *testing.T) {
	w := newWorld(t)
	w.mux.Handle("GET /orders/{id}", view, w.reach("view"))
	w.mux.Handle("GET /orders/{id}/items/{item}", cedarposthttp.Route{Action: action("ViewOrder"), Resource: `Shop::Order::"{id}"`}, w.reach("item"))
	w.mux.Handle("GET /files/{id...}", view, w.reach("file"))
	w.mux.Handle("GET shop.example/orders/{id}", cedarposthttp.Route{Action: action("ViewOrder"), Resource: `Shop::Order::"{id}"`}, w.reach("host"))
	for _, c := range []struct {
		path    string
		status  int
		asked   string // the id of the check; "": there was none
		reached string
	}{
		{"/orders/42", 200, "42", "view 42"},
		{"/orders/%34%32", 200, "42", "view 42"},
		{"/orders/99", 403, "99", ""},
		{"/orders/42/", 404, "", ""},
		{"/orders//42", 307, "", ""},
		{"//orders/42", 307, "", ""},
		{"/orders/./42", 307, "", ""},
		{"/orders/99/../42", 307, "", ""},
		{"/orders/%2e/42", 404, "", ""}, // no dot segment for ServeMux; a segment too many
		{"/orders/99%2f..%2f42", 403, "99/../42", ""},
		{"/orders/42%2F", 403, "42/", ""},
		{"/orders/%2e%2e", 403, "..", ""},
		{"/orders/42%2Fitems%2F1", 403, "42/items/1", ""},
		{"/orders/42/items/99", 200, "42", "item 42"},
		{"/orders/99/items/42", 403, "99", ""},
		{"/orders/%2534%2532", 403, "%34%32", ""},
		{"/orders/42%00", 400, "", ""},
		{"/orders/42%20", 403, "42 ", ""},
		{"/orders/42;99", 403, "42;99", ""},
		{"/orders/42?id=99", 200, "42", "view 42"},
		{"/orders/99?id=42", 403, "99", ""},
		{"/orders/%22%7D", 403, `"}`, ""},
		{`/orders/42%22,Shop::Store::%22main`, 403, `42",Shop::Store::"main`, ""},
		{"/orders/٤٢", 403, "٤٢", ""}, // other digits
		{"/ORDERS/42", 404, "", ""},
		{"/files/42", 200, "42", "file 42"},
		{"/files/99/42", 403, "99/42", ""},
		{"/files/99/../42", 307, "", ""},
		{"/files/", 400, "", ""},
		{"http://shop.example/orders/42", 200, "42", "host 42"},
		{"http://shop.example:80/orders/99", 403, "99", ""},
	} {
		w.svc.ForgetDecisions()
		a := w.as("bob", "GET", c.path, "")
		asked := ""
		for _, d := range w.svc.Decisions() {
			asked += d.Resource.ID
			if d.Resource.Type != "Shop::Order" {
				t.Errorf("%s: asked about a %s", c.path, d.Resource.Type)
			}
		}
		if got := strings.Join(w.take(), ", "); a.status != c.status || asked != c.asked || got != c.reached {
			t.Errorf("%s: %d, asked about %q, reached %q; want %d, %q, %q", c.path, a.status, asked, got, c.status, c.asked, c.reached)
		}
	}
}

// ServeMux does not clean the path of CONNECT, and ignores X-Http-Method-Override.
func TestMethodTricks(t *testing.T) {
	w := shopWorld(t)
	w.mux.Handle("CONNECT /tunnel/{id}", view, w.reach("tunnel"))
	for target, want := range map[string]string{"/tunnel/42": "tunnel 42", "/tunnel/99": "", "/tunnel/99/../42": "", "//tunnel/42": ""} {
		if w.as("bob", "CONNECT", target, ""); strings.Join(w.take(), ",") != want {
			t.Errorf("CONNECT %s", target)
		}
	}
	if a := w.as("bob", "GET", "/orders/42", "", "X-Http-Method-Override", "DELETE"); a.status != 200 || w.take()[0] != "view 42" {
		t.Error("a header changed the method")
	}
	if a := w.as("bob", "OPTIONS", "*", ""); a.status < 400 {
		t.Errorf("OPTIONS *: %d", a.status)
	}
}

// ledger checks that each handler was reached only after an allow for its action and
// object.
type ledger struct {
	*world
	t interface{ Fatalf(string, ...any) }
}

// route is a route of the property test, with the check that it needs.
func (l *ledger) handler(act, typ string) http.HandlerFunc {
	return func(_ http.ResponseWriter, r *http.Request) {
		id := r.PathValue("id")
		if typ == "Shop::Store" {
			id = "main"
		}
		decisions := l.svc.Decisions()
		if len(decisions) == 0 {
			l.t.Fatalf("%s %s reached without a question", r.Method, r.URL)
			return
		}
		d := decisions[len(decisions)-1]
		if !d.Allowed || d.Action != action(act) || d.Resource != cedarpost.UID(typ, id) ||
			d.Principal.ID != r.Header.Get("X-User") {
			l.t.Fatalf("%s %s by %s reached with %s", r.Method, r.URL, r.Header.Get("X-User"), d)
		}
		l.take()
		l.mu.Lock()
		l.reached = append(l.reached, act)
		l.mu.Unlock()
	}
}

// No request to any route, in any spelling and by any user, reaches a handler without a
// recorded allow for that action on that object.
func TestNothingPassesWithoutAnAllow(t *testing.T) {
	w := newWorld(t)
	l := &ledger{world: w}
	routes := map[string]cedarposthttp.Route{
		"GET /orders/{id}":               view,
		"GET /secret/{id}":               hidden,
		"PATCH /orders/{id}":             edit,
		"DELETE /orders/{id}":            remove,
		"POST /orders/{id}/refund":       refund,
		"GET /orders":                    list,
		"GET /tree/{id...}":              view,
		"GET shop.example/orders/{id}/x": view,
	}
	plain := http.NewServeMux()
	for pattern, route := range routes {
		h := l.handler(route.Action.ID, strings.SplitN(route.Resource, `::"`, 2)[0])
		w.mux.Handle(pattern, route, h)
		plain.Handle(pattern, h)
	}
	// Behind Wrap there are routes without a mapping.
	forbidden := func(_ http.ResponseWriter, r *http.Request) { l.t.Fatalf("%s %s has no route", r.Method, r.URL) }
	plain.HandleFunc("GET /orders/export", forbidden)
	plain.HandleFunc("POST /orders/{id}/secret", forbidden)
	plain.HandleFunc("POST /", forbidden)
	wrapped, err := cedarposthttp.Wrap(w.guard, plain, routes)
	if err != nil {
		t.Fatal(err)
	}
	words := []string{"orders", "secret", "tree", "refund", "x", "42", "99", "44", "export", "..", ".", "", "%2e%2e", "%2F", "%252F", "42%2F..%2F99", "%34%32", "42?x", "ORDERS", "4%32"}
	passed := 0
	rapid.Check(t, func(rt *rapid.T) {
		l.t = rt
		w.svc.ForgetDecisions()
		path := "/" + strings.Join(rapid.SliceOfN(rapid.SampledFrom(words), 1, 5).Draw(rt, "path"), "/")
		if rapid.Bool().Draw(rt, "likely") {
			path = "/" + rapid.SampledFrom([]string{"orders", "secret", "tree"}).Draw(rt, "base") + "/" + rapid.SampledFrom(words).Draw(rt, "id")
		}
		host := rapid.SampledFrom([]string{"example.com", "shop.example", "SHOP.example:80"}).Draw(rt, "host")
		method := rapid.SampledFrom([]string{"GET", "HEAD", "PATCH", "DELETE", "POST", "OPTIONS", "CONNECT", "PUT", "get"}).Draw(rt, "method")
		who := rapid.SampledFrom([]string{"bob", "carol", "alice", "dave", "erin", "mallory", "dave+mfa", "erin+mfa", "stranger", "panic", ""}).Draw(rt, "who")
		body := rapid.SampledFrom([]string{"", "{}", `{"total":1}`, `{"shipping":{"address":"x"}}`, `{"internal":{"notes":"x"}}`, "[]"}).Draw(rt, "body")
		w.svc.Away(rapid.IntRange(0, 9).Draw(rt, "away") == 0)
		var h http.Handler = w.mux
		if rapid.Bool().Draw(rt, "wrapped") {
			h = wrapped
		}
		r := httptest.NewRequest(method, "/", strings.NewReader(body))
		u, err := r.URL.Parse("http://" + host + path)
		if err != nil {
			return
		}
		r.URL, r.Host = u, host
		r.URL.Host, r.URL.Scheme = "", ""
		user, mfa := strings.CutSuffix(who, "+mfa")
		r.Header.Set("X-User", user)
		r.Header.Set("Content-Type", "application/json")
		if mfa {
			r.Header.Set("X-Mfa", "yes")
		}
		rec := httptest.NewRecorder()
		signedIn(h).ServeHTTP(rec, r)
		if reached := w.take(); reached != nil {
			passed++
		} else if rec.Code < 300 {
			rt.Fatalf("%s %s: %d, but no handler was reached", method, path, rec.Code)
		}
	})
	w.svc.Away(false)
	if passed == 0 {
		t.Error("no request passed at all")
	}
}

func TestRoutesThatCannotBe(t *testing.T) {
	w := newWorld(t)
	ok := w.reach("never")
	byFunc := func(*http.Request) (cedarpost.EntityUID, error) { return cedarpost.EntityUID{}, nil }
	const order = `Shop::Order::"{id}"`
	a := action("ViewOrder")
	for want, c := range map[string]struct {
		pattern string
		route   cedarposthttp.Route
		handler http.Handler
	}{
		"no Action":                 {"GET /o/{id}", cedarposthttp.Route{Resource: order}, ok},
		"one of Resource":           {"GET /o/{id}", cedarposthttp.Route{Action: a}, ok},
		"of Resource and":           {"GET /o/{id}", cedarposthttp.Route{Action: a, Resource: order, ResourceOf: byFunc}, ok},
		"names no method":           {"/o/{id}", cedarposthttp.Route{Action: a, Resource: order}, ok},
		"which is not in the path":  {"GET /o/{other}", cedarposthttp.Route{Action: a, Resource: order}, ok},
		"is not a template":         {"GET /o/{id}", cedarposthttp.Route{Action: a, Resource: "{id}"}, ok},
		"either Public":             {"GET /o/{id}", cedarposthttp.Route{Action: a, Public: "both"}, ok},
		"either Public or has som":  {"GET /o/{id}", cedarposthttp.Route{Hide: true, Public: "both"}, ok},
		"both Fields and All":       {"GET /o/{id}", cedarposthttp.Route{Action: a, Resource: order, Fields: []string{"id"}, AllFields: true}, ok},
		"a route with Changes":      {"PATCH /o/{id}", cedarposthttp.Route{Action: a, Resource: order, Changes: cedarposthttp.MergePatch, Filter: true}, ok},
		"by FailOpen has no fields": {"PATCH /o/{id}", cedarposthttp.Route{Action: a, Resource: order, Changes: cedarposthttp.MergePatch, FailOpen: "why not"}, ok},
		"MaxBody":                   {"PATCH /o/{id}", cedarposthttp.Route{Action: a, Resource: order, MaxBody: 5}, ok},
		"no handler":                {"GET /o/{id}", cedarposthttp.Route{Action: a, Resource: order}, nil},
		"parsing":                   {"GET o", cedarposthttp.Route{Action: a, Resource: order}, ok},
		"no Action; if it needs":    {"GET /o", cedarposthttp.Route{}, ok},
	} {
		got := func() (got string) {
			defer func() { got = fmt.Sprint(recover()) }()
			w.mux.Handle(c.pattern, c.route, c.handler)
			return ""
		}()
		if !strings.Contains(got, want) {
			t.Errorf("%s: %s", want, got)
		}
	}
	if a := w.as("bob", "GET", "/o/42", ""); a.status != 404 {
		t.Errorf("a route that was refused is served: %d", a.status)
	}
}

func TestWrap(t *testing.T) {
	w := newWorld(t)
	next := http.NewServeMux()
	next.Handle("GET /orders/{id}", w.reach("view"))
	next.Handle("GET /orders/export", w.reach("export"))
	next.Handle("/admin/", w.reach("admin"))
	next.Handle("GET /{$}", w.reach("home"))
	next.Handle("GET api.example/v1/orders/{id}", w.reach("api"))
	h, err := cedarposthttp.Wrap(w.guard, next, map[string]cedarposthttp.Route{
		"GET /orders/{id}":               view,
		"GET /{$}":                       {Public: "the start page"},
		"GET api.example/v1/orders/{id}": view,
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		who, method, target string
		status              int
		reached             string
	}{
		{"bob", "GET", "/orders/42", 200, "view 42"},
		{"bob", "GET", "/orders/99", 403, ""},
		{"dave", "GET", "/orders/export", 404, ""}, // not an order called "export"
		{"dave", "GET", "/orders/exports", 200, "view exports"},
		{"dave", "GET", "/admin/", 404, ""},
		{"dave", "GET", "/admin/users", 404, ""},
		{"dave", "GET", "/nothing", 404, ""},
		{"dave", "POST", "/orders/42", 405, ""},
		{"", "GET", "/", 200, "home "},
		{"bob", "GET", "http://api.example/v1/orders/42", 200, "api 42"},
		{"bob", "GET", "http://api.example/v1/orders/99", 403, ""},
		{"bob", "GET", "http://other.example/v1/orders/42", 404, ""},
		{"bob", "GET", "/orders/../admin/", 404, ""}, // ServeMux would redirect it to /admin/
	} {
		a := w.send(h, c.who, c.method, c.target, "")
		if got := strings.Join(w.take(), ","); a.status != c.status || got != c.reached {
			t.Errorf("%s %s by %q: %d, reached %q", c.method, c.target, c.who, a.status, got)
		}
	}
	if got := w.guard.Stats().Unmapped; got["GET /orders/export"] != 1 || got["/admin/"] != 3 || got["no pattern"] != 3 {
		t.Errorf("unmapped: %v", got)
	}
	if !strings.Contains(w.log.String(), "/admin/") {
		t.Error("a pattern that is not mapped is not in the log")
	}
	for _, pattern := range []string{"GET /order/{id}", "GET /orders/{name}", "POST /orders/{id}", "GET shop.example/orders/{id}"} {
		route := view
		route.Resource = `Shop::Order::"42"`
		if _, err := cedarposthttp.Wrap(w.guard, next, map[string]cedarposthttp.Route{pattern: route}); err == nil || !strings.Contains(err.Error(), "does not serve") {
			t.Errorf("%s: %v", pattern, err)
		}
	}
}

// Routers other than ServeMux set path values themselves.
func TestHandlerAlone(t *testing.T) {
	w := newWorld(t)
	h, err := cedarposthttp.Handler(w.guard, "GET /orders/{id}", view, w.reach("view"))
	if err != nil {
		t.Fatal(err)
	}
	router := func(id string) http.Handler {
		return http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			r.SetPathValue("id", id)
			h.ServeHTTP(rw, r)
		})
	}
	for _, c := range []struct {
		method, id string
		status     int
	}{{"GET", "42", 200}, {"HEAD", "42", 200}, {"GET", "99", 403}, {"GET", "", 400}, {"DELETE", "42", 405}} {
		if a := w.send(router(c.id), "bob", c.method, "/orders/99", ""); a.status != c.status {
			t.Errorf("%s %s: %d", c.method, c.id, a.status)
		}
	}
}
