package cedarposthttp_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect/v2"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/cedarposthttp"
	"github.com/cedarpost/cedarpost/sdk/go/enforce"
)

var (
	view   = cedarposthttp.Route{Action: action("ViewOrder"), Resource: `Shop::Order::"{id}"`}
	hidden = cedarposthttp.Route{Action: action("ViewOrder"), Resource: `Shop::Order::"{id}"`, Hide: true}
	edit   = cedarposthttp.Route{Action: action("EditOrder"), Resource: `Shop::Order::"{id}"`, Changes: cedarposthttp.MergePatch}
	remove = cedarposthttp.Route{Action: action("DeleteOrder"), Resource: `Shop::Order::"{id}"`, Hide: true}
	refund = cedarposthttp.Route{Action: action("RefundOrder"), Resource: `Shop::Order::"{id}"`, Hide: true}
	list   = cedarposthttp.Route{Action: action("ListOrders"), Resource: `Shop::Store::"main"`}
)

func shopWorld(t *testing.T, options ...func(*enforce.Config)) *world {
	w := newWorld(t, options...)
	w.mux.Handle("GET /orders/{id}", view, w.reach("view"))
	w.mux.Handle("GET /secret/{id}", hidden, w.reach("secret"))
	w.mux.Handle("PATCH /orders/{id}", edit, w.reach("edit"))
	w.mux.Handle("DELETE /orders/{id}", remove, w.reach("delete"))
	w.mux.Handle("POST /orders/{id}/refund", refund, w.reach("refund"))
	w.mux.Handle("GET /orders", list, w.reach("list"))
	w.mux.Handle("/health", cedarposthttp.Route{Public: "the load balancer has no user"}, w.reach("health"))
	return w
}

