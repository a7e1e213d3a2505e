package server_test

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// reply is the answer to a request.
type reply struct {
	code   int
	header http.Header
	body   string
}

// send makes a request with headers, given as alternating names and values.
func send(t *testing.T, method, url string, headers ...string) reply {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+1 < len(headers); i += 2 {
		if headers[i] == "Host" {
			req.Host = headers[i+1]
		}
		req.Header.Set(headers[i], headers[i+1])
	}
	res, err := http.DefaultTransport.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return reply{res.StatusCode, res.Header, string(body)}
}

// Each plane answers on its own routes with their own methods. Everything else is 404 or 405, with a
// short body that shows nothing.
func TestAttackTryRoutesAndMethods(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	const authorize, apply = "/cedarpost.v1.AuthorizationService/Authorize", "/cedarpost.v1.PolicyService/ListBundles"
	tried := 0
	for _, c := range []struct {
		base, path string
		methods    map[string]int // the answer to other methods than those listed is 405, or 404 if it is 0
		other      int
	}{
		{s.Ops, "/metrics", map[string]int{"GET": 200, "HEAD": 200}, 405},
		{s.Ops, "/livez", map[string]int{"GET": 200, "HEAD": 200}, 405},
		{s.Ops, "/readyz", map[string]int{"GET": 200, "HEAD": 200}, 405},
		{s.Ops, "/startupz", map[string]int{"GET": 200, "HEAD": 200}, 405},
		{s.Ops, "/debug/start", map[string]int{"GET": 200, "HEAD": 200}, 405},
		{s.Ops, "/debug/errors", map[string]int{"GET": 200, "HEAD": 200}, 405},
		{s.Ops, "/debug/goroutines", map[string]int{"GET": 200, "HEAD": 200}, 405},
		{s.Ops, "/", nil, 404},
		{s.Ops, "/debug/pprof/", nil, 404},
		{s.Ops, "/debug/pprof/heap", nil, 404},
		{s.Ops, authorize, nil, 404},
		{s.API, authorize, map[string]int{"POST": 415}, 405},
		{s.API, "/", nil, 404},
		{s.API, "/metrics", nil, 404},
		{s.API, "/debug/pprof/", nil, 404},
		{s.API, apply, nil, 404},
		{s.API, "/cedarpost.v1.AuthorizationService/", nil, 404},
		{s.API, "/cedarpost.v1.AuthorizationService/None", nil, 404},
		{s.API, "/cedarpost.v1.AuthorizationService/Authorize/../../metrics", nil, 404},
		{s.Admin, apply, map[string]int{"POST": 415}, 405},
		{s.Admin, authorize, nil, 404},
		{s.Admin, "/readyz", nil, 404},
		{s.Admin, "/debug/errors", nil, 404},
		{s.Admin, "/console/", nil, 404},
	} {
		for _, method := range []string{"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"} {
			tried++
			want := c.other
			if code, ok := c.methods[method]; ok {
				want = code
			}
			res := send(t, method, c.base+c.path, "Origin", "https://evil.example")
			// The path without its dots does not exist either.
			redirected := want == 404 && res.code == http.StatusTemporaryRedirect && res.header.Get("Location") == "/metrics"
			if res.code != want && !redirected {
				t.Errorf("%s %s: %d, want %d: %s", method, c.path, res.code, want, res.body)
			}
			if res.code >= 300 && !redirected && (len(res.body) > 200 || strings.Contains(res.body, "<")) {
				t.Errorf("%s %s: the body has %d bytes: %.300s", method, c.path, len(res.body), res.body)
			}
			for name := range res.header {
				if strings.HasPrefix(name, "Access-Control-") {
					t.Errorf("%s %s: %s without an origin that is listed", method, c.path, name)
				}
			}
		}
	}
	t.Logf("attack: %d requests with methods and routes that do not exist, without a key; all are 404, 405 or 415, and none is allowed for another origin", tried)
}

