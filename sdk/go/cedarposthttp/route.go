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

// Route says what has to be allowed before a handler runs. It has either an Action and a
// resource, or Public.
type Route struct {
	// Action is what the handler does.
	Action cedarpost.EntityUID

	// Resource is the resource of the action, with values of the path: Shop::Order::"{id}".
	// See [enforce.Template]. ResourceOf is a function instead. It must not read the body.
	// Its error counts as a fault of the program, unless it is an [*enforce.Refusal].
	Resource   string
	ResourceOf func(*http.Request) (cedarpost.EntityUID, error)

	// Context is added to the context of the guard. Nil: none.
	Context func(*http.Request) (map[string]any, error)

	// Fields are the fields that the handler shows. AllFields stands for all fields of the
	// catalogue. The handler finds the permitted ones in [Result], or the route has Filter.
	Fields    []string
	AllFields bool
	// Filter reduces the handler's answer to the permitted fields. It asks for AllFields
	// unless Fields are named. Every 2xx answer with a body must then be one JSON document
	// about the resource (application/json or +json, not compressed), or the client gets 500.
	// Bodies of other answers pass unchanged.
	Filter bool

	// Changes is for writes: it returns the paths that a body changes, and all of them have
	// to be permitted. The handler gets the same body. See [MergePatch] and [JSONPatch]. Such
	// a handler should answer without a body, because a field that may be written may still
	// be one that must not be read.
	Changes Changes
	// MaxBody is how long a body for Changes may be. 0: 1 MiB.
	MaxBody int64

	// Hide answers a denial at the object with the 404 of [NotFound]. The handler must answer
	// the same when there is no such object.
	Hide bool

	// FailOpen is the reason to let a request through when the service cannot be asked.
	// Empty, the default: the request is refused. A request that is let through has no
	// fields, so a route with Changes cannot have it. See [cedarpost.Check].
	FailOpen string

	// Public is the reason why this route needs no check. Its requests are counted.
	Public string
}

// Result returns the decision on the request of ctx. On a public route it is the zero value,
// which denies. It is [enforce.Result].
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
		return nil, errors.New("a request that is let through by FailOpen has no fields, and a route with Changes needs them")
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
			return nil, fmt.Errorf("the resource has {%s}, which is not in the path", name)
		}
	}
	return c, nil
}

// asks says whether any part of a check is set.
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

// check makes the check of a request, without its principal.
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
	// For a body that changes nothing, only the object is checked.
	check.Fields, err = c.changes(w, r)
	check.RequireAllFields = len(check.Fields) > 0
	return check, err
}
