package cedarpost_test

import (
	"context"
	"errors"
	"fmt"
	"log"
	"slices"
	"time"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/cedarposttest"
)

// shop is a service with the example bundle, in this process. A real program makes its
// client with [cedarpost.New].
func shop() *cedarposttest.Service {
	svc, err := cedarposttest.Open("../../../policies/shop")
	if err != nil {
		log.Fatal(err)
	}
	return svc
}

func viewOrder(user, order string) cedarpost.Check {
	return cedarpost.Check{
		Principal: cedarpost.UID("Shop::User", user),
		Action:    cedarpost.UID("Shop::Action", "ViewOrder"),
		Resource:  cedarpost.UID("Shop::Order", order),
		Context:   map[string]any{"mfa": false},
	}
}

// One call makes the three checks: may alice do this at all, on this order, and which
// of its fields.
func Example() {
	svc := shop()
	defer svc.Close()
	client := svc.Client()

	res, err := client.Authorize(context.Background(), cedarpost.Check{
		Principal: cedarpost.UID("Shop::User", "alice"),
		Action:    cedarpost.UID("Shop::Action", "ViewOrder"),
		Resource:  cedarpost.UID("Shop::Order", "42"),
		Context:   map[string]any{"mfa": false},
		AllFields: true,
	})
	if err != nil {
		fmt.Println("no decision, so deny:", err)
		return
	}
	fmt.Println("allowed:", res.Allowed())
	fmt.Println("may see:", slices.Sorted(res.Fields().All()))
	fmt.Println("the total:", res.Fields().Permits("total"))
	// Output:
	// allowed: true
	// may see: [id items status]
	// the total: false
}

// A key is not sent over a network in plain text, unless AllowPlaintext is set.
func ExampleNew() {
	_, err := cedarpost.New(cedarpost.Config{Servers: []string{"http://pdp.example.com:8080"}, Token: "secret"})
	fmt.Println(err)
	// Output:
	// cedarpost: server http://pdp.example.com:8080 would get the API key in the clear; use https, or set AllowPlaintext
}

// DeniedAt distinguishes two kinds of attack: trying functions, and changing ids.
func ExampleResult_DeniedAt() {
	svc := shop()
	defer svc.Close()
	client := svc.Client()

	for _, check := range []cedarpost.Check{viewOrder("bob", "42"), viewOrder("bob", "99"), viewOrder("mallory", "42")} {
		res, err := client.Authorize(context.Background(), check)
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Printf("%s on order %s: allowed %v, denied at %q\n", check.Principal.ID, check.Resource.ID, res.Allowed(), res.DeniedAt())
	}
	// Output:
	// bob on order 42: allowed true, denied at ""
	// bob on order 99: allowed false, denied at "OBJECT"
	// mallory on order 42: allowed false, denied at "FUNCTION"
}

// A write needs all of its fields, or it is denied as a whole.
func ExampleCheck_requireAllFields() {
	svc := shop()
	defer svc.Close()
	client := svc.Client()

	res, err := client.Authorize(context.Background(), cedarpost.Check{
		Principal:        cedarpost.UID("Shop::User", "bob"),
		Action:           cedarpost.UID("Shop::Action", "EditOrder"),
		Resource:         cedarpost.UID("Shop::Order", "42"),
		Context:          map[string]any{"mfa": false},
		Fields:           []string{"shipping.address", "total"},
		RequireAllFields: true,
	})
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(res.Allowed(), res.DeniedAt(), res.Fields().Denied())
	// Output:
	// false FIELD [total]
}

// Advice is what would lead to an allow. Obligations are what has to be done for an
// allow to count.
func ExampleResult_Obligations() {
	svc := shop()
	defer svc.Close()
	client := svc.Client()

	refund := viewOrder("erin", "42")
	refund.Action.ID = "RefundOrder"
	for _, mfa := range []bool{false, true} {
		refund.Context = map[string]any{"mfa": mfa}
		res, err := client.Authorize(context.Background(), refund)
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println("allowed:", res.Allowed())
		for _, a := range res.Advice() {
			fmt.Println("would help:", a.Text)
		}
		for _, o := range res.Obligations() {
			fmt.Println("has to be done:", o.Text)
		}
	}
	// Output:
	// allowed: false
	// would help: step_up_mfa
	// allowed: true
	// has to be done: notify_customer
}