// Parts of the operations plane can be switched off and on, and without any part there is none.
func TestOpsParts(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		set  func(*server.Config)
		want map[string]int
	}{
		"default":    {func(*server.Config) {}, map[string]int{"/metrics": 200, "/livez": 200, "/readyz": 200, "/debug/pprof/": 404}},
		"no metrics": {func(c *server.Config) { c.NoMetrics = true }, map[string]int{"/metrics": 404, "/livez": 200, "/readyz": 200}},
		"no debug": {func(c *server.Config) { c.NoDebug = true }, map[string]int{
			"/metrics": 200, "/livez": 200, "/debug/start": 404, "/debug/errors": 404, "/debug/goroutines": 404,
		}},
		"no health": {func(c *server.Config) { c.NoHealth = true }, map[string]int{"/metrics": 200, "/livez": 404, "/readyz": 404}},
		"pprof": {func(c *server.Config) { c.Pprof = true }, map[string]int{
			"/debug/pprof/": 200, "/debug/pprof/goroutine?debug=1": 200, "/debug/pprof/heap": 200, "/debug/pprof/cmdline": 404, "/debug/pprof/none": 404,
		}},
	} {
		s := servertest.New(t, c.set)
		for path, want := range c.want {
			if res := send(t, http.MethodGet, s.Ops+path); res.code != want {
				t.Errorf("%s: GET %s: %d, want %d: %.100s", name, path, res.code, want, res.body)
			}
		}
		// A page whose name was made to resolve to this machine.
		if res := send(t, http.MethodGet, s.Ops+"/metrics", "Host", "rebound.example:80"); name == "default" && (res.code != http.StatusForbidden || len(res.body) > 100) {
			t.Errorf("metrics for another host: %d", res.code)
		}
		for _, path := range []string{"start", "errors", "goroutines"} {
			want := http.StatusForbidden
			if name == "no debug" {
				want = http.StatusNotFound
			}
			for _, header := range [][2]string{{"Host", "rebound.example:80"}, {"Sec-Fetch-Site", "cross-site"}, {"Sec-Fetch-Site", "same-site"}} {
				if res := send(t, http.MethodGet, s.Ops+"/debug/"+path, header[0], header[1]); res.code != want {
					t.Errorf("%s: %s with %s: %d", name, path, header, res.code)
				}
			}
		}
		if name == "pprof" {
			for _, method := range []string{"POST", "DELETE"} {
				if res := send(t, method, s.Ops+"/debug/pprof/heap"); res.code != http.StatusMethodNotAllowed {
					t.Errorf("%s of a profile: %d", method, res.code)
				}
			}
			// A page whose name was made to resolve to this machine.
			if res := send(t, http.MethodGet, s.Ops+"/debug/pprof/heap", "Host", "rebound.example:80"); res.code != http.StatusForbidden || len(res.body) > 100 {
				t.Errorf("a profile for another host: %d", res.code)
			}
			for site, want := range map[string]int{"cross-site": 403, "same-site": 403, "same-origin": 200, "none": 200} {
				if res := send(t, http.MethodGet, s.Ops+"/debug/pprof/heap", "Sec-Fetch-Site", site); res.code != want {
					t.Errorf("a profile for a page, %s: %d", site, res.code)
				}
			}
		}
	}
	db := servertest.New(t).DB
	for _, addr := range []string{"0.0.0.0:0", ":0", "[::]:0", "192.0.2.1:0", "localhost.example.org:0"} {
		_, err := server.New(t.Context(), server.Config{DB: db, Listen: "127.0.0.1:0", AdminListen: "127.0.0.1:0", OpsListen: addr, Pprof: true})
		if err == nil || !strings.Contains(err.Error(), "only on a loopback address") {
			t.Errorf("profiles on %s: %v", addr, err)
		}
	}
	for _, origin := range []string{"*", "https://*", "https://*.example.org", "null", "example.org", "https://example.org/", "https://example.org:443", "http://example.org", "https://Example.org", "ftp://example.org", "https://a@example.org", ""} {
		_, err := server.New(t.Context(), server.Config{DB: db, Listen: "127.0.0.1:0", AdminListen: "127.0.0.1:0", OpsListen: "127.0.0.1:0", CORSOrigins: []string{origin}})
		if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%q", origin)) {
			t.Errorf("origin %q: %v", origin, err)
		}
	}
}

