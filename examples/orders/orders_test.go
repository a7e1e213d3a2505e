package main

import (
	"context"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/cedarposttest"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// shop is the program with everything that it needs: a real server with a real
// database, a client that keeps answers, and HTTP in between.
type shop struct {
	t      *testing.T
	server *servertest.Server
	api    *service
	url    string
}

func newShop(t *testing.T) *shop {
	t.Helper()
	server := servertest.New(t)
	server.MustLoadShop()
	client, err := cedarpost.New(cedarpost.Config{Servers: []string{server.API}, Token: server.Token, Timeout: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		closing, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = client.Close(closing)
	})
	s := &shop{t: t, server: server, api: &service{client: client, orders: someOrders(), publish: publishTo(entities(server.Admin, server.Token))}}
	handler, err := s.api.handler()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.api.guard.Close)
	web := httptest.NewServer(handler)
	t.Cleanup(web.Close)
	s.url = web.URL
	return s
}

// as sends a request with a token, "" for none.
func (s *shop) as(token, method, path, body string) (int, string, http.Header) {
	s.t.Helper()
	r, err := http.NewRequestWithContext(s.t.Context(), method, s.url+path, strings.NewReader(body))
	if err != nil {
		s.t.Fatal(err)
	}
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	r.Header.Set("Content-Type", "application/json")
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		s.t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		s.t.Fatal(err)
	}
	return res.StatusCode, strings.TrimSpace(string(text)), res.Header
}

// The story of README.md.
func TestTheStory(t *testing.T) {
	s := newShop(t)
	for _, c := range []struct {
		token, method, path, body string
		status                    int
		answer                    string // the whole body of a 2xx answer
	}{
		{"bobs-token", "GET", "/orders/42", "", 200, `{"id":"42","status":"open","items":["teapot"],"total":4999,"customer":{"name":"Bob","email":"bob@example.com"},"shipping":{"address":"1 Elm Road"}}`},
		{"bobs-token", "GET", "/orders/99", "", 404, ""},
		{"bobs-token", "GET", "/orders/1234", "", 404, ""},
		{"", "GET", "/orders/42", "", 401, ""},
		{"no-token", "GET", "/orders/42", "", 401, ""},
		{"alices-token", "GET", "/orders/42", "", 200, `{"id":"42","status":"open","items":["teapot"]}`},
		{"erins-token", "GET", "/orders/42", "", 200, `{"id":"42","status":"open","items":["teapot"],"total":4999,"internal":{"margin":1200}}`},
		{"bobs-token", "GET", "/orders", "", 403, ""},
		{"alices-token", "GET", "/orders", "", 200, `[{"id":"42","status":"open","items":["teapot"]},{"id":"99","status":"open","items":["kettle"]}]`},
		{"bobs-token", "PATCH", "/orders/42", `{"shipping":{"address":"2 Elm Road"}}`, 204, ""},
		{"bobs-token", "PATCH", "/orders/42", `{"shipping":{"address":"3 Elm Road"},"total":1}`, 403, ""},
		{"bobs-token", "PATCH", "/orders/99", `{"shipping":{"address":"2 Elm Road"}}`, 404, ""},
		{"daves-token", "PATCH", "/orders/42", `{"shipping":{"address":"4 Elm Road"}}`, 401, ""},
		{"daves-mfa-token", "PATCH", "/orders/42", `{"internal":{"notes":"moved"}}`, 204, ""},
		{"daves-mfa-token", "GET", "/orders/42", "", 200, `{"id":"42","status":"open","items":["teapot"],"total":4999,"customer":{"name":"Bob","email":"bob@example.com"},"shipping":{"address":"2 Elm Road"},"internal":{"margin":1200,"notes":"moved"}}`},
		{"erins-token", "POST", "/orders/42/refund", "", 401, ""},
		{"erins-mfa-token", "POST", "/orders/42/refund", "", 204, ""},
		{"bobs-token", "DELETE", "/orders/42", "", 403, ""},
		{"", "POST", "/orders", "{}", 401, ""},
		{"", "GET", "/health", "", 200, ""},
		{"daves-token", "GET", "/admin", "", 404, ""},
	} {
		status, body, _ := s.as(c.token, c.method, c.path, c.body)
		if status != c.status || status < 300 && body != c.answer {
			t.Errorf("%s: %s %s %s: %d %s\nwant %d %s", c.token, c.method, c.path, c.body, status, body, c.status, c.answer)
		}
	}
}