func TestWhoGetsWhere(t *testing.T) {
	w := shopWorld(t)
	patch := func(doc string) string { return doc }
	for _, c := range []struct {
		who, method, path, body string
		status                  int
		reached                 string
	}{
		{"bob", "GET", "/orders/42", "", 200, "view 42"},
		{"bob", "HEAD", "/orders/42", "", 200, "view 42"},
		{"bob", "GET", "/orders/99", "", 403, ""},
		{"bob", "HEAD", "/orders/99", "", 403, ""},
		{"carol", "GET", "/orders/99", "", 200, "view 99"},
		{"mallory", "GET", "/orders/42", "", 403, ""},
		{"", "GET", "/orders/42", "", 401, ""},
		{"stranger", "GET", "/orders/42", "", 403, ""},
		// With Hide, a denial at the object is a 404, and one at the function is not.
		{"bob", "GET", "/secret/42", "", 200, "secret 42"},
		{"bob", "GET", "/secret/99", "", 404, ""},
		{"bob", "GET", "/secret/no-such-order", "", 404, ""},
		{"mallory", "GET", "/secret/42", "", 403, ""},
		{"alice", "DELETE", "/orders/42", "", 403, ""},
		{"dave", "DELETE", "/orders/42", "", 200, "delete 42"},
		{"dave", "DELETE", "/orders/44", "", 404, ""}, // archived
		// Fields of a write.
		{"bob", "PATCH", "/orders/42", patch(`{"shipping":{"address":"x"}}`), 200, "edit 42"},
		{"bob", "PATCH", "/orders/42", patch(`{"total":1}`), 403, ""},
		{"bob", "PATCH", "/orders/42", patch(`{"shipping":{"address":"x"},"total":1}`), 403, ""},
		{"bob", "PATCH", "/orders/42", patch(`{"TOTAL":1}`), 403, ""},
		{"bob", "PATCH", "/orders/42", patch(`{"new_column":1}`), 403, ""},
		{"bob", "PATCH", "/orders/42", patch(`{}`), 200, "edit 42"},
		{"bob", "PATCH", "/orders/99", patch(`{}`), 403, ""},
		{"bob", "PATCH", "/orders/42", patch(`{"a.b":1}`), 400, ""},
		{"bob", "PATCH", "/orders/42", patch(`[1]`), 400, ""},
		{"bob", "PATCH", "/orders/42", patch(``), 400, ""},
		{"", "PATCH", "/orders/42", patch(`{}`), 401, ""},
		// A second factor is asked for only if it leads to an allow.
		{"dave", "PATCH", "/orders/42", patch(`{"shipping":{"address":"x"}}`), 401, ""},
		{"dave+mfa", "PATCH", "/orders/42", patch(`{"shipping":{"address":"x"}}`), 200, "edit 42"},
		{"dave", "PATCH", "/orders/42", patch(`{"shipping":{"address":"x"},"total":1}`), 403, ""},
		{"erin", "POST", "/orders/42/refund", "", 401, ""},
		{"alice", "POST", "/orders/42/refund", "", 403, ""},
		// No function meets the obligation to notify.
		{"erin+mfa", "POST", "/orders/42/refund", "", 403, ""},
		{"alice", "GET", "/orders", "", 200, "list "},
		{"bob", "GET", "/orders", "", 403, ""},
		{"", "GET", "/health", "", 200, "health "},
		{"", "POST", "/health", "", 200, "health "},
		{"panic", "GET", "/orders/42", "", 500, ""},
		// Requests without a route.
		{"bob", "GET", "/nothing", "", 404, ""},
		{"bob", "PUT", "/orders/42", "", 405, ""},
		{"bob", "OPTIONS", "/orders/42", "", 405, ""},
		{"bob", "get", "/orders/42", "", 405, ""},
	} {
		a := w.as(c.who, c.method, c.path, c.body, "Content-Type", "application/json")
		got := strings.Join(w.take(), ", ")
		if a.status != c.status || got != c.reached {
			t.Errorf("%q %s %s %s: %d, reached %q; want %d, %q\n%s", c.who, c.method, c.path, c.body, a.status, got, c.status, c.reached, a.body)
		}
		if a.status >= 400 && a.Header.Get("Content-Type") != "application/problem+json" {
			t.Errorf("%q %s %s: refused as %s", c.who, c.method, c.path, a.Header.Get("Content-Type"))
		}
		if strings.Contains(a.body, "owner-") || strings.Contains(a.body, "shop/") || strings.Contains(a.body, "mfa") {
			t.Errorf("%q %s %s names a policy: %s", c.who, c.method, c.path, a.body)
		}
	}
	if got := w.mux.Patterns(); len(got) != 7 || got[0] != "GET /orders/{id}" {
		t.Errorf("patterns: %v", got)
	}
	s := w.guard.Stats()
	if s.Public != 2 || s.Unmapped["no pattern"] != 4 || s.Faults != 1 || s.Unmet != 1 || s.StepUp != 2 || s.Hidden != 3 || s.NoPrincipal != 2 || s.Malformed != 3 {
		t.Errorf("%+v", s)
	}
	if s.DeniedAtFunction+s.DeniedAtObject+s.DeniedAtField != s.StepUp+s.Hidden+s.Forbidden {
		t.Errorf("denials do not add up: %+v", s)
	}
	if !strings.Contains(w.log.String(), "notify_customer") || !strings.Contains(w.log.String(), "who is this?") {
		t.Errorf("the mistakes of the service are not in its log:\n%s", &w.log)
	}
}

