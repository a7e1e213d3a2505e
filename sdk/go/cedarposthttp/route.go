package cedarposthttp

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/enforce"
)

// Route says what has to be allowed before a handler runs. Either it has an Action and
// a resource, or it is Public.
type Route struct {
	// Action is what the handler does.
	Action cedarpost.EntityUID

	// Resource is what it does it to, with values of the path: Shop::Order::"{id}". See
	// [enforce.Template]. ResourceOf finds it in another way, in place of Resource; it
	// must not read the body. What its error says of the request is that the service
	// failed, unless it is an [*enforce.Refusal].
	Resource   string
	ResourceOf func(*http.Request) (cedarpost.EntityUID, error)

	// Context is added to that of the guard. Nil: none.
	Context func(*http.Request) (map[string]any, error)

	// Fields are those that the handler shows, AllFields all of the catalogue. The
	// handler finds in [Result] which it may; or else see Filter.
	Fields    []string
	AllFields bool
	// Filter keeps the handler's answer to the permitted fields. It asks for AllFields
	// unless Fields are named. Every 2xx with a body has to be JSON then (application/json
	// or +json, not compressed), one document about the resource, or the answer is 500.
	// Answers of another status are the handler's own and pass as they are.
	Filter bool

	// Changes is for writes: it finds the paths that a body changes, and all of them
	// have to be permitted. The handler gets the same body. [MergePatch] and [JSONPatch]
	// are two. A write that asks for fields should answer without a body, for what may
	// be written need not be what may be read.
	Changes Changes
	// MaxBody is how long a body may be for Changes. 0: 1 MiB.
	MaxBody int64

	// Hide answers a denial at the object with the 404 of [NotFound]. A handler has to
	// answer the same when there is no such object.
	Hide bool

	// FailOpen says why a request is let through when nobody can be asked. Empty, the
	// default: it is not. It has no fields then, so there is none with Changes. See
	// [cedarpost.Check].
	FailOpen string

	// Public says why this route needs no check. It is counted.
	Public string
}

// Result returns what was decided for the request of ctx; on a public route the zero
// value, which denies. It is [enforce.Result].
func Result(ctx context.Context) cedarpost.Result { return enforce.Result(ctx) }

// compiled is a route with its guard.
type compiled struct {
	Route
	guard    *enforce.Guard
	next     http.Handler
	pattern  string
	method   string // "": any
	template enforce.Template
}

const defaultMaxBody = 1 << 20

func compile(pattern string, r Route) (*compiled, error) {
	method, _, path := split(pattern)
	c := &compiled{Route: r, pattern: pattern, method: method}
	if r.Public != "" {
		if r.asks() {
			return nil, errors.New("a route is either Public or has something to check")
		}
		return c, nil
	}
	if method == "" {
		return nil, errNoMethod
	}
	switch {
	case r.Action.Type == "" || r.Action.ID == "":
		return nil, errors.New("the route has no Action; if it needs no check, say why in Public")
	case (r.Resource == "") == (r.ResourceOf == nil):
		return nil, errors.New("the route has to have one of Resource and ResourceOf")
	case len(r.Fields) > 0 && r.AllFields:
		return nil, errors.New("the route has both Fields and AllFields")
	case r.Changes != nil && (len(r.Fields) > 0 || r.AllFields || r.Filter):
		return nil, errors.New("a route with Changes asks for what a body changes, and cannot ask for other fields or filter")
	case r.Changes != nil && r.FailOpen != "":
		return nil, errors.New("what is let through by FailOpen has no fields, and a route with Changes needs them")
	case r.Changes == nil && r.MaxBody != 0 || r.MaxBody < 0:
		return nil, errors.New("MaxBody is for Changes, and positive")
	}
	if c.MaxBody == 0 {
		c.MaxBody = defaultMaxBody
	}
	if r.Filter && len(r.Fields) == 0 {
		c.AllFields = true
	}
	if r.Resource == "" {
		return c, nil
	}
	var err error
	if c.template, err = enforce.ParseTemplate(r.Resource); err != nil {
		return nil, err
	}
	known := wildcards(path)
	for _, name := range c.template.Names() {
		if !slices.Contains(known, name) {
			return nil, fmt.Errorf("the resource has {%s}, the path has not", name)
		}
	}
	return c, nil
}

// asks says whether anything is set that is for a check.
func (r *Route) asks() bool {
	return r.Action != (cedarpost.EntityUID{}) || r.Resource != "" || r.ResourceOf != nil || r.Context != nil || len(r.Fields) > 0 ||
		r.AllFields || r.Filter || r.Changes != nil || r.MaxBody != 0 || r.Hide || r.FailOpen != ""
}

// ServeHTTP implements http.Handler.
func (c *compiled) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if c.method != "" && r.Method != c.method && (c.method != http.MethodGet || r.Method != http.MethodHead) {
		_ = c.guard.Unmapped("another method than " + c.pattern)
		w.Header().Set("Allow", c.method)
		writeProblem(w, r, problem{Title: "Method Not Allowed", Status: http.StatusMethodNotAllowed})
		return
	}
	ctx, held := enforce.Hold(r.Context())
	r = r.WithContext(ctx)
	if c.Public != "" {
		c.guard.Public()
		c.next.ServeHTTP(w, r)
		return
	}
	result, refused := c.guard.Enforce(ctx, enforce.Question{
		Route: c.pattern, Hide: c.Hide,
		Check: func() (cedarpost.Check, error) { return c.check(w, r) },
	})
	if refused != nil {
		refuse(w, r, refused)
		return
	}
	held.Set(result)
	if c.Filter {
		c.filter(w, r, result)
		return
	}
	c.next.ServeHTTP(w, r)
}

// check makes the check of a request, but for its principal.
func (c *compiled) check(w http.ResponseWriter, r *http.Request) (check cedarpost.Check, err error) {
	check = cedarpost.Check{Action: c.Action, Fields: c.Fields, AllFields: c.AllFields, FailOpen: c.FailOpen}
	if c.ResourceOf != nil {
		check.Resource, err = c.ResourceOf(r)
	} else {
		check.Resource, err = c.template.Fill(r.PathValue)
	}
	if err != nil {
		return check, err
	}
	if c.Context != nil {
		if check.Context, err = c.Context(r); err != nil {
			return check, err
		}
	}
	if c.Changes == nil {
		return check, nil
	}
	// A body that changes nothing asks for no fields, only for the object.
	check.Fields, err = c.changes(w, r)
	check.RequireAllFields = len(check.Fields) > 0
	return check, err
}
