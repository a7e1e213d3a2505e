package cedarposthttp_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"net/textproto"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/cedarposthttp"
	"github.com/cedarpost/cedarpost/sdk/go/enforce"
)

const whole = `{"id":"42","status":"open","items":[{"sku":"a"}],"total":4999,` +
	`"customer":{"name":"Bob","email":"bob@example.com"},"shipping":{"address":"1 Road"},"internal":{"margin":7,"notes":"likes tea"},"supplier":"ACME"}`

var filtered = cedarposthttp.Route{Action: action("ViewOrder"), Resource: `Shop::Order::"{id}"`, Filter: true}

func (w *world) filters(h http.HandlerFunc) { w.mux.Handle("GET /orders/{id}", filtered, h) }

func TestFilterKeepsWhatIsPermitted(t *testing.T) {
	w := newWorld(t)
	w.filters(func(rw http.ResponseWriter, _ *http.Request) {
		h := rw.Header()
		h.Set("Content-Type", "application/json; charset=utf-8")
		h.Set("Content-Length", fmt.Sprint(len(whole)))
		h.Set("ETag", `"all-of-it"`)
		h.Set("Accept-Ranges", "bytes")
		h.Set("X-Kept", "yes")
		rw.WriteHeader(http.StatusAccepted)
		h.Set("X-Late", "too late")
		_, _ = io.WriteString(rw, whole[:30])
		_, _ = io.WriteString(rw, whole[30:])
	})
	for _, c := range []struct{ who, want string }{
		{"bob", `{"id":"42","status":"open","items":[{"sku":"a"}],"total":4999,"customer":{"name":"Bob","email":"bob@example.com"},"shipping":{"address":"1 Road"}}`},
		{"alice", `{"id":"42","status":"open","items":[{"sku":"a"}]}`},
		{"alice+mfa", `{"id":"42","status":"open","items":[{"sku":"a"}],"customer":{"name":"Bob","email":"bob@example.com"},"shipping":{"address":"1 Road"}}`},
		{"erin", `{"id":"42","status":"open","items":[{"sku":"a"}],"total":4999,"internal":{"margin":7}}`},
	} {
		a := w.as(c.who, "GET", "/orders/42", "")
		if a.status != http.StatusAccepted || a.body != c.want {
			t.Errorf("%s sees %d %s", c.who, a.status, a.body)
		}
		for name, want := range map[string]string{
			"Content-Type": "application/json; charset=utf-8", "X-Kept": "yes", "Cache-Control": "private",
			"Content-Length": "", "Etag": "", "Accept-Ranges": "", "X-Late": "",
		} {
			if got := a.Header.Get(name); got != want {
				t.Errorf("%s: %s is %q", c.who, name, got)
			}
		}
		head := w.as(c.who, "HEAD", "/orders/42", "")
		if head.status != http.StatusAccepted || head.body != "" || head.Header.Get("Content-Length") != "" || head.Header.Get("Etag") != "" {
			t.Errorf("%s by HEAD: %d %q %v", c.who, head.status, head.body, head.Header)
		}
	}
	if s := w.guard.Stats(); s.FieldsUnknown != 4 || s.FieldsDenied == 0 || strings.Count(w.log.String(), "supplier") != 1 {
		t.Errorf("what was left out: %+v\n%s", s, &w.log)
	}
}

func TestFilterAnswersThatPass(t *testing.T) {
	for name, c := range map[string]struct {
		handler http.HandlerFunc
		status  int
		body    string
	}{
		"the handler's own error": {func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no tea", http.StatusTeapot) }, 418, "no tea\n"},
		"a redirect":              {func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/x", http.StatusSeeOther) }, 303, "<a href=\"/x\">See Other</a>.\n\n"},
		"nothing":                 {func(http.ResponseWriter, *http.Request) {}, 200, ""},
		"no content":              {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }, 204, ""},
		"a list": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/vnd.shop+json")
			_, _ = io.WriteString(w, `[{"id":"42","internal":{"notes":"x"}}, {"total":1}]`)
		}, 200, `[{"id":"42"},{"total":1}]`},
	} {
		w := newWorld(t)
		w.filters(c.handler)
		if a := w.as("bob", "GET", "/orders/42", ""); a.status != c.status || a.body != c.body {
			t.Errorf("%s: %d %q", name, a.status, a.body)
		}
	}
}