func TestBodiesOfRefusals(t *testing.T) {
	w := shopWorld(t)
	decision := func() string { d := w.svc.Decisions(); return d[len(d)-1].ID }

	a := w.as("bob", "GET", "/orders/99", "")
	if a.problem["decision_id"] != decision() || a.Header.Get("Cache-Control") != "no-store" {
		t.Errorf("support cannot find the record by %s", a.body)
	}
	a = w.as("bob", "PATCH", "/orders/42", `{"total":1,"internal":{"notes":""},"shipping":{"address":""}}`, "Content-Type", "application/json")
	if got := a.problem["fields"]; !slices.Equal(texts(got), []string{"internal.notes", "total"}) {
		t.Errorf("denied fields: %v", got)
	}
	// "internal" stands for its leaves. The user did not name them, so the answer must
	// not.
	a = w.as("bob", "PATCH", "/orders/42", `{"internal":null}`, "Content-Type", "application/json")
	if a.status != 403 || strings.Contains(a.body, "margin") {
		t.Errorf("the catalogue is shown: %s", a.body)
	}

	a = w.as("erin", "POST", "/orders/42/refund", "")
	want := `Bearer error="insufficient_user_authentication", error_description="A stronger or more recent authentication is required", acr_values="mfa", max_age="300"`
	if got := a.Header.Get("WWW-Authenticate"); got != want {
		t.Errorf("challenge %q", got)
	}
	if got := w.as("", "GET", "/orders/42", "").Header.Get("WWW-Authenticate"); got != "Bearer" {
		t.Errorf("challenge to nobody %q", got)
	}
	if got := w.as("bob", "PUT", "/orders/42", "").Header.Get("Allow"); got != "DELETE, GET, HEAD, PATCH" {
		t.Errorf("Allow: %q", got)
	}
}

func texts(v any) []string {
	list, _ := v.([]any)
	var out []string
	for _, e := range list {
		out = append(out, e.(string))
	}
	return out
}

// A hidden denial and a missing object have the same answer, byte for byte.
func TestHiddenIsNotFound(t *testing.T) {
	w := newWorld(t)
	w.mux.Handle("GET /orders/{id}", hidden, w.reach("view"))
	w.mux.Handle("GET /gone/{id}", hidden, http.HandlerFunc(cedarposthttp.NotFound))
	w.mux.Handle("GET /filtered/{id}", cedarposthttp.Route{
		Action: action("ViewOrder"), Resource: `Shop::Order::"{id}"`, Hide: true, Filter: true,
	}, http.HandlerFunc(cedarposthttp.NotFound))
	denied := w.as("bob", "GET", "/orders/99", "")
	for _, path := range []string{"/gone/42", "/filtered/42", "/filtered/99"} {
		gone := w.as("bob", "GET", path, "")
		if denied.status != 404 || gone.status != 404 || denied.body != gone.body {
			t.Errorf("%s: %d %s\n%d %s", path, denied.status, denied.body, gone.status, gone.body)
		}
		for name := range denied.Header {
			if !slices.Equal(denied.Header[name], gone.Header[name]) || len(denied.Header) != len(gone.Header) {
				t.Errorf("%s: headers differ: %v, %v", path, denied.Header, gone.Header)
			}
		}
	}
}