// Every error means deny. The kind of the error shows who has to act.
func ExampleClient_Authorize_errors() {
	svc := shop()
	defer svc.Close()
	client := svc.Client()
	ask := func(check cedarpost.Check) {
		_, err := client.Authorize(context.Background(), check)
		switch {
		case errors.Is(err, cedarpost.ErrUnavailable):
			fmt.Println("try again later")
		case errors.Is(err, cedarpost.ErrInvalid):
			fmt.Println("a mistake in this program:", err)
		case errors.Is(err, cedarpost.ErrUnknownRevision):
			fmt.Println("read again, and ask with a new token or without one")
		case errors.Is(err, cedarpost.ErrUnauthenticated), errors.Is(err, cedarpost.ErrPermissionDenied), errors.Is(err, cedarpost.ErrWrongServer):
			fmt.Println("a mistake in the configuration")
		}
	}
	typo := viewOrder("bob", "42")
	typo.Context = map[string]any{"mfa": true, "ip": "10.0.0.1"}
	ask(typo)
	svc.Away(true)
	ask(viewOrder("bob", "42"))
	// Output:
	// a mistake in this program: cedarpost: bad question: transport 0: invalid_argument: context: attribute "ip" is not declared in the schema
	// try again later
}

// A check with FailOpen may be let through when there is no answer.
func ExampleCheck_failOpen() {
	svc := shop()
	defer svc.Close()
	client := svc.Client()

	svc.Away(true)
	check := viewOrder("bob", "42")
	check.FailOpen = "the status page is public anyway"
	res, err := client.Authorize(context.Background(), check)
	fmt.Println(err, res.Allowed(), res.FailedOpen(), res.Fields().Permitted())

	svc.Away(false)
	if err := client.Close(context.Background()); err != nil { // otherwise it reports within ReportInterval
		fmt.Println(err)
	}
	for _, f := range svc.FailOpens() {
		fmt.Printf("in the log: %s, %s, %d times\n", f.Principal, f.Reason, f.Count)
	}
	// Output:
	// <nil> true true []
	// in the log: Shop::User::"bob", the status page is public anyway, 1 times
}

// A list of resources is one batch: one call for up to 100 of them.
func ExampleClient_AuthorizeBatch() {
	svc := shop()
	defer svc.Close()
	client := svc.Client()

	var checks []cedarpost.Check
	for _, id := range []string{"42", "43", "99"} {
		checks = append(checks, viewOrder("bob", id))
	}
	for i, answer := range client.AuthorizeBatch(context.Background(), checks) {
		if answer.Err != nil || !answer.Allowed() {
			continue // not shown
		}
		fmt.Println("order", checks[i].Resource.ID)
	}
	// Output:
	// order 42
	// order 43
}

// A write returns a revision. A check with that revision takes the write into account,
// on every server and past every cache.
func ExampleCheck_atLeastAsFresh() {
	svc := shop()
	defer svc.Close()
	client := svc.Client(func(c *cedarpost.Config) { c.CacheBytes = 0 }) // keeps answers, as in production

	check := viewOrder("alice", "42")
	before, err := client.Authorize(context.Background(), check)
	if err != nil {
		fmt.Println(err)
		return
	}
	check.AtLeastAsFresh = svc.RemoveParents(cedarpost.UID("Shop::User", "alice"), cedarpost.UID("Shop::Role", "support"))
	after, err := client.Authorize(context.Background(), check)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println(before.Allowed(), after.Allowed())
	// Output:
	// true false
}

// An answer is kept, and reused while nothing changes that it depends on.
func ExampleClient_Stats() {
	svc := shop()
	defer svc.Close()
	client := svc.Client(func(c *cedarpost.Config) { c.CacheBytes = 0 }) // keeps answers, as in production
	for !client.Stats().Leased {
		time.Sleep(time.Millisecond) // until the watch of changes has begun
	}

	for range 3 {
		res, err := client.Authorize(context.Background(), viewOrder("bob", "42"))
		if err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println("allowed:", res.Allowed(), "from the cache:", res.Reused())
	}
	stats := client.Stats()
	fmt.Println("decided:", stats.Decided, "reused:", stats.Reused)
	// Output:
	// allowed: true from the cache: false
	// allowed: true from the cache: true
	// allowed: true from the cache: true
	// decided: 1 reused: 2
}
