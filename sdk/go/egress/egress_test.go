package egress_test

import (
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/cedarpost/cedarpost/sdk/go/egress"
)

// names is a DNS server on this machine. Each look-up of a name takes the next of its answers,
// and keeps the last one.
type names struct {
	mu      sync.Mutex
	answers map[string][][]string // name → answers, each a list of addresses
	addr    string
}

func startNames(t *testing.T, answers map[string][][]string) *names {
	t.Helper()
	conn, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	n := &names{answers: answers, addr: conn.LocalAddr().String()}
	server := &dns.Server{PacketConn: conn, Handler: dns.HandlerFunc(n.answer)}
	ended := make(chan struct{})
	started := make(chan struct{})
	server.NotifyStartedFunc = func() { close(started) }
	go func() {
		defer close(ended)
		if err := server.ActivateAndServe(); err != nil {
			t.Error(err)
		}
	}()
	<-started
	t.Cleanup(func() {
		_ = server.Shutdown()
		<-ended
	})
	return n
}

func (n *names) answer(w dns.ResponseWriter, q *dns.Msg) {
	m := new(dns.Msg)
	m.SetReply(q)
	name := strings.ToLower(strings.TrimSuffix(q.Question[0].Name, "."))
	n.mu.Lock()
	answers := n.answers[name]
	// A look-up asks for A and for AAAA. The question for A takes the answer.
	if kind := q.Question[0].Qtype; len(answers) > 1 && kind == dns.TypeA {
		n.answers[name] = answers[1:]
	}
	n.mu.Unlock()
	if len(answers) == 0 {
		m.Rcode = dns.RcodeNameError
	} else {
		for _, a := range answers[0] {
			ip := net.ParseIP(a)
			header := dns.RR_Header{Name: q.Question[0].Name, Class: dns.ClassINET, Ttl: 0, Rrtype: q.Question[0].Qtype}
			switch isV6 := strings.Contains(a, ":"); {
			case isV6 && header.Rrtype == dns.TypeAAAA:
				m.Answer = append(m.Answer, &dns.AAAA{Hdr: header, AAAA: ip})
			case !isV6 && header.Rrtype == dns.TypeA:
				m.Answer = append(m.Answer, &dns.A{Hdr: header, A: ip})
			}
		}
	}
	_ = w.WriteMsg(m)
}

func (n *names) resolver() *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "udp", n.addr)
	}}
}

// A target is a server on this machine with a certificate for example.com.
type target struct {
	*httptest.Server
	port   string
	caFile string
	calls  atomic.Int64
}

func startTarget(t *testing.T, handler http.HandlerFunc) *target {
	t.Helper()
	s := &target{}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.calls.Add(1)
		handler(w, r)
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(func() { s.CloseClientConnections(); s.Close() })
	u, err := url.Parse(s.URL)
	if err != nil {
		t.Fatal(err)
	}
	s.port = u.Port()
	s.caFile = filepath.Join(t.TempDir(), "ca.pem")
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})
	if err := os.WriteFile(s.caFile, text, 0o600); err != nil {
		t.Fatal(err)
	}
	return s
}

func hello(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	_, _ = io.WriteString(w, `{"hello":"world"}`)
}

func newClient(t *testing.T, c egress.Config) *egress.Client {
	t.Helper()
	client, err := egress.New(c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	return client
}

// get returns the body, or the error of the call or of its body.
func get(t *testing.T, c *egress.Client, url string) (string, error) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	response, err := c.Do(r)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return string(body), err
}

func wantRule(t *testing.T, err error, rule egress.Rule) {
	t.Helper()
	refused, ok := errors.AsType[*egress.RefusedError](err)
	if !ok || refused.Rule != rule || !strings.Contains(err.Error(), string(rule)) {
		t.Errorf("%v, want a refusal by the rule %q", err, rule)
	}
}