func TestNoDecision(t *testing.T) {
	w := shopWorld(t)
	w.mux.Handle("GET /open/{id}", cedarposthttp.Route{Action: action("ViewOrder"), Resource: `Shop::Order::"{id}"`, FailOpen: "the shop must go on"}, w.reach("open"))
	w.mux.Handle("GET /wrong/{id}", cedarposthttp.Route{Action: action("NoSuchAction"), Resource: `Shop::Order::"{id}"`, FailOpen: "even then"}, w.reach("wrong"))
	w.mux.Handle("GET /context/{id}", cedarposthttp.Route{
		Action: action("ViewOrder"), Resource: `Shop::Order::"{id}"`,
		Context: func(*http.Request) (map[string]any, error) { return map[string]any{"undeclared": 1}, nil },
	}, w.reach("context"))

	if a := w.as("bob", "GET", "/wrong/42", ""); a.status != 500 || strings.Contains(a.body, "NoSuchAction") {
		t.Errorf("a question that makes no sense: %d %s", a.status, a.body)
	}
	if a := w.as("bob", "GET", "/context/42", ""); a.status != 500 {
		t.Errorf("a context that no schema knows: %d", a.status)
	}
	w.svc.Away(true)
	a := w.as("bob", "GET", "/orders/42", "")
	if a.status != 503 || a.Header.Get("Retry-After") != "1" {
		t.Errorf("service away: %d, retry after %q", a.status, a.Header.Get("Retry-After"))
	}
	if got := w.take(); got != nil {
		t.Errorf("reached %v without a decision", got)
	}
	if a := w.as("bob", "GET", "/open/42", ""); a.status != 200 || len(w.take()) != 1 {
		t.Errorf("a route that fails open: %d", a.status)
	}
	w.svc.Away(false)
	if a := w.as("bob", "GET", "/open/99", ""); a.status != 403 {
		t.Errorf("a route that fails open is open always: %d", a.status)
	}
	// A restore lost the revision that the check names.
	w.svc.Fail(connect.NewError(connect.CodeAborted, "the token is of a revision that this database does not have"))
	if a := w.as("bob", "GET", "/open/42", ""); a.status != 409 || a.Header.Get("Retry-After") != "" || w.take() != nil {
		t.Errorf("a revision that is lost: %d", a.status)
	}
	// The service does not know our key.
	w.svc.Fail(connect.NewError(connect.CodeUnauthenticated, "who are you?"))
	if a := w.as("bob", "GET", "/orders/42", ""); a.status != 503 || w.take() != nil || !strings.Contains(w.log.String(), "who are you?") {
		t.Errorf("a key that is not known: %d", a.status)
	}
}

// An id that cannot be sent is a mistake of the client. If it counted as a service that
// is away, a user could make a route fail open with such an id.
func TestIDsThatCannotBe(t *testing.T) {
	w := newWorld(t)
	open := view
	open.FailOpen = "the shop must go on"
	w.mux.Handle("GET /orders/{id}", open, w.reach("view"))
	w.mux.Handle("GET /tree/{id...}", open, w.reach("tree"))
	byQuery := open
	byQuery.Resource, byQuery.ResourceOf = "", func(r *http.Request) (cedarpost.EntityUID, error) {
		return cedarpost.UID("Shop::Order", r.URL.Query().Get("id")), nil
	}
	w.mux.Handle("GET /query", byQuery, w.reach("query"))
	for path, status := range map[string]int{
		"/orders/%ff": 400, "/orders/%00": 400, "/orders/a%00b": 400, "/orders/" + strings.Repeat("x", 1025): 400,
		"/orders/" + strings.Repeat("x", 1024): 403, "/tree/": 400, "/tree/%ff": 400,
		"/query?id=%ff": 400, "/query?id=%00": 400,
	} {
		if a := w.as("bob", "GET", path, ""); a.status != status || w.take() != nil {
			t.Errorf("%.40s: %d, want %d", path, a.status, status)
		}
	}
}

func TestMistakesOfTheService(t *testing.T) {
	fails := errors.New("disk on fire")
	for name, change := range map[string]func(*enforce.Config){
		"principal fails": func(c *enforce.Config) {
			c.Principal = func(context.Context) (cedarpost.EntityUID, error) { return cedarpost.UID("Shop::User", "bob"), fails }
		},
		"context fails": func(c *enforce.Config) {
			c.Context = func(context.Context) (map[string]any, error) { return nil, fails }
		},
		"context panics": func(c *enforce.Config) { c.Context = func(context.Context) (map[string]any, error) { panic(fails) } },
	} {
		w := shopWorld(t, change)
		a := w.as("bob", "GET", "/orders/42", "")
		if a.status != 500 || w.take() != nil || strings.Contains(a.body, "fire") || !strings.Contains(w.log.String(), "fire") {
			t.Errorf("%s: %d %s", name, a.status, a.body)
		}
	}
	w := newWorld(t)
	bad := view
	bad.Resource, bad.ResourceOf = "", func(*http.Request) (cedarpost.EntityUID, error) { panic("no resource") }
	w.mux.Handle("GET /a/{id}", bad, w.reach("a"))
	bad.ResourceOf = func(*http.Request) (cedarpost.EntityUID, error) { return cedarpost.UID("Shop::Order", "42"), fails }
	w.mux.Handle("GET /b/{id}", bad, w.reach("b"))
	changes := edit
	changes.Changes = func(*http.Request, []byte) ([]string, error) { panic("no changes") }
	w.mux.Handle("PATCH /c/{id}", changes, w.reach("c"))
	for target, method := range map[string]string{"/a/42": "GET", "/b/42": "GET", "/c/42": "PATCH"} {
		if a := w.as("bob", method, target, "{}"); a.status != 500 || w.take() != nil {
			t.Errorf("%s: %d", target, a.status)
		}
	}
}

