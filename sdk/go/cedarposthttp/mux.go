// Package cedarposthttp stands between net/http and the handlers of a service: each
// route says what has to be allowed, and no handler runs before it was. A check that
// every handler has to remember is forgotten in one of them; here a route without a
// mapping does not start, or is not served.
//
// What is asked about is taken from the same values that the handler gets, after the
// router has matched, so there is no other way to write a path for which the two would
// differ.
package cedarposthttp

import (
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/cedarpost/cedarpost/sdk/go/enforce"
)

// Mux is an [http.ServeMux] whose every route has a [Route]. What matches none is
// refused with 404 and counted.
type Mux struct {
	guard    *enforce.Guard
	mux      *http.ServeMux
	patterns []string
}

// NewMux makes a Mux without routes.
func NewMux(guard *enforce.Guard) *Mux { return &Mux{guard: guard, mux: http.NewServeMux()} }

// Patterns are those of all routes, as for a test that tries each of them.
func (m *Mux) Patterns() []string { return slices.Clone(m.patterns) }

// Handle registers a handler for a pattern of [http.ServeMux], and what has to be
// allowed before it runs. It panics if the pattern or the route cannot be, as ServeMux
// does: such a program must not start.
func (m *Mux) Handle(pattern string, route Route, handler http.Handler) {
	h, err := Handler(m.guard, pattern, route, handler)
	if err != nil {
		panic(err)
	}
	m.mux.Handle(pattern, h)
	m.patterns = append(m.patterns, pattern)
}

// HandleFunc is Handle for a function.
func (m *Mux) HandleFunc(pattern string, route Route, handler func(http.ResponseWriter, *http.Request)) {
	if handler == nil {
		panic(fmt.Errorf("cedarposthttp: %s: no handler", pattern))
	}
	m.Handle(pattern, route, http.HandlerFunc(handler))
}

// ServeHTTP implements http.Handler.
func (m *Mux) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	h, pattern := m.mux.Handler(r)
	if pattern == "" {
		unmatched(m.guard, w, r, h)
		return
	}
	m.mux.ServeHTTP(w, r)
}

// unmatched answers a request that no pattern matches. h is what ServeMux answers it
// with: it may know of other methods.
func unmatched(guard *enforce.Guard, w http.ResponseWriter, r *http.Request, h http.Handler) {
	refused := guard.Unmapped("no pattern")
	said := &statusOnly{header: http.Header{}}
	h.ServeHTTP(said, r)
	if said.status == http.StatusMethodNotAllowed {
		w.Header()["Allow"] = said.header["Allow"]
		writeProblem(w, r, problem{Title: "Method Not Allowed", Status: said.status})
		return
	}
	refuse(w, r, refused)
}

// statusOnly is a response that nobody gets.
type statusOnly struct {
	header http.Header
	status int
}

func (s *statusOnly) Header() http.Header         { return s.header }
func (s *statusOnly) WriteHeader(status int)      { s.status = status }
func (s *statusOnly) Write(p []byte) (int, error) { return len(p), nil }

// Wrap puts checks before the routes that a ServeMux has already, by their patterns.
// What matches a pattern without a route is refused with 404, counted and logged, and
// so is what matches none. It fails if a route cannot be, or is for a pattern that the
// ServeMux does not have. A ServeMux does not list its patterns, so one without a route
// shows only when it is asked for: [enforce.Stats].Unmapped. All patterns have to be
// registered before.
//
// There is no Wrap for other routers, for they do not tell which of their routes a
// request will take before it takes it: put a [Handler] around each of their handlers.
func Wrap(guard *enforce.Guard, next *http.ServeMux, routes map[string]Route) (http.Handler, error) {
	checked := http.NewServeMux()
	for _, pattern := range slices.Sorted(maps.Keys(routes)) {
		pass := func(w http.ResponseWriter, r *http.Request) { next.ServeHTTP(w, r) }
		h, err := Handler(guard, pattern, routes[pattern], http.HandlerFunc(pass))
		if err != nil {
			return nil, err
		}
		if err := register(checked, pattern, h); err != nil {
			return nil, err
		}
		if _, found := next.Handler(sample(pattern)); found != pattern {
			return nil, fmt.Errorf("cedarposthttp: there is a route for %q, which the ServeMux does not serve", pattern)
		}
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h, pattern := next.Handler(r)
		if pattern == "" {
			unmatched(guard, w, r, h)
			return
		}
		// The two have to agree. Where next has a narrower pattern that no route is for, the
		// wider one must not speak for it.
		if _, known := checked.Handler(r); known != pattern {
			refuse(w, r, guard.Unmapped(pattern))
			return
		}
		checked.ServeHTTP(w, r)
	}), nil
}

// register is mux.Handle with an error for a panic.
func register(mux *http.ServeMux, pattern string, h http.Handler) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("cedarposthttp: %v", r)
		}
	}()
	mux.Handle(pattern, h)
	return nil
}

// Handler puts the check of one route before one handler, for routers that are no
// ServeMux. Requests have to come with the values of the pattern's wildcards in
// [http.Request.PathValue], unless the route says itself what the resource is. A
// request of another method than the pattern's is refused.
func Handler(guard *enforce.Guard, pattern string, route Route, next http.Handler) (http.Handler, error) {
	if guard == nil || next == nil {
		return nil, fmt.Errorf("cedarposthttp: %s: no guard or no handler", pattern)
	}
	if err := register(http.NewServeMux(), pattern, next); err != nil {
		return nil, err
	}
	c, err := compile(pattern, route)
	if err != nil {
		return nil, fmt.Errorf("cedarposthttp: %s: %w", pattern, err)
	}
	c.guard, c.next = guard, next
	return c, nil
}

// split takes a pattern of ServeMux apart.
func split(pattern string) (method, host, path string) {
	rest := strings.TrimLeft(pattern, " \t")
	if i := strings.IndexAny(pattern, " \t"); i >= 0 {
		method, rest = pattern[:i], strings.TrimLeft(pattern[i:], " \t")
	}
	i := max(strings.IndexByte(rest, '/'), 0)
	return method, rest[:i], rest[i:]
}

// wildcards are the names in a pattern's path.
func wildcards(path string) []string {
	var out []string
	for segment := range strings.SplitSeq(path, "/") {
		if name, ok := wildcard(segment); ok && name != "$" {
			out = append(out, strings.TrimSuffix(name, "..."))
		}
	}
	return out
}

func wildcard(segment string) (string, bool) {
	name, open := strings.CutPrefix(segment, "{")
	name, closed := strings.CutSuffix(name, "}")
	return name, open && closed
}

// sample is a request that matches a pattern, and no narrower one that anybody has.
func sample(pattern string) *http.Request {
	method, host, path := split(pattern)
	segments := strings.Split(path, "/")
	for i, s := range segments {
		if name, ok := wildcard(s); ok {
			segments[i] = map[bool]string{false: "cedarpost-looks-for-this-route"}[name == "$"]
		}
	}
	if method == "" {
		method = http.MethodGet
	}
	r, err := http.NewRequest(method, "http://"+host+strings.Join(segments, "/"), http.NoBody) //nolint:noctx // it is never sent
	if err != nil {
		return &http.Request{}
	}
	return r
}

var errNoMethod = errors.New("the pattern names no method: what has to be allowed depends on it")