// A host of the configuration is called by its name, over TLS with the authority of the CA file.
// Another host, another port or http is refused before anything is sent.
func TestOnlyConfiguredHosts(t *testing.T) {
	s := startTarget(t, hello)
	n := startNames(t, map[string][][]string{"example.com": {{"127.0.0.1"}}, "other.example": {{"127.0.0.1"}}})
	host := "example.com:" + s.port
	client := newClient(t, egress.Config{OperatorHosts: []string{host}, CAFile: s.caFile, Resolver: n.resolver()})
	for _, name := range []string{"example.com", "EXAMPLE.com", "example.com."} {
		if body, err := get(t, client, "https://"+name+":"+s.port+"/"); err != nil || body != `{"hello":"world"}` {
			t.Errorf("%s: %q, %v", name, body, err)
		}
	}
	calls := s.calls.Load()
	for u, rule := range map[string]egress.Rule{
		"https://other.example:" + s.port: egress.RuleHost,
		"https://127.0.0.1:" + s.port:     egress.RuleHost,
		"https://example.com":             egress.RuleHost,
		"https://example.com:1":           egress.RuleHost,
		"https://example.com.evil.test":   egress.RuleHost,
		"https://user:pa55@" + host:       egress.RuleURL,
		"ftp://" + host:                   egress.RuleURL,
		"file:///etc/passwd":              egress.RuleURL,
		"https:example.com":               egress.RuleURL,
		"https://0x7f.1":                  egress.RuleHost,
		"https://[fe80::1%25eth0]":        egress.RuleHost,
	} {
		_, err := get(t, client, u)
		wantRule(t, err, rule)
		if strings.Contains(err.Error(), "pa55") {
			t.Errorf("the error has the password: %v", err)
		}
	}
	r, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+host, http.NoBody)
	r.Host = "other.example"
	_, err := client.Do(r) //nolint:bodyclose // a refused call has no body
	wantRule(t, err, egress.RuleURL)
	if n := s.calls.Load() - calls; n > 0 {
		t.Errorf("%d refused calls reached the server", n)
	}

	untrusting := newClient(t, egress.Config{OperatorHosts: []string{host}, Resolver: n.resolver()})
	if _, err := get(t, untrusting, "https://"+host+"/secret?key=word"); err == nil || !strings.Contains(err.Error(), "certificate") ||
		strings.Contains(err.Error(), "word") || strings.Contains(err.Error(), "secret") {
		t.Errorf("without its authority: %v", err)
	}
	public := newClient(t, egress.Config{Hosts: []string{host}, CAFile: s.caFile, Resolver: n.resolver()})
	_, err = get(t, public, "https://"+host)
	wantRule(t, err, egress.RuleAddress)
	_, err = get(t, newClient(t, egress.Config{}), "https://"+host)
	wantRule(t, err, egress.RuleHost)
}

// Plain http is for an operator's host at a loopback address.
func TestPlainHTTP(t *testing.T) {
	s := httptest.NewServer(http.HandlerFunc(hello))
	t.Cleanup(s.Close)
	address := strings.TrimPrefix(s.URL, "http://")
	_, port, _ := net.SplitHostPort(address)
	n := startNames(t, map[string][][]string{"local.example": {{"127.0.0.1"}}, "private.example": {{"10.0.0.1"}}})
	client := newClient(t, egress.Config{OperatorHosts: []string{address, "local.example:" + port, "private.example:" + port},
		Hosts: []string{"public.example:" + port}, Resolver: n.resolver()})
	for _, host := range []string{address, "local.example:" + port} {
		if _, err := get(t, client, "http://"+host); err != nil {
			t.Errorf("%s: %v", host, err)
		}
	}
	for _, host := range []string{"private.example:" + port, "public.example:" + port} {
		_, err := get(t, client, "http://"+host)
		wantRule(t, err, egress.RuleURL)
	}
}