func TestObligations(t *testing.T) {
	var told []string
	var cannot error
	w := shopWorld(t, func(c *enforce.Config) {
		c.Obligations = map[string]func(context.Context, cedarpost.Result) error{"notify_customer": func(_ context.Context, r cedarpost.Result) error {
			told = append(told, r.DecisionID())
			return cannot
		}}
	})
	if a := w.as("erin+mfa", "POST", "/orders/42/refund", ""); a.status != 200 || len(told) != 1 || len(w.take()) != 1 {
		t.Errorf("an obligation that is met: %d, told %v", a.status, told)
	}
	cannot = errors.New("no mail today")
	a := w.as("erin+mfa", "POST", "/orders/42/refund", "")
	if a.status != 403 || w.take() != nil || strings.Contains(a.body, "mail") || a.problem["decision_id"] != told[1] {
		t.Errorf("an obligation that fails: %d %s", a.status, a.body)
	}
	if a := w.as("erin", "POST", "/orders/42/refund", ""); a.status != 401 || len(told) != 2 {
		t.Errorf("an obligation of a denial: %d, told %v", a.status, told)
	}
}

func TestBodyReachesTheHandler(t *testing.T) {
	w := newWorld(t)
	var got string
	vandal := edit
	vandal.Changes = func(r *http.Request, body []byte) ([]string, error) {
		paths, err := cedarposthttp.MergePatch(r, body)
		for i := range body {
			body[i] = 'x'
		}
		return paths, err
	}
	for pattern, route := range map[string]cedarposthttp.Route{"PATCH /orders/{id}": edit, "PATCH /vandal/{id}": vandal} {
		w.mux.HandleFunc(pattern, route, func(_ http.ResponseWriter, r *http.Request) {
			body, err := io.ReadAll(r.Body)
			if err != nil || r.ContentLength != int64(len(body)) {
				t.Errorf("length %d of %d, %v", r.ContentLength, len(body), err)
			}
			got = string(body)
		})
	}
	doc := ` {"shipping": {"address": "a street"}} `
	for _, path := range []string{"/orders/42", "/vandal/42"} {
		got = ""
		if a := w.as("bob", "PATCH", path, doc, "Content-Type", "application/merge-patch+json; charset=utf-8"); a.status != 200 || got != doc {
			t.Errorf("%s: %d, the handler read %q", path, a.status, got)
		}
	}
}

