package cedarposttest

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// TwoUsers finds routes that let one user reach the objects of another. Tests with one user,
// or with one user of each role, do not see such holes. It tries each route
//
//   - as each user on the other's object: the answer must be 403 or 404,
//   - without a user: the answer must be 401, 403 or 404,
//   - as each user on their own object: this must succeed, because otherwise the refusals
//     could have any cause, and would prove nothing.
//
// No answer to one user may contain a secret of the other. Give both users the same role, so
// that only the object makes a difference.
//
// Tries that should be refused come first, and among them those that change nothing, so that
// a wrong success does not remove what later tries need. DELETE comes last.
type TwoUsers struct {
	// Handler is the program under test. Nil: the program that runs at URL.
	Handler http.Handler
	URL     string

	Routes []Route
	A, B   User

	// Registered are the patterns of all routes of the program. Each must be in Routes or in
	// Skip. Nil: the routes are not compared.
	Registered []string
	// Skip has the patterns of the routes that are not tried, each with the reason.
	Skip map[string]string
}

// Route is a route to try.
type Route struct {
	// Pattern is a pattern of [http.ServeMux] with a method: "GET /orders/{id}".
	Pattern string
	// Object is the kind of object that the route is about: "order". Empty: the route is
	// about no single object, such as a list of the user's own orders, and is not tried on
	// another user's object.
	Object string
	// Query and Body are sent with the request. In them, as in Pattern, {id} stands for the
	// object's value with that name.
	Query, Body string
	// Header is added to the request. Without a Content-Type in it, a Body is JSON.
	Header http.Header
	// Success is the status of a try on the user's own object. 0: any from 200 to 299.
	Success int
}

// User is one of the two users.
type User struct {
	Name string
	// Authenticate makes a request a request of this user, for example with a header or a
	// cookie.
	Authenticate func(*http.Request)
	// Objects has an object of this user for each kind of object in the routes.
	Objects map[string]Object
	// Secrets are texts that only this user may get, such as a name or an address.
	Secrets []string
}

// Object is an object that belongs to a user.
type Object struct {
	// Values are the object's values in its routes, by name: {"id": "42"}.
	Values map[string]string
	// Body replaces the Body of the routes. Empty: it does not.
	Body string
}

// String returns the values of an object: "42".
func (o Object) String() string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(o.Values)) {
		out = append(out, o.Values[name])
	}
	return strings.Join(out, "/")
}

// Run makes all tries. Each route has a subtest of t, which fails if a try of the route has a
// wrong outcome. The log of t has a table of all tries.
func (k TwoUsers) Run(t *testing.T) {
	t.Helper()
	report, err := k.Report(t.Context())
	if err != nil {
		t.Fatalf("cedarposttest: %v", err)
	}
	for i, route := range k.Routes {
		t.Run(route.Pattern, func(t *testing.T) {
			for _, try := range report.Tries {
				if try.route == i && try.Failure != "" {
					t.Error(try.Failure)
				}
			}
		})
	}
	for _, failure := range report.Uncovered {
		t.Error(failure)
	}
	t.Logf("as two users:\n%s", report)
}