// The metadata service of a cloud is never called, whatever the operator's configuration says, and
// however its address is written.
func TestAttackMetadataAddress(t *testing.T) {
	byName := map[string]string{
		"v4.example":      "169.254.169.254",
		"mapped.example":  "::ffff:169.254.169.254",
		"ecs.example":     "169.254.170.2",
		"v6.example":      "fd00:ec2::254",
		"alibaba.example": "100.100.100.200",
		"azure.example":   "168.63.129.16",
		"gcp.example":     "fd20:ce::254",
	}
	answers := map[string][][]string{}
	hosts := []string{"169.254.169.254", "[::ffff:169.254.169.254]", "[::ffff:a9fe:a9fe]", "[fd00:ec2::254]", "100.100.100.200"}
	for name, addr := range byName {
		answers[name] = [][]string{{addr}}
		hosts = append(hosts, name)
	}
	client := newClient(t, egress.Config{OperatorHosts: hosts, Resolver: startNames(t, answers).resolver()})
	for _, host := range hosts {
		_, err := get(t, client, "https://"+host+"/latest/meta-data/")
		wantRule(t, err, egress.RuleMetadata)
	}
	t.Logf("attack: the metadata service by name, address and IPv4-mapped IPv6, in the operator's own list: %d of %d refused", len(hosts), len(hosts))
}

// A host that the operator did not name may only have public addresses.
func TestAttackPrivateAddress(t *testing.T) {
	answers := map[string][][]string{}
	var hosts []string
	for i, addr := range []string{
		"127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255", "192.0.2.1",
		"::1", "::", "fe80::1", "fc00::1", "ff02::1", "2001:db8::1",
		"::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2002:7f00:1::", "2002:a9fe:a9fe::", "2001:0:a00:1::", "fec0::1",
	} {
		name := fmt.Sprintf("host%d.example", i)
		answers[name] = [][]string{{addr}}
		hosts = append(hosts, name)
	}
	resolver := startNames(t, answers).resolver()
	client := newClient(t, egress.Config{Hosts: hosts, Resolver: resolver})
	for _, host := range hosts {
		_, err := get(t, client, "https://"+host)
		wantRule(t, err, egress.RuleAddress)
		if t.Failed() {
			t.Fatal(answers[host])
		}
	}
	// An operator's host may be private or loopback, and nothing else that is not public.
	operator := newClient(t, egress.Config{OperatorHosts: hosts, Resolver: resolver})
	for _, host := range hosts {
		switch answers[host][0][0] {
		case "127.0.0.1", "127.8.8.8", "10.0.0.1", "172.16.0.1", "192.168.1.1", "::1", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1":
			continue // would be connected to
		}
		_, err := get(t, operator, "https://"+host)
		wantRule(t, err, egress.RuleAddress)
	}
	t.Logf("attack: a configured name with the addresses of private, loopback, link-local, shared and translated networks: %d of %d refused", len(hosts), len(hosts))
}

// A name whose address changes after somebody checked it gains nothing: the address of each
// connection is checked.
func TestAttackRebinding(t *testing.T) {
	s := startTarget(t, hello)
	n := startNames(t, map[string][][]string{
		"example.com":     {{"203.0.114.1"}, {"127.0.0.1"}},
		"www.example.com": {{"127.0.0.1"}, {"169.254.169.254"}},
	})
	host, operatorHost := "example.com:"+s.port, "www.example.com:"+s.port
	client := newClient(t, egress.Config{Hosts: []string{host}, OperatorHosts: []string{operatorHost}, CAFile: s.caFile, Resolver: n.resolver()})

	checked, err := n.resolver().LookupHost(t.Context(), "example.com")
	if err != nil || len(checked) != 1 || checked[0] != "203.0.114.1" {
		t.Fatal(checked, err)
	}
	_, err = get(t, client, "https://"+host)
	wantRule(t, err, egress.RuleAddress)
	if n := s.calls.Load(); n != 0 {
		t.Errorf("%d calls reached the loopback address", n)
	}

	if _, err := get(t, client, "https://"+operatorHost); err != nil {
		t.Fatal(err)
	}
	client.Close() // the next call connects anew
	_, err = get(t, client, "https://"+operatorHost)
	wantRule(t, err, egress.RuleMetadata)
	t.Logf("attack: a resolver that changes its answer between two look-ups: 2 of 2 refused, 0 calls reached the second address")
}

