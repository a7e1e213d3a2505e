package server

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/rs/cors"
)

// corsMaxAge is for how many seconds a browser may keep the answer to a preflight request.
const corsMaxAge = 600

// withCORS lets pages of the listed origins call a plane from a browser (the Fetch standard, "CORS
// protocol"). Without origins it changes nothing: browsers then refuse pages of other origins. A page
// has to send an API key in a header as every caller, and a preflight request needs none, because
// browsers send none. Cookies are never accepted, so credentials are not allowed.
func withCORS(h http.Handler, origins []string) http.Handler {
	if len(origins) == 0 {
		return h
	}
	return cors.New(cors.Options{
		AllowOriginFunc: func(origin string) bool { return slices.Contains(origins, origin) },
		AllowedMethods:  []string{http.MethodPost},
		AllowedHeaders: []string{"Authorization", "Content-Type", "Connect-Protocol-Version", "Connect-Timeout-Ms", "Grpc-Timeout",
			"X-Grpc-Web", "X-User-Agent", "Traceparent"},
		ExposedHeaders: []string{"Grpc-Status", "Grpc-Message", "Grpc-Status-Details-Bin"},
		MaxAge:         corsMaxAge,
	}).Handler(h)
}

// CheckOrigins returns an error if one of the origins of [Config.CORSOrigins] is one that no browser
// sends, a pattern, or an origin without TLS of another machine.
func CheckOrigins(origins []string) error {
	for _, origin := range origins {
		u, err := url.Parse(origin)
		var why error
		switch {
		case strings.Contains(origin, "*"):
			why = errors.New("list each origin: there are no patterns, because every page that matches could use an API key that its user has")
		case err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.Scheme+"://"+u.Host != origin || strings.ToLower(origin) != origin:
			why = errors.New("not an origin like https://console.example.org or http://localhost:3000, in small letters and without a path")
		case u.Port() == map[string]string{"https": "443", "http": "80"}[u.Scheme]:
			why = errors.New("leave out the usual port, as browsers do")
		case u.Scheme == "http" && !isLoopback(u.Host):
			why = errors.New("a page without TLS can be replaced on its way: use https, or http for this machine alone")
		}
		if why != nil {
			return fmt.Errorf("%q: %w", origin, why)
		}
	}
	return nil
}