// An answer that cannot be filtered is not sent.
func TestFilterFailsClosed(t *testing.T) {
	says := func(contentType, body string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			if contentType != "" {
				w.Header().Set("Content-Type", contentType)
			}
			_, _ = io.WriteString(w, body)
		}
	}
	for name, h := range map[string]http.HandlerFunc{
		"no type":            says("", whole),
		"text":               says("text/plain", whole),
		"lines of JSON":      says("application/x-ndjson", whole),
		"events":             says("text/event-stream", "data: "+whole+"\n\n"),
		"not JSON":           says("application/json", "internal notes: likes tea"),
		"half JSON":          says("application/json", whole[:len(whole)-1]),
		"two documents":      says("application/json", whole+whole),
		"a plain value":      says("application/json", `"likes tea"`),
		"JSON with a suffix": says("application/json", whole+"likes tea"),
		"two types": func(w http.ResponseWriter, r *http.Request) {
			w.Header()["Content-Type"] = []string{"application/json", "text/plain"}
			says("", whole)(w, r)
		},
		"compressed": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			says("application/json", whole)(w, r)
		},
		"a part": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusPartialContent)
			says("application/json", whole)(w, r)
		},
		"no status": func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(0)
			says("application/json", whole)(w, r)
		},
		"no status, then one": func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(0)
			http.Error(w, whole, http.StatusNotFound)
		},
		"a file with ranges": func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("X-Secret", "likes tea")
			says("application/octet-stream", whole)(w, r)
		},
	} {
		w := newWorld(t)
		w.filters(h)
		a := w.as("bob", "GET", "/orders/42", "")
		if a.status != 500 || strings.Contains(a.body, "tea") || strings.Contains(fmt.Sprint(a.Header), "tea") || a.problem == nil {
			t.Errorf("%s: %d %s %v", name, a.status, a.body, a.Header)
		}
		if w.guard.Stats().Faults != 1 || !strings.Contains(w.log.String(), "cannot be filtered") {
			t.Errorf("%s is not counted or logged", name)
		}
	}
}

func TestFilterGoesAround(t *testing.T) {
	w := newWorld(t)
	w.filters(func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Link", "</style.css>; rel=preload")
		rw.WriteHeader(http.StatusEarlyHints)
		rw.Header().Set("Content-Type", "application/json")
		if _, _, err := http.NewResponseController(rw).Hijack(); err == nil {
			t.Error("the connection can be taken over")
		}
		if err := http.NewResponseController(rw).Flush(); err == nil {
			t.Error("what is not filtered yet can be flushed")
		}
		if _, ok := rw.(interface{ Unwrap() http.ResponseWriter }); ok {
			t.Error("the writer behind the filter can be had")
		}
		if _, ok := rw.(io.ReaderFrom); ok {
			t.Error("a copy goes around the filter")
		}
		if _, err := io.Copy(rw, strings.NewReader(whole)); err != nil {
			t.Error(err)
		}
	})
	server := httptest.NewServer(signedIn(w.mux))
	defer server.Close()
	a := get(t, server.URL+"/orders/42", "alice")
	if a.body != `{"id":"42","status":"open","items":[{"sku":"a"}]}` {
		t.Errorf("%s", a.body)
	}

	hinted := newWorld(t)
	hinted.filters(func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("X-Secret", "likes tea")
		rw.WriteHeader(http.StatusEarlyHints)
		_, _ = io.WriteString(rw, "no type")
	})
	hints := httptest.NewServer(signedIn(hinted.mux))
	defer hints.Close()
	if a := get(t, hints.URL+"/orders/42", "bob"); a.status != 500 || a.Header.Get("X-Secret") != "" {
		t.Errorf("after an early hint: %d %v", a.status, a.Header)
	}

	switches := newWorld(t)
	switches.filters(func(rw http.ResponseWriter, _ *http.Request) { rw.WriteHeader(http.StatusSwitchingProtocols) })
	if a := switches.as("bob", "GET", "/orders/42", ""); a.status != 500 {
		t.Errorf("another protocol: %d", a.status)
	}
}

