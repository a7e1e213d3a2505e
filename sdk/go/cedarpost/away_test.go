package cedarpost

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// both has one behavior for single questions and for batches.
func both(do func(context.Context) error) *strange {
	return &strange{
		authorize: func(ctx context.Context, _ *cedarpostv1.AuthorizeRequest) (*cedarpostv1.AuthorizeResponse, error) {
			if err := do(ctx); err != nil {
				return nil, err
			}
			return allow(1), nil
		},
		batch: func(ctx context.Context, req *cedarpostv1.AuthorizeBatchRequest) (*cedarpostv1.AuthorizeBatchResponse, error) {
			if err := do(ctx); err != nil {
				return nil, err
			}
			res := &cedarpostv1.AuthorizeBatchResponse{}
			for range req.GetChecks() {
				res.Results = append(res.Results, &cedarpostv1.AuthorizeBatchResult{Result: &cedarpostv1.AuthorizeBatchResult_Response{Response: allow(1)}})
			}
			return res, nil
		},
	}
}

// foreign is a server that is not Cedarpost.
func foreign(t *testing.T, handler http.HandlerFunc) []string {
	t.Helper()
	hs := httptest.NewUnstartedServer(handler)
	hs.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)
	hs.Config.Protocols = new(http.Protocols)
	hs.Config.Protocols.SetUnencryptedHTTP2(true)
	hs.Start()
	t.Cleanup(func() { hs.CloseClientConnections(); hs.Close() })
	return []string{hs.URL}
}

// socket is a server with a handler for raw connections.
func socket(t *testing.T, fn func(net.Conn)) []string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { _ = c.Close() })
			fn(c)
		}
	}()
	return []string{"http://" + l.Addr().String()}
}

// secure is a server with a certificate that no other client trusts.
func secure(t *testing.T, change func(*tls.Config)) *httptest.Server {
	t.Helper()
	hs := httptest.NewUnstartedServer(http.NotFoundHandler())
	hs.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)
	hs.EnableHTTP2 = true
	hs.TLS = &tls.Config{}
	change(hs.TLS)
	hs.StartTLS()
	t.Cleanup(hs.Close)
	return hs
}