func TestBodiesThatAreNotRead(t *testing.T) {
	w := newWorld(t)
	small := edit
	small.MaxBody = 64
	w.mux.Handle("PATCH /small/{id}", small, w.reach("small"))
	w.mux.Handle("PATCH /orders/{id}", edit, w.reach("edit"))
	ops := edit
	ops.Changes = cedarposthttp.JSONPatch
	w.mux.Handle("PATCH /ops/{id}", ops, w.reach("ops"))
	address := func(n int) string {
		doc := `{"shipping":{"address":""}}`
		return doc[:24] + strings.Repeat("x", n-len(doc)) + doc[24:]
	}
	const merge, jsonPatch = "application/merge-patch+json", "application/json-patch+json"
	for _, c := range []struct {
		path, body, typ, encoding string
		status                    int
	}{
		{"/small/42", address(64), merge, "", 200},
		{"/small/42", address(65), merge, "", 413},
		{"/orders/42", address(1 << 20), merge, "", 200},
		{"/orders/42", address(1<<20 + 1), merge, "", 413},
		{"/orders/42", `{}`, "", "", 415},
		{"/orders/42", `{}`, "text/plain", "", 415},
		{"/orders/42", `{}`, jsonPatch, "", 415},
		{"/orders/42", `{}`, merge, "gzip", 415},
		{"/orders/42", `{}`, "application/json", "", 200},
		{"/ops/42", `[{"op":"replace","path":"/shipping/address","value":"x"}]`, jsonPatch, "", 200},
		{"/ops/42", `[{"op":"copy","from":"/internal/notes","path":"/shipping/address"}]`, jsonPatch, "", 403},
		{"/ops/42", `[{"op":"replace","path":"/total","value":1}]`, jsonPatch, "", 403},
		{"/ops/42", `{}`, merge, "", 415},
	} {
		header := []string{"Content-Type", c.typ}
		if c.encoding != "" {
			header = append(header, "Content-Encoding", c.encoding)
		}
		a := w.as("bob", "PATCH", c.path, c.body, header...)
		if got := w.take(); a.status != c.status || (got != nil) != (c.status == 200) {
			t.Errorf("%s %.60s as %q %s: %d, want %d", c.path, c.body, c.typ, c.encoding, a.status, c.status)
		}
	}
	// Header.Get would return only the first.
	r := httptest.NewRequest(http.MethodPatch, "/orders/42", strings.NewReader(`{}`))
	r.Header = http.Header{"X-User": {"bob"}, "Content-Type": {merge}, "Content-Encoding": {"", "deflate"}}
	rec := httptest.NewRecorder()
	signedIn(w.mux).ServeHTTP(rec, r)
	if rec.Code != 415 || w.take() != nil {
		t.Errorf("a second Content-Encoding: %d", rec.Code)
	}
}

func TestResultIsInTheContext(t *testing.T) {
	w := newWorld(t)
	asked := view
	asked.AllFields = true
	w.mux.HandleFunc("GET /orders/{id}", asked, func(rw http.ResponseWriter, r *http.Request) {
		result := cedarposthttp.Result(r.Context())
		if !result.Allowed() || !result.Fields().Permits("total") || result.Fields().Permits("internal.margin") {
			t.Errorf("the handler sees %v", result.Fields().Permitted())
		}
		_, _ = io.WriteString(rw, result.DecisionID())
	})
	w.mux.HandleFunc("GET /public", cedarposthttp.Route{Public: "anybody"}, func(_ http.ResponseWriter, r *http.Request) {
		if cedarposthttp.Result(r.Context()).Allowed() {
			t.Error("a public route has an allow")
		}
	})
	if a := w.as("bob", "GET", "/orders/42", ""); a.body != w.svc.Decisions()[0].ID {
		t.Error("another decision")
	}
	w.as("", "GET", "/public", "")
}

func TestManyAtOnce(t *testing.T) {
	w := shopWorld(t)
	var wait sync.WaitGroup
	for range 8 {
		wait.Go(func() {
			for range 50 {
				if a := w.as("bob", "GET", "/orders/42", ""); a.status != 200 {
					t.Errorf("bob's own order: %d", a.status)
				}
				if a := w.as("bob", "GET", "/secret/99", ""); a.status != 404 {
					t.Errorf("carol's order: %d", a.status)
				}
			}
		})
	}
	wait.Wait()
	if s := w.guard.Stats(); s.Allowed != 400 || s.Hidden != 400 || len(w.take()) != 400 {
		t.Errorf("%+v", s)
	}
}