// A redirect leads to no other host, port or scheme, and not on forever.
func TestAttackRedirect(t *testing.T) {
	var elsewhere atomic.Int64
	other := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { elsewhere.Add(1) }))
	t.Cleanup(other.Close)
	s := startTarget(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/end" {
			hello(w, r)
			return
		}
		http.Redirect(w, r, r.URL.Query().Get("to"), http.StatusTemporaryRedirect)
	})
	n := startNames(t, map[string][][]string{"example.com": {{"127.0.0.1"}}, "www.example.com": {{"127.0.0.1"}}})
	host := "example.com:" + s.port
	client := newClient(t, egress.Config{CAFile: s.caFile, Resolver: n.resolver(),
		OperatorHosts: []string{host, "www.example.com:" + s.port, strings.TrimPrefix(other.URL, "http://")}})
	to := func(target string) string { return "https://" + host + "/?to=" + url.QueryEscape(target) }
	if body, err := get(t, client, to("/end")); err != nil || !strings.Contains(body, "world") {
		t.Errorf("within the host: %q, %v", body, err)
	}
	hostile := []string{
		"https://www.example.com:" + s.port + "/end", other.URL, "https://169.254.169.254/", "http://" + host + "/end", "//www.example.com:" + s.port,
		"file:///etc/passwd", "https://user@www.example.com:" + s.port, "https://example.com/end", "/?to=/",
	}
	for _, target := range hostile {
		_, err := get(t, client, to(target))
		wantRule(t, err, egress.RuleRedirect)
	}
	endless := to("")
	for range 5 {
		endless = to(endless)
	}
	_, err := get(t, client, endless)
	wantRule(t, err, egress.RuleRedirect)
	if elsewhere.Load() > 0 {
		t.Error("another host was called")
	}
	t.Logf("attack: redirects to another host, port or scheme, and without end: %d of %d refused, though the other hosts are configured", len(hostile)+1, len(hostile)+1)
}

// An answer takes no more memory than its cap, whether it says its length or not.
func TestAttackEndlessBody(t *testing.T) {
	var sent atomic.Int64
	s := startTarget(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		if r.URL.Path == "/long" {
			w.Header().Set("Content-Length", "1000000000")
		}
		chunk := []byte(strings.Repeat(" ", 16<<10))
		for {
			n, err := w.Write(chunk)
			sent.Add(int64(n))
			if err != nil {
				return
			}
		}
	})
	address := "127.0.0.1:" + s.port
	client := newClient(t, egress.Config{OperatorHosts: []string{address}, CAFile: s.caFile, MaxBytes: 100_000, Timeout: time.Minute})
	body, err := get(t, client, "https://"+address)
	wantRule(t, err, egress.RuleSize)
	if len(body) != 100_000 {
		t.Errorf("%d bytes were read", len(body))
	}
	_, err = get(t, client, "https://"+address+"/long")
	wantRule(t, err, egress.RuleSize)
	_, err = egress.GetJSON[struct{}](t.Context(), client, "https://"+address, egress.JSONLimits{MaxBytes: 1000})
	wantRule(t, err, egress.RuleSize)
	t.Logf("attack: an answer without end: read %d bytes, then refused", len(body))
}

// A body that comes slowly is cut by the time of the whole call.
func TestAttackSlowBody(t *testing.T) {
	s := startTarget(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/silent" {
			<-r.Context().Done()
			return
		}
		w.Header().Set("Content-Type", "application/json")
		for r.Context().Err() == nil {
			_, _ = io.WriteString(w, " ")
			w.(http.Flusher).Flush()
			time.Sleep(5 * time.Millisecond)
		}
	})
	address := "127.0.0.1:" + s.port
	client := newClient(t, egress.Config{OperatorHosts: []string{address}, CAFile: s.caFile, Timeout: 300 * time.Millisecond})
	for _, path := range []string{"/", "/silent"} {
		began := time.Now()
		_, err := egress.GetJSON[struct{}](t.Context(), client, "https://"+address+path, egress.JSONLimits{})
		wantRule(t, err, egress.RuleTime)
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v is not a deadline", err)
		}
		t.Logf("attack: an answer that never ends (%s): given up after %v of 300ms", path, time.Since(began).Round(time.Millisecond))
	}
}

