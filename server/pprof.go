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
		mux.Handle("GET "+path, onlyForLoopback(h))
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

// isLoopback reports whether a host, with or without a port, is this machine.
func isLoopback(address string) bool {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		host = strings.TrimSuffix(strings.TrimPrefix(address, "["), "]")
	}
	ip := net.ParseIP(host)
	return strings.EqualFold(strings.TrimSuffix(host, "."), "localhost") || ip != nil && ip.IsLoopback()
}
