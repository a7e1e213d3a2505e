package cedarposttest_test

import (
	"context"
	"fmt"
	"log"
	"net/http"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/cedarposttest"
)

// A test uses cedarposttest.New(t, "policies/shop") instead, which needs no check of
// errors and no Close.
func Example() {
	svc, err := cedarposttest.Open(shop)
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Close()
	client := svc.Client()

	// Here the code under test would use the client.
	for _, id := range []string{"42", "99"} {
		if _, err := client.Authorize(context.Background(), view("bob", id)); err != nil {
			fmt.Println(err)
		}
	}
	for _, d := range svc.Decisions() {
		fmt.Println(d)
	}
	// Output:
	// Shop::User::"bob" Shop::Action::"ViewOrder" Shop::Order::"42": allow
	// Shop::User::"bob" Shop::Action::"ViewOrder" Shop::Order::"99": deny at OBJECT
}

func ExampleService_Put() {
	svc, err := cedarposttest.Open(shop)
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Close()
	client := svc.Client()

	svc.Put(cedarpost.Entity{
		UID:     cedarpost.UID("Shop::Order", "1000"),
		Attrs:   map[string]any{"owner": cedarpost.UID("Shop::User", "bob"), "region": "eu", "status": "open", "total": 100},
		Parents: []cedarpost.EntityUID{cedarpost.UID("Shop::Store", "main")},
	})
	res, err := client.Authorize(context.Background(), view("bob", "1000"))
	fmt.Println(res.Allowed(), err)
	// Output:
	// true <nil>
}

// A program that cannot ask must deny.
func ExampleService_Away() {
	svc, err := cedarposttest.Open(shop)
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Close()
	client := svc.Client()

	svc.Away(true)
	res, err := client.Authorize(context.Background(), view("bob", "42"))
	fmt.Println(res.Allowed(), err != nil)
	svc.Away(false)
	res, err = client.Authorize(context.Background(), view("bob", "42"))
	fmt.Println(res.Allowed(), err != nil)
	// Output:
	// false true
	// true false
}

// The handler asks whether the user may view orders, and forgets to say which one. In a
// test, use Run(t) instead of Report.
func ExampleTwoUsers() {
	svc, err := cedarposttest.Open(shop)
	if err != nil {
		log.Fatal(err)
	}
	defer svc.Close()
	client := svc.Client()

	mux := http.NewServeMux()
	mux.HandleFunc("GET /orders/{id}", func(w http.ResponseWriter, r *http.Request) {
		name, _, ok := r.BasicAuth()
		if !ok {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		own := map[string]string{"bob": "42", "carol": "99"}[name] // not r.PathValue("id")
		if res, err := client.Authorize(r.Context(), view(name, own)); err != nil || !res.Allowed() {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		fmt.Fprintf(w, "order %s\n", r.PathValue("id"))
	})

	customer := func(name, order string) cedarposttest.User {
		return cedarposttest.User{
			Name:         name,
			Authenticate: func(r *http.Request) { r.SetBasicAuth(name, "password") },
			Objects:      map[string]cedarposttest.Object{"order": {Values: map[string]string{"id": order}}},
		}
	}
	report, err := cedarposttest.TwoUsers{
		Handler:    mux,
		Registered: []string{"GET /orders/{id}"},
		Routes:     []cedarposttest.Route{{Pattern: "GET /orders/{id}", Object: "order"}},
		A:          customer("bob", "42"),
		B:          customer("carol", "99"),
	}.Report(context.Background())
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, failure := range report.Failures() {
		fmt.Println(failure)
	}
	// Output:
	// GET /orders/{id}: bob read order 99 of carol: 200
	// GET /orders/{id}: carol read order 42 of bob: 200
}