// patient is a client that trusts a server, or none, and waits long: on a busy machine
// a handshake or the answer to a ping can be late.
func patient(t *testing.T, trusts *httptest.Server, name string) *http.Client {
	t.Helper()
	roots := x509.NewCertPool()
	if trusts != nil {
		roots.AddCert(trusts.Certificate())
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP2(true)
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: protocols, TLSClientConfig: &tls.Config{RootCAs: roots, ServerName: name}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// htmlPage answers with an HTML page.
func htmlPage(code int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		w.WriteHeader(code)
		_, _ = io.WriteString(w, "<html>a page</html>")
	}
}

// Each row is an error that the network or a server can cause, and says whether a check
// with FailOpen is let through. docs/sdk-go/check.md has the same rows. Each question
// is asked more often than it takes to open the breaker, to show that the breaker does
// not change the outcome.
func TestWhatFailsOpenOverTheWire(t *testing.T) {
	minute := context.WithCancel
	says := func(code connect.Code) func(*testing.T, *Config) {
		return func(t *testing.T, cfg *Config) {
			c := both(func(context.Context) error { return connect.NewError(code, "the test says so") }).serve(t, uncached)
			cfg.Servers, cfg.HTTPClient = c.cfg.Servers, patient(t, nil, "")
		}
	}
	answers := func(handler http.HandlerFunc) func(*testing.T, *Config) {
		return func(t *testing.T, cfg *Config) {
			cfg.Servers, cfg.HTTPClient = foreign(t, handler), patient(t, nil, "")
		}
	}
	http1 := func(handler http.HandlerFunc) func(*testing.T, *Config) {
		return func(t *testing.T, cfg *Config) {
			hs := httptest.NewUnstartedServer(handler)
			hs.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelInfo)
			hs.Start()
			t.Cleanup(func() { hs.CloseClientConnections(); hs.Close() })
			cfg.Servers, cfg.noPings = []string{hs.URL}, true
		}
	}
	// speaks sends a text and closes the connection: at once, or after it has read what
	// the client sends first.
	speaks := func(text string, reads bool) func(*testing.T, *Config) {
		return func(t *testing.T, cfg *Config) {
			cfg.noPings = true
			cfg.Servers = socket(t, func(c net.Conn) {
				if reads {
					_, _ = c.Read(make([]byte, 4096))
				}
				_, _ = io.WriteString(c, text)
				_ = c.Close()
			})
		}
	}
	silent := func(t *testing.T, cfg *Config) {
		cfg.Servers, cfg.Timeout = socket(t, func(net.Conn) {}), 50*time.Millisecond
	}
	for _, c := range []struct {
		name    string
		opens   bool
		kind    error // if it is not let through
		prepare func(*testing.T, *Config)
		within  func(context.Context) (context.Context, context.CancelFunc)
	}{
		{"no connection", true, nil, func(_ *testing.T, cfg *Config) { cfg.Servers = []string{"http://127.0.0.1:1"} }, minute},
		{"a connection that breaks", true, nil, func(t *testing.T, cfg *Config) { cfg.Servers = socket(t, func(c net.Conn) { _ = c.Close() }) }, minute},
		{"http to a port with TLS, which is the same", true, nil, func(t *testing.T, cfg *Config) {
			cfg.Servers = []string{strings.Replace(secure(t, func(*tls.Config) {}).URL, "https:", "http:", 1)}
		}, minute},
		{"no answer within Timeout", true, nil, silent, minute},
		{"unavailable", true, nil, says(connect.CodeUnavailable), minute},
		{"resource_exhausted", true, nil, says(connect.CodeResourceExhausted), minute},
		{"deadline_exceeded, with no deadline of the caller", true, nil, says(connect.CodeDeadlineExceeded), minute},
		{"a load balancer without a server: 502", true, nil, answers(htmlPage(502)), minute},
		{"503", true, nil, answers(htmlPage(503)), minute},
		{"504", true, nil, answers(htmlPage(504)), minute},
		{"a proxy that is overloaded: 429", true, nil, answers(htmlPage(429)), minute},

		{"the caller's deadline ends, with no answer", false, context.DeadlineExceeded, func(t *testing.T, cfg *Config) {
			silent(t, cfg)
			cfg.Timeout = time.Minute
		}, func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithTimeout(ctx, 20*time.Millisecond)
		}},
		{"the caller's deadline ends, and the server says unavailable", false, context.DeadlineExceeded, func(t *testing.T, cfg *Config) {
			cfg.Servers, cfg.HTTPClient = both(func(ctx context.Context) error {
				<-ctx.Done()
				return connect.NewError(connect.CodeUnavailable, "could not read or record")
			}).serve(t, uncached).cfg.Servers, patient(t, nil, "")
		}, func(ctx context.Context) (context.Context, context.CancelFunc) {
			return context.WithTimeout(ctx, 20*time.Millisecond)
		}},
		{"the caller gives up", false, context.Canceled, func(t *testing.T, cfg *Config) {
			silent(t, cfg)
			cfg.Timeout = time.Minute
		}, func(ctx context.Context) (context.Context, context.CancelFunc) {
			ctx, cancel := context.WithCancel(ctx)
			time.AfterFunc(10*time.Millisecond, cancel)
			return ctx, cancel
		}},
		{"invalid_argument", false, ErrInvalid, says(connect.CodeInvalidArgument), minute},
		{"failed_precondition", false, ErrInvalid, says(connect.CodeFailedPrecondition), minute},
		{"out_of_range", false, ErrInvalid, says(connect.CodeOutOfRange), minute},
		{"aborted", false, ErrUnknownRevision, says(connect.CodeAborted), minute},
		{"unauthenticated", false, ErrUnauthenticated, says(connect.CodeUnauthenticated), minute},
		{"permission_denied", false, ErrPermissionDenied, says(connect.CodePermissionDenied), minute},
		{"internal", false, ErrUnavailable, says(connect.CodeInternal), minute},
		{"unknown", false, ErrUnavailable, says(connect.CodeUnknown), minute},
		{"unimplemented", false, ErrWrongServer, says(connect.CodeUnimplemented), minute},
		{"data_loss", false, ErrUnavailable, says(connect.CodeDataLoss), minute},
		{"not_found", false, ErrUnavailable, says(connect.CodeNotFound), minute},
		{"a handler that panics", false, ErrUnavailable, answers(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }), minute},
		{"a page instead of an answer", false, ErrUnavailable, answers(htmlPage(200)), minute},
		{"a redirect", false, ErrUnavailable, answers(htmlPage(302)), minute},
		{"another service: 404", false, ErrWrongServer, answers(htmlPage(404)), minute},
		{"a proxy that refuses: 400", false, ErrUnavailable, answers(htmlPage(400)), minute},
		{"a proxy that refuses: 403", false, ErrPermissionDenied, answers(htmlPage(403)), minute},
		{"a proxy that refuses: 413", false, ErrUnavailable, answers(htmlPage(413)), minute},
		{"a proxy that refuses: 431", false, ErrUnavailable, answers(htmlPage(431)), minute},
		{"a proxy that failed: 500", false, ErrUnavailable, answers(htmlPage(500)), minute},
		{"an answer that cannot be read", false, ErrInvalid, answers(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/proto")
			_, _ = io.WriteString(w, "\xff\xff\xff")
		}), minute},
		{"a certificate of an unknown authority", false, ErrUnavailable, func(t *testing.T, cfg *Config) {
			cfg.Servers, cfg.HTTPClient = []string{secure(t, func(*tls.Config) {}).URL}, patient(t, nil, "")
		}, minute},
		{"a certificate of another name", false, ErrUnavailable, func(t *testing.T, cfg *Config) {
			hs := secure(t, func(*tls.Config) {})
			cfg.Servers, cfg.HTTPClient = []string{hs.URL}, patient(t, hs, "other.example")
		}, minute},
		{"a server that wants a client certificate", false, ErrUnavailable, func(t *testing.T, cfg *Config) {
			hs := secure(t, func(c *tls.Config) { c.ClientAuth, c.MaxVersion = tls.RequireAnyClientCert, tls.VersionTLS12 })
			cfg.Servers, cfg.HTTPClient = []string{hs.URL}, patient(t, hs, "")
		}, minute},
		{"https to a port without TLS", false, ErrUnavailable, func(t *testing.T, cfg *Config) {
			hs := httptest.NewServer(htmlPage(200))
			t.Cleanup(hs.Close)
			cfg.Servers, cfg.HTTPClient = []string{strings.Replace(hs.URL, "http:", "https:", 1)}, patient(t, nil, "")
		}, minute},
		{"http to a server of HTTP/1.1", false, ErrUnavailable, http1(htmlPage(200)), minute},
		{"http to a proxy of HTTP/1.1: 400", false, ErrUnavailable, speaks("HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n", true), minute},
		{"http to a proxy of HTTP/1.1: 401", false, ErrUnavailable, speaks("HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n", true), minute},
		{"http to a proxy of HTTP/1.1: 403", false, ErrUnavailable, speaks("HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", true), minute},
		{"http to a proxy of HTTP/1.1: 302", false, ErrUnavailable, speaks("HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n", true), minute},
		{"http to a proxy of HTTP/1.1: 502", false, ErrUnavailable, speaks("HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n", true), minute},
		{"http to a proxy of HTTP/1.1 that closes at once: 500", false, ErrUnavailable, speaks("HTTP/1.0 500 Error\r\n\r\n", false), minute},
		{"http to a page without a header", false, ErrUnavailable, speaks("<!DOCTYPE html>\n<html></html>", true), minute},
		{"http to a port that speaks first", false, ErrUnavailable, speaks("220 mail.example ESMTP\r\n", false), minute},
		{"http to a port that says little", false, ErrUnavailable, speaks("-", false), minute},
		{"http to a port with TLS that sends an alert", false, ErrUnavailable, speaks("\x15\x03\x01\x00\x02\x02\x0a", true), minute},
		{"HTTP/2 that breaks after its first frame", true, nil, speaks("\x00\x00\x00\x04\x00\x00\x00\x00\x00", true), minute},
		{"no file descriptor left", false, ErrUnavailable, func(_ *testing.T, cfg *Config) {
			cfg.HTTPClient = &http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
				return nil, &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("socket", syscall.EMFILE)}
			}}}
		}, minute},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			for _, coalesce := range []bool{false, true} {
				cfg := Config{Timeout: time.Minute, CacheBytes: -1, ReportInterval: 10 * time.Second, Coalesce: coalesce, Log: slog.New(slog.DiscardHandler)}
				c.prepare(t, &cfg)
				client, err := New(cfg)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() {
					ctx, cancel := context.WithCancel(context.Background())
					cancel()
					_ = client.Close(ctx)
				})
				check := hitCheck
				check.FailOpen = "reads may go on"
				for i := range breakAfter + 3 {
					ctx, cancel := c.within(t.Context())
					r, err := client.Authorize(ctx, check)
					a := client.AuthorizeBatch(ctx, []Check{check})[0]
					cancel()
					for _, got := range []Answer{{r, err}, a} {
						switch {
						case c.opens && (got.Err != nil || !got.FailedOpen()):
							t.Errorf("coalesce %v, check %d: does not fail open: %v", coalesce, i, got.Err)
						case !c.opens && (got.Allowed() || !errors.Is(got.Err, c.kind)):
							t.Errorf("coalesce %v, check %d: allowed %v, %v, want %v", coalesce, i, got.Allowed(), got.Err, c.kind)
						}
					}
				}
				if c.within != nil && errors.Is(c.kind, context.DeadlineExceeded) {
					if p, _ := client.servers.pick(nil); p == nil {
						t.Error("callers without time opened the breaker")
					}
				}
			}
		})
	}
}