// Only pages of listed origins may call from a browser. Preflight requests need no key, and calls
// need one as ever.
func TestAttackCrossOrigin(t *testing.T) {
	t.Parallel()
	const listed = "https://console.example.org"
	s := servertest.New(t, func(c *server.Config) { c.CORSOrigins = []string{listed, "http://localhost:3000"} })
	const authorize = "/cedarpost.v1.AuthorizationService/Authorize"
	preflight := func(base, origin, method, headers string) http.Header {
		t.Helper()
		res := send(t, http.MethodOptions, base+authorize, "Origin", origin, "Access-Control-Request-Method", method, "Access-Control-Request-Headers", headers)
		if res.code != http.StatusNoContent || res.body != "" {
			t.Errorf("preflight of %s: %d %s", origin, res.code, res.body)
		}
		return res.header
	}
	for _, base := range []string{s.API, s.Admin} {
		for _, origin := range []string{listed, "http://localhost:3000"} {
			h := preflight(base, origin, "POST", "authorization,connect-protocol-version,content-type")
			if h.Get("Access-Control-Allow-Origin") != origin || h.Get("Access-Control-Allow-Methods") != "POST" ||
				!strings.Contains(strings.ToLower(h.Get("Access-Control-Allow-Headers")), "authorization") || h.Get("Access-Control-Allow-Credentials") != "" {
				t.Errorf("preflight of %s: %v", origin, h)
			}
			if h := preflight(base, origin, "DELETE", ""); h.Get("Access-Control-Allow-Methods") != "" {
				t.Errorf("DELETE is allowed: %v", h)
			}
			if h := preflight(base, origin, "POST", "x-secret"); h.Get("Access-Control-Allow-Headers") != "" {
				t.Errorf("a header is allowed that is not listed: %v", h)
			}
		}
	}
	strangers := []string{
		"https://evil.example", "https://console.example.org.evil.example", "https://evilconsole.example.org", "http://console.example.org", "https://console.example.org:8443",
		"https://CONSOLE.example.org", "null", "http://localhost", "https://console.example.org/",
	}
	for _, origin := range strangers {
		if h := preflight(s.API, origin, "POST", "authorization"); h.Get("Access-Control-Allow-Origin") != "" || h.Get("Access-Control-Allow-Headers") != "" {
			t.Errorf("preflight of %s: %v", origin, h)
		}
		// A call of such a page is refused without a key as any call; with one, the page cannot read the answer.
		for _, key := range []string{"", "Bearer " + s.Token} {
			res := send(t, http.MethodPost, s.API+authorize, "Origin", origin, "Authorization", key, "Content-Type", "application/json")
			if res.header.Get("Access-Control-Allow-Origin") != "" {
				t.Errorf("call of %s: %v", origin, res.header)
			}
			if key == "" && res.code != http.StatusUnauthorized {
				t.Errorf("call without a key: %d", res.code)
			}
		}
	}
	res := send(t, http.MethodPost, s.API+authorize, "Origin", listed, "Content-Type", "application/json")
	if res.code != http.StatusUnauthorized || res.header.Get("Access-Control-Allow-Origin") != listed || !strings.Contains(res.header.Get("Vary"), "Origin") {
		t.Errorf("a call of a listed origin without a key: %d %v", res.code, res.header)
	}
	t.Logf("attack: %d other origins, with and without a key; allowed: 0", len(strangers))
}
