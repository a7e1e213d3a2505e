package server

import (
	"errors"
	"net"
	"net/http"
	"net/http/pprof" // it also registers with http.DefaultServeMux, which nothing here serves
	"strings"
)

// errPprofExposed refuses profiles for other machines: they show what is in memory, and making one
// takes a processor.
var errPprofExposed = errors.New("profiles have no protection of their own, so they are served only on a loopback address, such as --ops-listen 127.0.0.1:9090")

// servePprof adds the profiles of runtime/pprof. It leaves out the command line of the process.
func servePprof(mux *http.ServeMux) {
	for path, h := range map[string]http.HandlerFunc{
		"/debug/pprof/{$}": pprof.Index, "/debug/pprof/{profile}": pprof.Index,
		"/debug/pprof/profile": pprof.Profile, "/debug/pprof/symbol": pprof.Symbol, "/debug/pprof/trace": pprof.Trace,
	} {
		mux.Handle("GET "+path, onlyForTools(h))
	}
}

// onlyForLoopback refuses requests whose Host is not of this machine. A page in a browser of this
// machine can make its own name resolve to 127.0.0.1, but its requests still have that name.
func onlyForLoopback(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !isLoopback(r.Host) {
			http.Error(w, "only for this machine", http.StatusForbidden)
			return
		}
		h.ServeHTTP(w, r)
	})
}

// onlyForTools refuses requests that a page of another origin makes a browser of this machine send, too.
// Such a page cannot read the answer, but making it takes a processor or stops all goroutines. Browsers
// say where a request is from (https://www.w3.org/TR/fetch-metadata/), and other programs do not.
func onlyForTools(h http.Handler) http.Handler {
	return onlyForLoopback(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Header.Get("Sec-Fetch-Site") {
		case "", "none", "same-origin": // a tool, the address bar, and the links of the list of profiles
			h.ServeHTTP(w, r)
		default:
			http.Error(w, "not for other pages", http.StatusForbidden)
		}
	}))
}

// isLoopback reports whether a host, with or without a port, is this machine.
func isLoopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		host = strings.TrimSuffix(strings.TrimPrefix(address, "["), "]")
	}
	ip := net.ParseIP(host)
	return strings.EqualFold(strings.TrimSuffix(host, "."), "localhost") || ip != nil && ip.IsLoopback()
}