// An answer that is too large does not count as overload of the service.
func TestTooLargeAnswerDoesNotFailOpen(t *testing.T) {
	servers := foreign(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/proto")
		for part := make([]byte, 1<<20); ; {
			if _, err := w.Write(part); err != nil {
				return
			}
		}
	})
	c, err := New(Config{Servers: servers, CacheBytes: -1, Timeout: time.Minute, HTTPClient: patient(t, nil, "")})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close(t.Context()) }()
	open := hitCheck
	open.FailOpen = "reads may go on"
	if r, err := c.Authorize(t.Context(), open); connect.CodeOf(err) != connect.CodeResourceExhausted || r.Allowed() {
		t.Errorf("allowed %v, %v", r.Allowed(), err)
	}
}

// A mistake on the client's side is refused by New, or does not count as a service that
// is away.
func TestKeysThatCannotBeSent(t *testing.T) {
	c := both(func(context.Context) error { return nil }).serve(t, uncached)
	for text, want := range map[string]string{
		"key\n": "key", "\r\n key \t": "key", "\ufeffkey": "key", " \ufeff key": "key", "k~!": "k~!",
		"k\ney": "", "k ey": "", "k\x00ey": "", "k\x7fey": "", "kéy": "", " \n": "", "\ufeff": "", "k\ufeffey": "", "key\xa0": "",
	} {
		file := t.TempDir() + "/key"
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		for from, cfg := range map[string]Config{"Token": {Token: text}, "TokenFile": {TokenFile: file}, "$CEDARPOST_TOKEN": {}} {
			t.Setenv("CEDARPOST_TOKEN", "another")
			if from[0] == '$' {
				t.Setenv("CEDARPOST_TOKEN", strings.ReplaceAll(text, "\x00", "\x01")) // a variable cannot contain a zero byte
			}
			cfg.Servers, cfg.CacheBytes = c.cfg.Servers, -1
			client, err := New(cfg)
			if want == "" {
				if err == nil || strings.Contains(err.Error(), "ey") && from != "TokenFile" && strings.TrimSpace(text) != "" && strings.Contains(err.Error(), text) {
					t.Errorf("%s %q: %v", from, text, err)
				}
				continue
			}
			if err != nil {
				t.Errorf("%s %q: %v", from, text, err)
				continue
			}
			if r, err := client.Authorize(t.Context(), hitCheck); err != nil || !r.Allowed() || r.FailedOpen() {
				t.Errorf("%s %q: %v", from, text, err)
			}
			if client.cfg.Token != want && from != "TokenFile" {
				t.Errorf("%s %q: the key is %q", from, text, client.cfg.Token)
			}
			_ = client.Close(t.Context())
		}
	}
}