// A new order is its owner's at once. A deleted order is nobody's.
func TestLifeOfAnOrder(t *testing.T) {
	s := newShop(t)
	path := s.made("bobs-token")
	s.eventually("bobs-token", "GET", path, "", http.StatusOK)
	s.eventually("carols-token", "GET", path, "", http.StatusNotFound)
	// Policies see a patched status: nobody changes an archived order.
	if status, body, _ := s.as("daves-token", "PATCH", path, `{"status":"archived"}`); status != http.StatusNoContent {
		t.Fatalf("%d %s", status, body)
	}
	s.eventually("bobs-token", "PATCH", path, `{"shipping":{"address":"2 Elm Road"}}`, http.StatusNotFound)
	path = s.made("bobs-token")
	if status, body, _ := s.as("daves-token", "DELETE", path, ""); status != http.StatusNoContent {
		t.Fatalf("%d %s", status, body)
	}
	s.eventually("bobs-token", "GET", path, "", http.StatusNotFound)
}

// made makes an order and returns its path.
func (s *shop) made(token string) string {
	s.t.Helper()
	status, body, _ := s.as(token, "POST", "/orders", `{"items":["cup"],"address":"1 Elm Road"}`)
	var made struct{ ID string }
	if err := json.Unmarshal([]byte(body), &made); err != nil || status != http.StatusCreated {
		s.t.Fatalf("%d %s", status, body)
	}
	return "/orders/" + made.ID
}

// A late patch does not bring back a deleted order.
func TestPatchOfWhatIsGone(t *testing.T) {
	orders := someOrders()
	if found, err := orders.update("1234", func(*order) error { return nil }); found || err != nil {
		t.Errorf("%v, %v", found, err)
	}
	if _, there := orders.get("1234"); there {
		t.Error("it is back, without an owner")
	}
}

func TestTokenWithoutScheme(t *testing.T) {
	r := httptest.NewRequest(http.MethodGet, "/", http.NoBody)
	r.Header.Set("Authorization", "bobs-token")
	authenticate(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		if who, err := principal(r.Context()); err == nil {
			t.Errorf("it is %s", who)
		}
	})).ServeHTTP(httptest.NewRecorder(), r)
}

// eventually waits until a write is visible.
func (s *shop) eventually(token, method, path, body string, want int) {
	s.t.Helper()
	deadline := time.Now().Add(time.Minute)
	for {
		status, answer, _ := s.as(token, method, path, body)
		if status == want {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("%s %s by %s: %d %s", method, path, token, status, answer)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// bob and carol are customers with the same rights. Neither reaches an order of the
// other, on any route.
func TestTwoUsers(t *testing.T) {
	s := newShop(t)
	user := func(name, token, order, email string) cedarposttest.User {
		return cedarposttest.User{
			Name:         name,
			Authenticate: func(r *http.Request) { r.Header.Set("Authorization", "Bearer "+token) },
			Objects:      map[string]cedarposttest.Object{"order": {Values: map[string]string{"id": order}}},
			Secrets:      []string{email},
		}
	}
	cedarposttest.TwoUsers{
		URL: s.url,
		Routes: []cedarposttest.Route{
			{Pattern: "GET /orders/{id}", Object: "order"},
			{Pattern: "PATCH /orders/{id}", Object: "order", Body: `{"shipping":{"address":"elsewhere"}}`},
			{Pattern: "POST /orders", Body: `{"items":["cup"],"address":"here"}`},
		},
		A: user("bob", "bobs-token", "42", "bob@example.com"), B: user("carol", "carols-token", "99", "carol@example.com"),
		Registered: s.api.mux.Patterns(),
		Skip: map[string]string{
			"GET /orders":              "for staff, who see all orders",
			"DELETE /orders/{id}":      "for managers, who may delete any order",
			"POST /orders/{id}/refund": "for finance, who may refund any order",
			"GET /health":              "public",
		},
	}.Run(t)
}

// Without a server there is no answer.
func TestCedarpostAway(t *testing.T) {
	s := newShop(t)
	s.server.Stop()
	status, body, header := s.as("carols-token", "GET", "/orders/99", "")
	if status != http.StatusServiceUnavailable || header.Get("Retry-After") == "" || strings.Contains(body, "kettle") {
		t.Errorf("%d %s", status, body)
	}
	if status, _, _ := s.as("", "GET", "/health", ""); status != http.StatusOK {
		t.Errorf("health: %d", status)
	}
}