func get(t *testing.T, url, who string) answer {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("X-User", who)
	res, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		body = append(body, "!"+err.Error()...)
	}
	return answer{Response: res, status: res.StatusCode, body: string(body)}
}

// A large answer streams. An answer that breaks in the middle is cut off.
func TestFilterStreams(t *testing.T) {
	w := newWorld(t)
	const n = 5000
	row := `{"id":"x","total":1,"internal":{"notes":"likes tea"}}`
	rows := func(rw http.ResponseWriter, n int) {
		rw.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(rw, "[")
		for i := range n {
			if i > 0 {
				_, _ = io.WriteString(rw, ",")
			}
			if _, err := io.WriteString(rw, row); err != nil {
				return
			}
		}
	}
	var failed error
	w.filters(func(rw http.ResponseWriter, _ *http.Request) {
		rows(rw, n)
		_, _ = io.WriteString(rw, "]")
	})
	w.mux.Handle("GET /broken/{id}", filtered, http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		rows(rw, n)
		_, _ = io.WriteString(rw, "oh no")
		_, failed = rw.Write(make([]byte, 1<<20))
	}))
	w.mux.Handle("GET /panics/{id}", filtered, http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		rows(rw, n)
		panic(http.ErrAbortHandler)
	}))
	w.mux.Handle("GET /early/{id}", filtered, http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
		rows(rw, 1)
		panic(http.ErrAbortHandler)
	}))
	server := httptest.NewServer(signedIn(w.mux))
	defer server.Close()

	a := get(t, server.URL+"/orders/42", "bob")
	var list []map[string]any
	if err := json.Unmarshal([]byte(a.body), &list); err != nil || len(list) != n || strings.Contains(a.body, "tea") {
		t.Errorf("%d rows, %v", len(list), err)
	}
	for _, path := range []string{"/broken/42", "/panics/42"} {
		a := get(t, server.URL+path, "bob")
		if a.status != 200 || !strings.Contains(a.body, "!unexpected EOF") || strings.Contains(a.body, "tea") {
			t.Errorf("%s: %d, ends in %s", path, a.status, a.body[max(0, len(a.body)-60):])
		}
	}
	if failed == nil {
		t.Error("the handler writes on, and is not told that nobody listens")
	}
	r, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, server.URL+"/early/42", http.NoBody)
	r.Header.Set("X-User", "bob")
	if res, err := http.DefaultClient.Do(r); err == nil {
		res.Body.Close()
		t.Errorf("a handler that panics early: %d", res.StatusCode)
	}
}

// The copy that a client has may have fields that the user may no longer see, or may
// lack fields that the user now may see.
func TestFilterIsUnconditional(t *testing.T) {
	w := newWorld(t)
	w.filters(func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("Content-Type", "application/json")
		rw.Header().Set("ETag", `"v1"`)
		http.ServeContent(rw, r, "", time.Unix(1e9, 0), strings.NewReader(whole))
	})
	for name, value := range map[string]string{
		"If-Match": `"guess"`, "If-Unmodified-Since": "Sat, 01 Jan 2000 00:00:00 GMT",
		"If-None-Match": `"v1"`, "If-Modified-Since": "Sun, 09 Sep 2001 01:46:40 GMT", "Range": "bytes=0-10",
	} {
		if a := w.as("alice", "GET", "/orders/42", "", name, value); a.status != 200 || a.body != `{"id":"42","status":"open","items":[{"sku":"a"}]}` {
			t.Errorf("%s: %d %s", name, a.status, a.body)
		}
	}
}

// A header that depends on the whole answer would reveal something of the removed
// fields.
func TestFilterRemovesWhatTellsOfTheWhole(t *testing.T) {
	w := newWorld(t)
	w.filters(func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Content-Type", "application/json")
		rw.Header()["ETag"] = []string{`"v1"`} // spelled so that Header.Del does not find it
		rw.Header().Set("Content-MD5", "x")
		rw.Header().Set("Last-Modified", "Sun, 09 Sep 2001 01:46:40 GMT")
		rw.Header().Set("X-Other", "stays")
		_, _ = io.WriteString(rw, whole)
	})
	a := w.as("alice", "GET", "/orders/42", "")
	for name := range a.Header {
		if name != "Content-Type" && name != "Cache-Control" && name != "X-Other" {
			t.Errorf("the answer has %s", name)
		}
	}
}

