// Package cedarposthttp puts checks between net/http and the handlers of a program. Each
// route says what has to be allowed, and its handler runs only after that was allowed. A
// program that leaves checks to its handlers will forget one. Here, a route without a mapping
// stops the program at the start, or is not served.
//
// The check gets the same values that the handler gets, after the router has matched. So no
// spelling of a path makes the two differ.
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

// Mux is an [http.ServeMux] in which every pattern has a [Route]. A request that matches no
// pattern is refused with 404 and counted.
type Mux struct {
	guard    *enforce.Guard
	mux      *http.ServeMux
	patterns []string
}

// NewMux makes a Mux without routes.
func NewMux(guard *enforce.Guard) *Mux { return &Mux{guard: guard, mux: http.NewServeMux()} }

// Patterns returns the patterns of all routes, for example for a test that tries each one.
func (m *Mux) Patterns() []string { return slices.Clone(m.patterns) }

// Handle registers a handler for a pattern of [http.ServeMux], and what has to be allowed
// before it runs. Like ServeMux, it panics if the pattern or the route is not valid: such a
// program must not start.
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

// unmatched answers a request that no pattern matches. h is ServeMux's answer, which shows
// whether the path has other methods.
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

// statusOnly is a response that keeps status and header, and is not sent.
type statusOnly struct {
	header http.Header
	status int
}

func (s *statusOnly) Header() http.Header         { return s.header }
func (s *statusOnly) WriteHeader(status int)      { s.status = status }
func (s *statusOnly) Write(p []byte) (int, error) { return len(p), nil }

// Wrap puts checks before the handlers of an existing ServeMux. routes has a route for each
// pattern. A request that matches a pattern without a route, or no pattern, is refused with
// 404 and counted, and the first of each pattern is logged. Wrap fails if a route is not
// valid, or is for a pattern that the ServeMux does not have. A ServeMux does not list its
// patterns, so a pattern without a route shows only when it is requested, in
// [enforce.Stats].Unmapped. Register all patterns before Wrap.
//
// There is no Wrap for other routers, because they do not say in advance which route a
// request takes. Put a [Handler] around each of their handlers.
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
		// Both must match the same pattern. If next has a narrower pattern without a route, the
		// check of a wider one must not be used for it.
		if _, known := checked.Handler(r); known != pattern {
			refuse(w, r, guard.Unmapped(pattern))
			return
		}
		checked.ServeHTTP(w, r)
	}), nil
}

// register is mux.Handle with an error instead of a panic.
func register(mux *http.ServeMux, pattern string, h http.Handler) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("cedarposthttp: %v", r)
		}
	}()
	mux.Handle(pattern, h)
	return nil
}

// Handler puts the check of one route before one handler, for routers other than ServeMux.
// The router must set the values of the pattern's wildcards with
// [http.Request.SetPathValue], unless the route has a ResourceOf. A request with another
// method than the pattern's is refused.
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

// split splits a pattern of ServeMux into its parts.
func split(pattern string) (method, host, path string) {
	rest := strings.TrimLeft(pattern, " \t")
	if i := strings.IndexAny(pattern, " \t"); i >= 0 {
		method, rest = pattern[:i], strings.TrimLeft(pattern[i:], " \t")
	}
	i := max(strings.IndexByte(rest, '/'), 0)
	return method, rest[:i], rest[i:]
}

// wildcards returns the names of the wildcards in a pattern's path.
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

// sample returns a request that matches a pattern, and no narrower pattern that a program is
// likely to have.
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

var errNoMethod = errors.New("the pattern names no method, but what has to be allowed depends on the method")
