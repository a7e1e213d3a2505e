package egress_test

import (
	"bytes"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/sdk/go/egress"
)

type person struct {
	Name    string   `json:"name"`
	Friends []person `json:"friends"`
}

// answers serves the body, content type and status of a query.
func answers(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	w.Header().Set("Content-Type", q.Get("type"))
	if q.Get("status") == "404" {
		w.WriteHeader(http.StatusNotFound)
	}
	if encoding := q.Get("encoding"); encoding != "" {
		w.Header().Set("Content-Encoding", encoding)
	}
	_, _ = io.WriteString(w, q.Get("body"))
}

// An answer is decoded if it is JSON of the declared shape. Each other one is refused by its rule,
// and the error has nothing of the values.
func TestGetJSON(t *testing.T) {
	s := startTarget(t, answers)
	address := "127.0.0.1:" + s.port
	client := newClient(t, egress.Config{OperatorHosts: []string{address}, CAFile: s.caFile})
	for _, c := range []struct {
		body, contentType, more string
		limits                  egress.JSONLimits
		rule                    egress.Rule // empty: decoded
	}{
		{`{"name":"ann"}`, "application/json", "", egress.JSONLimits{}, ""},
		{`{"name":"ann"}`, "application/json; charset=utf-8", "", egress.JSONLimits{}, ""},
		{`{"name":"ann"}`, "application/jwk-set+json", "", egress.JSONLimits{}, ""},
		{`{"name":"ann","more":1}`, "application/json", "", egress.JSONLimits{}, ""},
		{`{"name":"ann"}`, "text/json", "", egress.JSONLimits{ContentTypes: []string{"text/json"}}, ""},
		{`{"name":"ann"}`, "application/json", "", egress.JSONLimits{ContentTypes: []string{"text/json"}}, egress.RuleContentType},
		{`{"name":"ann"}`, "text/html", "", egress.JSONLimits{}, egress.RuleContentType},
		{`{"name":"ann"}`, "", "", egress.JSONLimits{}, egress.RuleContentType},
		{`{"name":"ann"}`, "application/json", "&encoding=gzip", egress.JSONLimits{}, egress.RuleContentType},
		{`{"name":"ann"}`, "application/json", "&status=404", egress.JSONLimits{}, egress.RuleStatus},
		{`{"name":"ann","more":1}`, "application/json", "", egress.JSONLimits{Strict: true}, egress.RuleShape},
		{`{"name":"ann","name":"secret"}`, "application/json", "", egress.JSONLimits{}, egress.RuleShape},
		{`{"name":7}`, "application/json", "", egress.JSONLimits{}, egress.RuleShape},
		{`{"name":"secret"} {}`, "application/json", "", egress.JSONLimits{}, egress.RuleShape},
		{`{"name":"secret"`, "application/json", "", egress.JSONLimits{}, egress.RuleShape},
		{"{\"name\":\"secret\xff\"}", "application/json", "", egress.JSONLimits{}, egress.RuleShape},
		{``, "application/json", "", egress.JSONLimits{}, egress.RuleShape},
		{`{"friends":[{"friends":[{}]}]}`, "application/json", "", egress.JSONLimits{MaxDepth: 5}, ""},
		{`{"friends":[{"friends":[{}]}]}`, "application/json", "", egress.JSONLimits{MaxDepth: 4}, egress.RuleDepth},
	} {
		u := "https://" + address + "/?body=" + url.QueryEscape(c.body) + "&type=" + url.QueryEscape(c.contentType) + c.more
		_, err := egress.GetJSON[person](t.Context(), client, u, c.limits)
		if c.rule == "" {
			if err != nil {
				t.Errorf("%s: %v", c.body, err)
			}
			continue
		}
		wantRule(t, err, c.rule)
		if strings.Contains(err.Error(), "secret") {
			t.Errorf("the error has a value: %v", err)
		}
	}
}