func FuzzAPIKey(f *testing.F) {
	for _, text := range []string{"key", " key\n", "\ufeffkey", "k\x00", "", "k\ney", "\xff"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		key, err := apiKey(text)
		if err != nil {
			if key != "" || len(text) > 40 && strings.Contains(err.Error(), text) {
				t.Errorf("%q: %q, %v", text, key, err)
			}
			return
		}
		req := httptest.NewRequest(http.MethodGet, "/", nil)
		req.Header.Set("Authorization", "Bearer "+key)
		if strings.ContainsFunc(key, func(r rune) bool { return r <= ' ' || r > '~' }) || key == "" || !strings.Contains(text, key) {
			t.Errorf("%q became %q", text, key)
		}
		if again, err := apiKey(key); err != nil || again != key {
			t.Errorf("%q became %q, %v", key, again, err)
		}
	})
}

// New refuses the unused parts of a server's URL, and an error does not repeat a
// password.
func TestServerURLs(t *testing.T) {
	for text, says := range map[string]string{
		"https://pdp.example:8080": "", "https://pdp.example/": "", "https://pdp.example/base/": "", " https://[::1]:8080 ": "",
		"http://LOCALHOST:8080": "", "http://localhost.:8080": "", "HTTP://LocalHost.": "", "http://[::1]": "", "http://127.8.9.1:1": "",
		"http://localhost..:8080":        "in the clear",
		"http://localhost.example:8080":  "in the clear",
		"https://u:s3cret@pdp.example":   "has a user or a password",
		"https://s3cret@pdp.example":     "has a user or a password",
		"https://u:s3cret@pdp.example:x": "is not a URL",
		"https://u:s3/cret@pdp.example":  "is not a URL",
		"https://u:s3,cret@pdp.example":  "has a user or a password",
		"http://u:s3cret@pdp.example":    "has a user or a password",
		"u:s3cret@pdp.example":           "is not a URL",
		"https://pdp.example?key=s3cret": "has a query or a fragment",
		"https://pdp.example/?":          "has a query or a fragment",
		"https://pdp.example/#s3cret":    "has a query or a fragment",
		"https://pdp.example/#":          "has a query or a fragment",
		"https://pdp.example:99999":      "has a port",
		"https://pdp.example:0":          "has a port",
		"https://pdp.example:":           "is not a URL",
		"https://pdp.example:-1":         "is not a URL",
		"https://:8080":                  "is not a URL",
		"https://":                       "is not a URL",
		"https:pdp.example":              "is not a URL",
		"https://pdp.example:80\x00":     "is not a URL",
		"https://pdp example":            "is not a URL",
		"localhost:8080":                 "is not a URL",
		"ftp://localhost":                "is not a URL",
	} {
		for _, cfg := range []Config{{Servers: []string{text}}, {Servers: []string{"https://other.example", text}}} {
			cfg.CacheBytes = -1
			c, err := New(cfg)
			if err == nil {
				_ = c.Close(t.Context())
			}
			switch {
			case says == "" && err != nil, says != "" && (err == nil || !strings.Contains(err.Error(), says)):
				t.Errorf("%q: %v", text, err)
			case err != nil && strings.Contains(err.Error(), "cret"):
				t.Errorf("%q: the error repeats a secret: %v", text, err)
			}
		}
	}
	t.Setenv("CEDARPOST_API_URL", "https://u:s3,cret@pdp.example")
	if _, err := New(Config{}); err == nil || strings.Contains(err.Error(), "s3") || strings.Contains(err.Error(), "cret") {
		t.Errorf("a password with a comma: %v", err)
	}
}