// Nothing that depends on the whole answer is sent in another way: in an informational
// answer, as a trailer, or with a status without a body.
func TestNothingTellsOfTheWhole(t *testing.T) {
	tell := func(h http.Header, prefix string) {
		for _, name := range []string{
			"Content-MD5", "Digest", "Content-Digest", "Repr-Digest", "Unencoded-Digest", "Accept-Ranges", "Delta-Base", "Signature", "Signature-Input",
		} {
			h.Set(prefix+name, "secret")
		}
		h.Set(prefix+"Last-Modified", "Sun, 09 Sep 2001 01:46:40 GMT")
		h.Set(prefix+"Content-Range", "bytes */1234")
		h.Set(prefix+"X-Other", "stays")
		h[prefix+"ETag"] = []string{`"secret"`} // spelled so that Header.Del does not find it
	}
	type exit struct {
		name string
		by   http.HandlerFunc
	}
	exits := []exit{
		{"an early hint", func(w http.ResponseWriter, _ *http.Request) {
			tell(w.Header(), "")
			w.WriteHeader(http.StatusEarlyHints)
			w.WriteHeader(http.StatusProcessing)
			_, _ = io.WriteString(w, whole)
		}},
		{"trailers", func(w http.ResponseWriter, _ *http.Request) {
			tell(w.Header(), http.TrailerPrefix)
			_, _ = io.WriteString(w, whole)
			tell(w.Header(), http.TrailerPrefix)
		}},
		{"declared trailers", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Trailer", "ETag, Repr-Digest, X-Other")
			tell(w.Header(), "")
			_, _ = io.WriteString(w, whole)
			tell(w.Header(), "")
		}},
	}
	for _, status := range []int{204, 304, 403, 404, 412, 416, 500} {
		exits = append(exits, exit{fmt.Sprint("status ", status), func(w http.ResponseWriter, _ *http.Request) {
			if status == http.StatusNotModified {
				w.Header().Set("Content-Length", fmt.Sprint(len(whole)))
			}
			tell(w.Header(), "")
			tell(w.Header(), http.TrailerPrefix)
			w.WriteHeader(status)
		}})
	}
	w := newWorld(t)
	var now exit
	w.filters(func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("Content-Type", "application/json")
		now.by(rw, r)
	})
	for _, version := range []int{1, 2} {
		server := httptest.NewUnstartedServer(signedIn(w.mux))
		server.EnableHTTP2 = version == 2
		server.StartTLS()
		t.Cleanup(server.Close)
		for _, now = range exits {
			for _, method := range []string{"GET", "HEAD"} {
				res, headers := overTheWire(t, server, method) //nolint:bodyclose // it is closed there
				if res.ProtoMajor != version || now.name == "an early hint" && len(headers) != 2 {
					t.Errorf("HTTP/%d, %d informational answers", res.ProtoMajor, len(headers))
				}
				if len(res.Trailer) > 0 {
					t.Errorf("%s: trailers %v", now.name, res.Trailer)
				}
				for _, h := range append(headers, res.Header) {
					for name, value := range h {
						filtered := name == "Content-Length" && value[0] != fmt.Sprint(len(whole))
						if !filtered && !slices.Contains([]string{"Content-Type", "Cache-Control", "X-Other", "Date"}, name) {
							t.Errorf("%s, HTTP/%d %s: there is %s: %s", now.name, version, method, name, value)
						}
					}
				}
			}
		}
	}
}

// overTheWire asks as alice over the network, and returns the headers of informational
// answers too.
func overTheWire(t *testing.T, server *httptest.Server, method string) (res *http.Response, informational []http.Header) {
	t.Helper()
	ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{Got1xxResponse: func(_ int, h textproto.MIMEHeader) error {
		informational = append(informational, http.Header(h))
		return nil
	}})
	r, err := http.NewRequestWithContext(ctx, method, server.URL+"/orders/42", http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("X-User", "alice")
	if res, err = server.Client().Do(r); err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		t.Fatal(err)
	}
	return res, informational
}