// JSON that is nested deep is refused before it is decoded.
func TestAttackDeepJSON(t *testing.T) {
	s := startTarget(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, strings.Repeat(r.URL.Query().Get("open"), 100_000))
	})
	address := "127.0.0.1:" + s.port
	client := newClient(t, egress.Config{OperatorHosts: []string{address}, CAFile: s.caFile})
	for _, open := range []string{"[", `{"friends":[`} {
		_, err := egress.GetJSON[any](t.Context(), client, "https://"+address+"/?open="+url.QueryEscape(open), egress.JSONLimits{MaxBytes: 10 << 20})
		if strings.HasPrefix(open, "{") { // more than the client's own MaxBytes
			wantRule(t, err, egress.RuleSize)
			continue
		}
		wantRule(t, err, egress.RuleDepth)
	}
	t.Logf("attack: an answer of JSON that is nested 100,000 deep: refused at depth 17")
}

// An IPv6 address that holds an IPv4 address is refused in each form if the IPv4 address is not public.
func TestHiddenAddressesAreNotPublic(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		v4 := rapid.SampledFrom([]string{"127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16", "100.64.0.0/10"}).Draw(rt, "net")
		p := netip.MustParsePrefix(v4)
		b := p.Addr().As4()
		host := rapid.Uint32().Draw(rt, "host")
		for i := range b {
			mask := byte(0xff)
			if bits := p.Bits() - 8*i; bits > 0 {
				mask = byte(0xff >> min(bits, 8))
			}
			b[i] |= byte(host>>(24-8*i)) & mask
		}
		var forms [][16]byte
		form := func(at int, prefix ...byte) {
			var a [16]byte
			copy(a[:], prefix)
			copy(a[at:], b[:])
			forms = append(forms, a)
		}
		form(12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff) // IPv4-mapped
		form(12)                                           // IPv4-compatible
		form(12, 0, 0x64, 0xff, 0x9b)                      // NAT64
		form(12, 0, 0x64, 0xff, 0x9b, 0, 1)                // NAT64, local prefix
		form(2, 0x20, 0x02)                                // 6to4
		form(4, 0x20, 0x01, 0, 0)                          // Teredo server
		for _, f := range append(forms, netip.AddrFrom4(b).As16()) {
			if addr := netip.AddrFrom16(f); egress.PublicAddress(addr) {
				rt.Errorf("%s, for %s, counts as public", addr, netip.AddrFrom4(b))
			}
		}
	})
}

// A request passes only for the configured host and port, for any text of its URL.
func FuzzRequest(f *testing.F) {
	for _, u := range []string{
		"https://example.com", "https://example.com:443/", "https://example.com@evil.test", "https://evil.test#@example.com", "https://example.com\\@evil.test",
		"https://EXAMPLE.COM.", "https://example.com..", "//example.com", "https:///example.com", "https://[::1]", "http://example.com:443",
	} {
		f.Add(u)
	}
	client, err := egress.New(egress.Config{Hosts: []string{"example.com"}})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, text string) {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, text, http.NoBody)
		if err != nil || egress.CheckRequest(client, r) != nil {
			return
		}
		u := r.URL
		if host := strings.TrimSuffix(strings.ToLower(u.Hostname()), "."); u.Scheme != "https" || host != "example.com" || u.Port() != "" && u.Port() != "443" || u.User != nil {
			t.Errorf("%q passes", text)
		}
	})
}

// Any answer is decoded, or refused by a rule.
func FuzzDecodeJSON(f *testing.F) {
	for _, body := range []string{`{}`, `{"name":"a"}`, `[[[[`, `{"friends":[{}]}`, "\xff", `{"name":1}`, `1 2`} {
		f.Add([]byte(body))
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		response := &http.Response{StatusCode: http.StatusOK, Header: http.Header{"Content-Type": {"application/json"}},
			Body: io.NopCloser(bytes.NewReader(body)), Request: &http.Request{URL: &url.URL{Host: "example.com"}}}
		var p person
		err := egress.DecodeJSON(response, &p, egress.JSONLimits{MaxBytes: 1000, MaxDepth: 5})
		if err == nil && (len(body) > 1000 || len(p.Friends) > 0 && len(p.Friends[0].Friends) > 0 && len(p.Friends[0].Friends[0].Friends) > 0) {
			t.Errorf("%q is within the limits", body)
		}
		if err != nil {
			refusedBy(t, err)
		}
	})
}

func refusedBy(t *testing.T, err error) {
	t.Helper()
	if !strings.Contains(err.Error(), "refused by the rule") {
		t.Errorf("%v", err)
	}
}