// A server whose certificate is not accepted is not asked, and the others are. While it
// is not accepted, no check fails open, not even for callers with very short deadlines.
func TestUntrustedServerNeverFailsOpen(t *testing.T) {
	var away atomic.Bool
	good := both(func(context.Context) error {
		if away.Load() {
			return connect.NewError(connect.CodeUnavailable, "away")
		}
		return nil
	}).serve(t, uncached)
	c, err := New(Config{
		Servers: []string{secure(t, func(*tls.Config) {}).URL, good.cfg.Servers[0]}, CacheBytes: -1, Timeout: time.Minute,
		HTTPClient: patient(t, nil, ""), Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close(t.Context()) }()
	open := hitCheck
	open.FailOpen = "reads may go on"
	for range 3 * breakAfter {
		if r, err := c.Authorize(t.Context(), open); err != nil || r.FailedOpen() {
			t.Fatalf("the other server: %v", err)
		}
	}
	away.Store(true)
	for range 3 * breakAfter {
		hurried, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		_, _ = c.Authorize(hurried, open)
		cancel()
		if r, err := c.Authorize(t.Context(), open); !errors.Is(err, ErrUnavailable) || r.Allowed() {
			t.Fatalf("allowed %v, %v", r.Allowed(), err)
		}
	}
}

// canceled is a context that has ended.
func canceled() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// While no server is asked, the error says how each one failed.
func TestErrorOfAnOpenBreakerHasTheCause(t *testing.T) {
	c, err := New(Config{
		Servers: []string{secure(t, func(*tls.Config) {}).URL, "http://127.0.0.1:1"}, CacheBytes: -1, Timeout: time.Minute,
		HTTPClient: patient(t, nil, ""), Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.Close(canceled()) }()
	for deadline := time.Now().Add(time.Minute); ; {
		_, err := c.Authorize(t.Context(), hitCheck)
		if err == nil || time.Now().After(deadline) {
			t.Fatal(err)
		}
		if !strings.Contains(err.Error(), "not asked again yet") {
			continue
		}
		for _, want := range []string{c.cfg.Servers[0] + ": ", "certificate", "http://127.0.0.1:1: ", "connection refused"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("does not say %q: %v", want, err)
			}
		}
		return
	}
}