// A proxy of the environment is not used. A configured one is, and is no host for requests.
func TestProxy(t *testing.T) {
	s := startTarget(t, hello)
	address := "127.0.0.1:" + s.port
	var connects atomic.Int64
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		connects.Add(1)
		if r.Method != http.MethodConnect {
			w.WriteHeader(http.StatusMethodNotAllowed)
			return
		}
		to, err := net.Dial("tcp", address)
		if err != nil {
			t.Error(err)
			return
		}
		w.WriteHeader(http.StatusOK)
		from, _, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		go func() { _, _ = io.Copy(to, from); _ = to.Close() }()
		_, _ = io.Copy(from, to)
		_ = from.Close()
	}))
	t.Cleanup(proxy.Close)
	for _, name := range []string{"HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY"} {
		t.Setenv(name, proxy.URL)
	}
	direct := newClient(t, egress.Config{OperatorHosts: []string{address}, CAFile: s.caFile})
	if _, err := get(t, direct, "https://"+address); err != nil || connects.Load() != 0 {
		t.Errorf("%v, %d calls to the proxy of the environment", err, connects.Load())
	}
	// The proxy resolves the name, so this client asks no DNS server.
	through := newClient(t, egress.Config{Hosts: []string{"example.com", "169.254.169.254"}, CAFile: s.caFile, Proxy: proxy.URL})
	if _, err := get(t, through, "https://example.com"); err != nil || connects.Load() != 1 {
		t.Errorf("%v, %d calls to the proxy", err, connects.Load())
	}
	_, err := get(t, through, "https://169.254.169.254")
	wantRule(t, err, egress.RuleMetadata)
	_, err = get(t, through, proxy.URL)
	wantRule(t, err, egress.RuleHost)
	if connects.Load() != 1 {
		t.Error("a refused call reached the proxy")
	}
	through.Close()
}

// Versions before TLS 1.2 are refused.
func TestOldTLS(t *testing.T) {
	s := httptest.NewUnstartedServer(http.HandlerFunc(hello))
	s.TLS = &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	client := newClient(t, egress.Config{OperatorHosts: []string{s.Listener.Addr().String()}})
	if _, err := get(t, client, s.URL); err == nil || !strings.Contains(err.Error(), "protocol version") {
		t.Error(err)
	}
}

// A configuration that is not valid is refused, and the error names the part.
func TestConfig(t *testing.T) {
	notPEM := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(notPEM, []byte("no certificate"), 0o600); err != nil {
		t.Fatal(err)
	}
	for text, c := range map[string]egress.Config{
		`"exa mple"`:       {Hosts: []string{"exa mple"}},
		`"*.example.com"`:  {Hosts: []string{"*.example.com"}},
		`"https://a"`:      {Hosts: []string{"https://a"}},
		`"a/b"`:            {OperatorHosts: []string{"a/b"}},
		`"127.1"`:          {OperatorHosts: []string{"127.1"}},
		`""`:               {Hosts: []string{""}},
		`"a:0"`:            {Hosts: []string{"a:0"}},
		`"a:"`:             {Hosts: []string{"a:"}},
		`"a:65536"`:        {Hosts: []string{"a:65536"}},
		`"user@a"`:         {Hosts: []string{"user@a"}},
		"no certificate":   {CAFile: notPEM},
		"CA file":          {CAFile: notPEM + "x"},
		"proxy must":       {Proxy: "socks5://user:word@a"},
		"must not be nega": {Timeout: -1},
	} {
		if _, err := egress.New(c); err == nil || !strings.Contains(err.Error(), text) || strings.Contains(err.Error(), "word") {
			t.Errorf("%v, want %s", err, text)
		}
	}
}