// Report makes all tries and returns their outcomes. Its error is a mistake in k.
func (k TwoUsers) Report(ctx context.Context) (*Report, error) {
	if err := k.check(); err != nil {
		return nil, err
	}
	base := k.URL
	if k.Handler != nil {
		server := httptest.NewUnstartedServer(k.Handler)
		server.Config.ErrorLog = log.New(io.Discard, "", 0) // the answer shows what the handler did
		server.Start()
		defer server.Close()
		base = server.URL
	}
	client := &http.Client{
		Timeout:       10 * time.Second,
		Transport:     &http.Transport{DisableKeepAlives: true},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	report := &Report{Uncovered: k.uncovered()}
	for _, try := range k.tries() {
		try.send(ctx, client, strings.TrimRight(base, "/"))
		report.add(try)
	}
	return report, nil
}

// check finds mistakes with which the tries would prove nothing.
func (k TwoUsers) check() error {
	if (k.Handler == nil) == (k.URL == "") {
		return errors.New("give Handler or URL, one of the two")
	}
	if len(k.Routes) == 0 {
		return errors.New("no routes to try")
	}
	if k.A.Name == "" || k.B.Name == "" || k.A.Name == k.B.Name {
		return errors.New("the two users need two names")
	}
	for _, u := range []User{k.A, k.B} {
		if u.Authenticate == nil {
			return fmt.Errorf("%s cannot authenticate", u.Name)
		}
		if slices.Contains(u.Secrets, "") {
			return fmt.Errorf("a secret of %s is empty, and every answer contains the empty text", u.Name)
		}
	}
	for _, r := range k.Routes {
		if err := k.checkRoute(r); err != nil {
			return err
		}
	}
	return nil
}

func (k TwoUsers) checkRoute(r Route) error {
	if _, _, ok := r.split(); !ok {
		return fmt.Errorf("route %q is not like GET /orders/{id}", r.Pattern)
	}
	if slices.Contains([]int{http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound}, r.Success) {
		return fmt.Errorf("%s: a success of %d looks like a refusal", r.Pattern, r.Success)
	}
	var targets [2]string
	for i, u := range []User{k.A, k.B} {
		object, ok := u.Objects[r.Object]
		if !ok && r.Object != "" {
			return fmt.Errorf("%s: %s has no %s", r.Pattern, u.Name, r.Object)
		}
		target, body := r.fill(object)
		if left := names.FindString(target); left != "" {
			return fmt.Errorf("%s: nothing says what %s is for %s", r.Pattern, left, u.Name)
		}
		targets[i] = target + "\n" + body
	}
	if r.Object != "" && targets[0] == targets[1] {
		return fmt.Errorf("%s: the request is the same for the %s of %s and that of %s", r.Pattern, r.Object, k.A.Name, k.B.Name)
	}
	return nil
}

// uncovered compares the routes of the program with the routes that are tried.
func (k TwoUsers) uncovered() (out []string) {
	if k.Registered == nil {
		return nil
	}
	tried := map[string]bool{}
	for _, r := range k.Routes {
		tried[r.Pattern] = true
		if !slices.Contains(k.Registered, r.Pattern) {
			out = append(out, r.Pattern+" is tried, and not registered")
		}
	}
	for _, pattern := range k.Registered {
		if _, skipped := k.Skip[pattern]; !skipped && !tried[pattern] {
			out = append(out, pattern+" is registered, and nothing tries it")
		}
	}
	for _, pattern := range slices.Sorted(maps.Keys(k.Skip)) {
		switch {
		case !slices.Contains(k.Registered, pattern):
			out = append(out, pattern+" is skipped, and not registered")
		case k.Skip[pattern] == "":
			out = append(out, pattern+" is skipped for no reason")
		}
	}
	return out
}

// tries returns all tries, in the order in which they are made.
func (k TwoUsers) tries() []*Try {
	var refused, own []*Try
	for i, r := range k.Routes {
		try := func(user, owner *User, others ...*User) *Try {
			return &Try{Pattern: r.Pattern, route: i, request: r, user: user, owner: owner, others: others}
		}
		if r.Object != "" {
			refused = append(refused, try(&k.A, &k.B, &k.B), try(&k.B, &k.A, &k.A), try(nil, &k.B, &k.A, &k.B))
		}
		refused = append(refused, try(nil, &k.A, &k.A, &k.B))
		own = append(own, try(&k.A, &k.A, &k.B), try(&k.B, &k.B, &k.A))
	}
	for _, part := range [][]*Try{refused, own} {
		slices.SortStableFunc(part, func(a, b *Try) int { return a.request.harm() - b.request.harm() })
	}
	return append(refused, own...)
}

// harm orders routes by how much a success may change.
func (r Route) harm() int {
	switch method, _, _ := r.split(); method {
	case http.MethodGet, http.MethodHead, http.MethodOptions:
		return 0
	case http.MethodDelete:
		return 2
	}
	return 1
}

// split returns the method and the path of a pattern, without a host.
func (r Route) split() (method, path string, ok bool) {
	method, rest, _ := strings.Cut(r.Pattern, " ")
	slash := strings.Index(rest, "/")
	if slash < 0 || method == "" || strings.Contains(method, "/") {
		return "", "", false
	}
	return method, strings.TrimSuffix(rest[slash:], "{$}"), true
}

// names matches the names in a path that values replace.
var names = regexp.MustCompile(`\{[^{}/]+\}`)

// fill replaces names by their values.
func fill(text string, values map[string]string, escape func(string) string) string {
	for name, value := range values {
		text = strings.ReplaceAll(text, "{"+name+"}", escape(value))
		text = strings.ReplaceAll(text, "{"+name+"...}", strings.ReplaceAll(url.PathEscape(value), "%2F", "/"))
	}
	return text
}

// fill returns the path with the query, and the body, of the request for an object.
func (r Route) fill(o Object) (target, body string) {
	_, path, _ := r.split()
	target = fill(path, o.Values, url.PathEscape)
	if r.Query != "" {
		target += "?" + fill(strings.TrimPrefix(r.Query, "?"), o.Values, url.QueryEscape)
	}
	return target, fill(cmp.Or(o.Body, r.Body), o.Values, func(s string) string { return s })
}

// newRequest makes the request of a try.
func (t *Try) newRequest(ctx context.Context, base string) (*http.Request, error) {
	method, _, _ := t.request.split()
	target, body := t.request.fill(t.owner.Objects[t.request.Object])
	req, err := http.NewRequestWithContext(ctx, method, base+target, strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	for name, values := range t.request.Header {
		req.Header[http.CanonicalHeaderKey(name)] = slices.Clone(values)
	}
	if t.user != nil {
		t.user.Authenticate(req)
	}
	return req, nil
}

const maxAnswer = 16 << 20

// send makes the try.
func (t *Try) send(ctx context.Context, client *http.Client, base string) {
	req, err := t.newRequest(ctx, base)
	if err != nil {
		t.err = err
		return
	}
	res, err := client.Do(req)
	if err != nil {
		t.err = err
		return
	}
	defer res.Body.Close()
	t.Status = res.StatusCode
	body, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	t.answer, t.err = string(body), err
	switch encoding := res.Header.Get("Content-Encoding"); {
	case len(body) > maxAnswer:
		t.err = fmt.Errorf("it has more than %d bytes, and the rest may have a secret", maxAnswer)
	case encoding != "":
		t.err = fmt.Errorf("it is encoded as %q, in which no secret can be seen", encoding)
	}
	var value any
	if json.Unmarshal(body, &value) == nil { // the program may escape other characters than leak does
		again, _ := json.Marshal(value) // it was read from JSON, so it can be written
		t.answer += "\n" + string(again)
	}
	for _, header := range []http.Header{res.Header, res.Trailer} {
		for _, values := range header {
			t.answer += "\n" + strings.Join(values, "\n")
		}
	}
}