// slow is a writer for a slow client. Like a server, it must not be used after the
// handler has returned.
type slow struct {
	*httptest.ResponseRecorder
	begun chan struct{}
	once  sync.Once
	// now counts the writes under way.
	now atomic.Int64
}

func (s *slow) Write(p []byte) (int, error) {
	s.now.Add(1)
	defer s.now.Add(-1)
	s.once.Do(func() { close(s.begun) })
	time.Sleep(50 * time.Millisecond)
	return len(p), nil
}

// A panic in a handler ends its filter.
func TestFilterEndsWithItsHandler(t *testing.T) {
	w := newWorld(t)
	to := &slow{ResponseRecorder: httptest.NewRecorder(), begun: make(chan struct{})}
	w.filters(func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Content-Type", "application/json")
		rw.WriteHeader(http.StatusOK)
		go func() {
			_, _ = io.WriteString(rw, "["+strings.Repeat(`{"id":"x"},`, 5000))
		}()
		<-to.begun
		panic(http.ErrAbortHandler)
	})
	r := httptest.NewRequest(http.MethodGet, "/orders/42", http.NoBody)
	r.Header.Set("X-User", "bob")
	func() {
		defer func() { _ = recover() }()
		signedIn(w.mux).ServeHTTP(to, r)
	}()
	if to.now.Load() > 0 {
		t.Error("the filter writes after the request is over")
	}
}

// panicking is the writer of a middleware with a bug.
type panicking struct{ *httptest.ResponseRecorder }

func (panicking) Write([]byte) (int, error) { panic("a mistake in a middleware") }

// A panic while the filter writes ends the answer, and not the program.
func TestFilterSurvivesItsWriter(t *testing.T) {
	w := newWorld(t)
	w.filters(func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(rw, whole)
	})
	r := httptest.NewRequest(http.MethodGet, "/orders/42", http.NoBody)
	r.Header.Set("X-User", "bob")
	defer func() {
		if got := recover(); !errors.Is(got.(error), http.ErrAbortHandler) {
			t.Errorf("it ends with %v", got)
		}
		if n := w.guard.Stats().Faults; n != 1 {
			t.Errorf("%d faults are counted", n)
		}
	}()
	signedIn(w.mux).ServeHTTP(panicking{httptest.NewRecorder()}, r)
}

func TestFilterOfWhatFailedOpen(t *testing.T) {
	w := newWorld(t)
	open := filtered
	open.FailOpen = "the shop must go on"
	w.mux.HandleFunc("GET /orders/{id}", open, func(rw http.ResponseWriter, _ *http.Request) {
		rw.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(rw, whole)
	})
	w.svc.Away(true)
	if a := w.as("bob", "GET", "/orders/42", ""); a.status != 200 || a.body != "{}" {
		t.Errorf("%d %s", a.status, a.body)
	}
}

func TestNewGuard(t *testing.T) {
	good := enforce.Config{Client: &cedarpost.Client{}, Principal: principal}
	for want, change := range map[string]func(*enforce.Config){
		"needs a Client":                     func(c *enforce.Config) { c.Client = nil },
		"either Principal or PrincipalToken": func(c *enforce.Config) { c.Principal = nil },
		"nothing meets": func(c *enforce.Config) {
			c.Obligations = map[string]func(context.Context, cedarpost.Result) error{"x": nil}
		},
		"asks for nothing": func(c *enforce.Config) { c.StepUp = map[string]enforce.Challenge{"x": {}} },
		"cannot be an ACR": func(c *enforce.Config) {
			c.StepUp = map[string]enforce.Challenge{"x": {ACRValues: []string{`a", x="`}}}
		},
		"of seconds": func(c *enforce.Config) { c.StepUp = map[string]enforce.Challenge{"x": {MaxAge: 1}} },
		"negative":   func(c *enforce.Config) { c.RetryAfter = -1 },
	} {
		cfg := good
		change(&cfg)
		if _, err := enforce.New(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", want, err)
		}
	}
	if _, err := cedarposthttp.Handler(nil, "GET /", filtered, http.NotFoundHandler()); err == nil || errors.Is(err, enforce.ErrNoPrincipal) {
		t.Errorf("without a guard: %v", err)
	}
}
