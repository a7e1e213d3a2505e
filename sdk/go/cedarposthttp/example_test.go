package cedarposthttp_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/cedarposthttp"
	"github.com/cedarpost/cedarpost/sdk/go/cedarposttest"
	"github.com/cedarpost/cedarpost/sdk/go/enforce"
)

type userKey struct{}

// login takes the place of the middleware that checks access tokens.
func login(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		user, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
		next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), userKey{}, user)))
	})
}

// exampleGuard is a guard of the example shop, without a second factor.
func exampleGuard() (*enforce.Guard, func()) {
	svc, err := cedarposttest.Open("../../../policies/shop")
	if err != nil {
		panic(err)
	}
	guard, err := enforce.New(enforce.Config{
		Client: svc.Client(),
		Principal: func(ctx context.Context) (cedarpost.EntityUID, error) {
			user, _ := ctx.Value(userKey{}).(string)
			if user == "" {
				return cedarpost.EntityUID{}, enforce.ErrNoPrincipal
			}
			return cedarpost.UID("Shop::User", user), nil
		},
		Context: func(context.Context) (map[string]any, error) { return map[string]any{"mfa": false}, nil },
		StepUp:  map[string]enforce.Challenge{"step_up_mfa": {ACRValues: []string{"mfa"}}},
	})
	if err != nil {
		panic(err)
	}
	return guard, svc.Close
}

func do(h http.Handler, user, method, path, body string) {
	r := httptest.NewRequest(method, path, strings.NewReader(body))
	r.Header.Set("Authorization", "Bearer "+user)
	r.Header.Set("Content-Type", "application/json")
	w := httptest.NewRecorder()
	login(h).ServeHTTP(w, r)
	answer := w.Body.String()
	if w.Code >= http.StatusBadRequest {
		answer = w.Header().Get("WWW-Authenticate") // the body has a random id
	}
	fmt.Println(user, method, path, strings.TrimSpace(fmt.Sprint(w.Code, " ", answer)))
}

// Each route says what has to be allowed. The handler has no check, and answers with
// all fields.
func ExampleMux() {
	guard, done := exampleGuard()
	defer done()
	mux := cedarposthttp.NewMux(guard)
	mux.HandleFunc("GET /orders/{id}", cedarposthttp.Route{
		Action:   cedarpost.UID("Shop::Action", "ViewOrder"),
		Resource: `Shop::Order::"{id}"`,
		Filter:   true, // keep only the permitted fields
		Hide:     true, // 404 for an object that the user may not see
	}, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"id":%q,"status":"open","total":4999,"internal":{"notes":"pays late"}}`, r.PathValue("id"))
	})
	do(mux, "bob", "GET", "/orders/42", "")
	do(mux, "alice", "GET", "/orders/42", "")
	do(mux, "bob", "GET", "/orders/99", "")
	do(mux, "bob", "GET", "/anything", "")
	// Output:
	// bob GET /orders/42 200 {"id":"42","status":"open","total":4999}
	// alice GET /orders/42 200 {"id":"42","status":"open"}
	// bob GET /orders/99 404
	// bob GET /anything 404
}

// A write is let through if all fields are permitted that its body changes.
func ExampleMergePatch() {
	guard, done := exampleGuard()
	defer done()
	mux := cedarposthttp.NewMux(guard)
	mux.HandleFunc("PATCH /orders/{id}", cedarposthttp.Route{
		Action:   cedarpost.UID("Shop::Action", "EditOrder"),
		Resource: `Shop::Order::"{id}"`,
		Changes:  cedarposthttp.MergePatch,
	}, func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		fmt.Println("the handler applies", string(body))
		w.WriteHeader(http.StatusNoContent)
	})
	do(mux, "bob", "PATCH", "/orders/42", `{"shipping":{"address":"1 Elm Road"}}`)
	do(mux, "bob", "PATCH", "/orders/42", `{"shipping":{"address":"1 Elm Road"},"total":1}`)
	do(mux, "dave", "PATCH", "/orders/42", `{"shipping":{"address":"1 Elm Road"}}`)
	// Output:
	// the handler applies {"shipping":{"address":"1 Elm Road"}}
	// bob PATCH /orders/42 204
	// bob PATCH /orders/42 403
	// dave PATCH /orders/42 401 Bearer error="insufficient_user_authentication", error_description="A stronger or more recent authentication is required", acr_values="mfa"
}

// Wrap puts checks before a program that has its routes already. A request without a
// mapped route is refused.
func ExampleWrap() {
	guard, done := exampleGuard()
	defer done()
	old := http.NewServeMux()
	old.HandleFunc("GET /orders/{id}", func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "order ", r.PathValue("id")) })
	old.HandleFunc("GET /orders/export", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "all orders") })

	h, err := cedarposthttp.Wrap(guard, old, map[string]cedarposthttp.Route{
		"GET /orders/{id}": {Action: cedarpost.UID("Shop::Action", "ViewOrder"), Resource: `Shop::Order::"{id}"`},
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	do(h, "bob", "GET", "/orders/42", "")
	do(h, "bob", "GET", "/orders/export", "")
	fmt.Println(guard.Stats().Unmapped)
	// Output:
	// bob GET /orders/42 200 order 42
	// bob GET /orders/export 404
	// map[GET /orders/export:1]
}
