package access

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/internal/privateca"
)

// issuer is a CA of a test.
type issuer struct{ pair *privateca.Pair }

// newIssuer makes a root, or with a parent an intermediate CA.
func newIssuer(t testing.TB, name string, parent *issuer, change func(*x509.Certificate)) *issuer {
	t.Helper()
	template := &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	if change != nil {
		change(template)
	}
	return &issuer{parent.issue(t, template)}
}

// issue makes a certificate, signed by the CA or, if it is nil, by itself.
func (i *issuer) issue(t testing.TB, template *x509.Certificate) *privateca.Pair {
	t.Helper()
	var ca *privateca.Pair
	if i != nil {
		ca = i.pair
	}
	pair, err := privateca.Issue(template, ca)
	if err != nil {
		t.Fatal(err)
	}
	return pair
}

// leaf makes a client's certificate; change is applied to a valid one with a SPIFFE ID.
func (i *issuer) leaf(t testing.TB, change func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	template := &x509.Certificate{
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(30 * time.Minute),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		URIs: uris("spiffe://example.org/orders"),
	}
	if change != nil {
		change(template)
	}
	pair := i.issue(t, template)
	return tls.Certificate{Certificate: [][]byte{pair.Cert.Raw}, PrivateKey: pair.Key, Leaf: pair.Cert}
}

func uris(list ...string) (parsed []*url.URL) {
	for _, text := range list {
		u, err := url.Parse(text)
		if err != nil {
			panic(err)
		}
		parsed = append(parsed, u)
	}
	return parsed
}

// clock is the time of server and verifier.
type clock struct{ offset atomic.Int64 }

func (c *clock) now() time.Time { return time.Now().Add(time.Duration(c.offset.Load())) }

// tlsServer answers each call with the name of the caller of its certificate, or with the reason why
// there is none. In its handshakes it verifies nothing, if lax is set, or else what crypto/tls does.
func tlsServer(t *testing.T, c *Certificates, lax bool) *httptest.Server {
	t.Helper()
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		caller, err := c.Caller(r.TLS)
		if unknown, ok := errors.AsType[*UnauthenticatedError](err); ok {
			http.Error(w, unknown.Reason, http.StatusUnauthorized)
			return
		}
		_, _ = io.WriteString(w, caller.Name)
	}))
	s.EnableHTTP2 = true
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.TLS = &tls.Config{Time: c.now}
	s.TLS.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		config := s.TLS.Clone()
		config.GetConfigForClient = nil
		config.ClientAuth = tls.VerifyClientCertIfGiven
		if lax {
			config.ClientAuth = tls.RequestClientCert
		}
		_, config.ClientCAs = c.CAs()
		return config, nil
	}
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

// tlsClient calls over TLS with a certificate, or without one.
func tlsClient(t *testing.T, s *httptest.Server, change func(*tls.Config), certs ...tls.Certificate) func() string {
	t.Helper()
	roots := x509.NewCertPool()
	roots.AddCert(s.Certificate())
	config := &tls.Config{RootCAs: roots, ServerName: "example.com"}
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
		if len(certs) == 0 {
			return &tls.Certificate{}, nil
		}
		return &certs[0], nil
	}
	if change != nil {
		change(config)
	}
	transport := &http.Transport{TLSClientConfig: config, ForceAttemptHTTP2: true}
	t.Cleanup(transport.CloseIdleConnections)
	return func() string {
		res, err := (&http.Client{Transport: transport}).Get(s.URL)
		if err != nil {
			return "handshake: " + err.Error()
		}
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		if err != nil {
			return err.Error()
		}
		return strings.TrimSpace(string(text))
	}
}

func newCertificates(t testing.TB, dnsNames bool, cas ...*issuer) (*Certificates, *clock) {
	t.Helper()
	c, err := NewCertificates([]string{"example.org", "spiffe://second.test"}, dnsNames)
	if err != nil {
		t.Fatal(err)
	}
	now := new(clock)
	c.now = now.now
	trust(c, cas...)
	return c, now
}

func trust(c *Certificates, cas ...*issuer) {
	var list []*x509.Certificate
	for _, ca := range cas {
		list = append(list, ca.pair.Cert)
	}
	c.SetCAs(list)
}

// Certificates over real TLS: which callers they name, and that others name none.
func TestAttackClientCertificates(t *testing.T) {
	root, foreign := newIssuer(t, "root", nil, nil), newIssuer(t, "root", nil, nil) // the same name, another key
	middle := newIssuer(t, "middle", root, nil)
	ended := newIssuer(t, "ended", root, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
	narrow := newIssuer(t, "narrow", root, func(c *x509.Certificate) { c.PermittedURIDomains = []string{"second.test"} })
	through := func(by *issuer, change func(*x509.Certificate)) tls.Certificate {
		pair := by.leaf(t, change)
		pair.Certificate = append(pair.Certificate, by.pair.Cert.Raw)
		return pair
	}
	dns := func(names ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, names }
	}
	ids := func(list ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.URIs = uris(list...) }
	}
	usage := func(list ...x509.ExtKeyUsage) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.ExtKeyUsage = list }
	}
	certificates, _ := newCertificates(t, true, root)
	strict, _ := newCertificates(t, false, root)
	server, other := tlsServer(t, certificates, true), tlsServer(t, strict, true)
	refused := 0
	for _, c := range []struct {
		about string
		cert  tls.Certificate
		want  string // a name, or the reason why there is no caller
	}{
		{"a SPIFFE ID", root.leaf(t, nil), "spiffe://example.org/orders"},
		{"a SPIFFE ID of the second trust domain", root.leaf(t, ids("spiffe://second.test/a/b")), "spiffe://second.test/a/b"},
		{"an intermediate CA", through(middle, nil), "spiffe://example.org/orders"},
		{"an intermediate CA that may sign for this trust domain alone", through(narrow, ids("spiffe://second.test/a")), "spiffe://second.test/a"},
		{"a SPIFFE ID and a DNS name", root.leaf(t, func(c *x509.Certificate) { c.DNSNames = []string{"orders.example.org"} }), "spiffe://example.org/orders"},
		{"a DNS name", root.leaf(t, dns("orders.example.org")), "certificate:orders.example.org"},
		{"a DNS name in capitals", root.leaf(t, dns("Orders.Example.org")), "certificate:orders.example.org"},

		{"another CA", foreign.leaf(t, nil), "no valid chain"},
		{"its own signature", (*issuer)(nil).leaf(t, nil), "no valid chain"},
		{"no intermediate certificate", middle.leaf(t, nil), "no valid chain"},
		{"an intermediate CA that may not sign for this trust domain", through(narrow, nil), "no valid chain"},
		{"an intermediate CA that has expired", through(ended, nil), "expired"},
		{"expired", root.leaf(t, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) }), "expired"},
		{"not valid yet", root.leaf(t, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) }), "not valid yet"},
		{"for a server alone", root.leaf(t, usage(x509.ExtKeyUsageServerAuth)), "not for client authentication"},
		{"for nothing in particular", root.leaf(t, usage()), "not for client authentication"},
		{"a CA", root.leaf(t, func(c *x509.Certificate) { c.IsCA, c.BasicConstraintsValid = true, true }), "that of a CA"},
		{"may sign certificates", root.leaf(t, func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }), "that of a CA"},
		{"two SPIFFE IDs", root.leaf(t, ids("spiffe://example.org/orders", "spiffe://example.org/admin")), "several URIs"},
		{"a SPIFFE ID and another URI", root.leaf(t, ids("spiffe://example.org/orders", "https://example.org")), "several URIs"},
		{"a foreign trust domain", root.leaf(t, ids("spiffe://evil.test/orders")), "another trust domain"},
		{"a foreign trust domain and a DNS name", root.leaf(t, func(c *x509.Certificate) {
			c.URIs, c.DNSNames = uris("spiffe://evil.test/orders"), []string{"orders.example.org"}
		}), "another trust domain"},
		{"a trust domain below a configured one", root.leaf(t, ids("spiffe://a.example.org/orders")), "another trust domain"},
		{"a trust domain alone", root.leaf(t, ids("spiffe://example.org")), "no valid SPIFFE ID"},
		{"another scheme", root.leaf(t, ids("https://example.org/orders")), "no valid SPIFFE ID"},
		{"a port in the trust domain", root.leaf(t, ids("spiffe://example.org:443/orders")), "no valid SPIFFE ID"},
		{"a query", root.leaf(t, ids("spiffe://example.org/orders?a=b")), "no valid SPIFFE ID"},
		{"dot segments", root.leaf(t, ids("spiffe://example.org/a/../admin")), "no valid SPIFFE ID"},
		{"an encoded slash", root.leaf(t, ids("spiffe://example.org/a%2fadmin")), "no valid SPIFFE ID"},
		{"two DNS names", root.leaf(t, dns("orders.example.org", "admin.example.org")), "not exactly one DNS name"},
		{"a wildcard", root.leaf(t, dns("*.example.org")), "not exactly one DNS name"},
		{"a DNS name with a colon", root.leaf(t, dns("a:b")), "not exactly one DNS name"},
		{"only a common name", root.leaf(t, func(c *x509.Certificate) { c.URIs, c.Subject = nil, pkix.Name{CommonName: "admin"} }), "not exactly one DNS name"},
		{"only an address", root.leaf(t, func(c *x509.Certificate) { c.URIs, c.IPAddresses = nil, []net.IP{{127, 0, 0, 1}} }), "not exactly one DNS name"},
	} {
		got := tlsClient(t, server, nil, c.cert)()
		if !strings.Contains(got, c.want) || strings.HasPrefix(c.want, "spiffe:") && got != c.want || strings.HasPrefix(c.want, "certificate:") && got != c.want {
			t.Errorf("%s: %q, want %q", c.about, got, c.want)
		}
		if strings.HasPrefix(got, "client certificate: ") {
			refused++
		}
	}
	if got := tlsClient(t, other, nil, root.leaf(t, dns("orders.example.org")))(); !strings.Contains(got, "no name that the server takes") {
		t.Errorf("a DNS name, which the server does not take: %q", got)
	}
	if got := tlsClient(t, server, nil)(); got != "no credentials" {
		t.Errorf("no certificate: %q", got)
	}
	for _, state := range []*tls.ConnectionState{nil, {}} {
		if caller, err := certificates.Caller(state); !errors.Is(err, errNoCredentials) || caller != (Caller{}) {
			t.Errorf("%v, %v", caller, err)
		}
		if _, err := (*Certificates)(nil).Caller(state); !errors.Is(err, errNoCredentials) {
			t.Error(err)
		}
	}
	t.Logf("forged, expired and ambiguous client certificates: %d of %d refused, with a reason each", refused, 27)
	if refused != 27 {
		t.Errorf("%d refused", refused)
	}
}

// Neither an open connection nor a resumed session outlives the certificate or a CA that was removed.
func TestAttackClientCertificateOutlivesItsEnd(t *testing.T) {
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		t.Run(tls.VersionName(version), func(t *testing.T) {
			root, next := newIssuer(t, "root", nil, nil), newIssuer(t, "next", nil, nil)
			certificates, now := newCertificates(t, false, root)
			server := tlsServer(t, certificates, false)
			server.TLS.MaxVersion = version
			sessions := tls.NewLRUClientSessionCache(8)
			var resumed atomic.Int64
			fresh := func() func() string { // each has a connection of its own
				return tlsClient(t, server, func(c *tls.Config) {
					c.ClientSessionCache = sessions
					c.VerifyConnection = func(state tls.ConnectionState) error {
						if state.DidResume {
							resumed.Add(1)
						}
						return nil
					}
				}, root.leaf(t, nil))
			}
			const name = "spiffe://example.org/orders"
			open := fresh()
			calls := 0
			says := func(client func() string, want string) {
				t.Helper()
				calls++
				if got := client(); !strings.Contains(got, want) {
					t.Errorf("%q, want %q", got, want)
				}
			}
			says(open, name)
			says(fresh(), name)
			if resumed.Load() == 0 {
				t.Fatal("no session was resumed, so the test shows nothing")
			}
			// The CA is removed.
			trust(certificates, next)
			says(open, "no valid chain")
			says(fresh(), "handshake: ")
			trust(certificates, next, root)
			says(open, name)
			says(fresh(), name)
			// The certificate ends.
			now.offset.Store(int64(31 * time.Minute))
			says(open, "expired")
			says(fresh(), "handshake: ")
			now.offset.Store(0)
			says(open, name)
			t.Logf("open and resumed connections after the end of the certificate or the removal of its CA: 4 of 4 refused, %d calls, %d handshakes resumed", calls, resumed.Load())
		})
	}
}

// A certificate stays valid while the CAs change, as long as one of them has signed it, and verifying
// it again costs no more than a look-up.
func TestCertificatesAreRemembered(t *testing.T) {
	root, next := newIssuer(t, "root", nil, nil), newIssuer(t, "next", nil, nil)
	certificates, _ := newCertificates(t, false, root)
	state := &tls.ConnectionState{PeerCertificates: []*x509.Certificate{root.leaf(t, nil).Leaf}}
	stop := make(chan struct{})
	var callers sync.WaitGroup
	for range 4 {
		callers.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if caller, err := certificates.Caller(state); err != nil || caller.Name != "spiffe://example.org/orders" {
					t.Errorf("%v, %v", caller, err)
					return
				}
			}
		})
	}
	for range 20 {
		trust(certificates, root, next)
		trust(certificates, next, root)
	}
	close(stop)
	callers.Wait()
	if n := testing.AllocsPerRun(100, func() { _, _ = certificates.Caller(state) }); n != 0 {
		t.Errorf("%v allocations for a certificate that was verified before", n)
	}
	until, err := certificates.Until(state)
	if err != nil || !until.Equal(state.PeerCertificates[0].NotAfter) {
		t.Errorf("valid until %v, %v", until, err)
	}
	// What is remembered is bounded.
	for range maxVerified + 2 {
		cert := *state.PeerCertificates[0]
		if _, err := certificates.Caller(&tls.ConnectionState{PeerCertificates: []*x509.Certificate{&cert}}); err != nil {
			t.Fatal(err)
		}
	}
	n := 0
	certificates.current.Load().verified.Range(func(any, any) bool { n++; return true })
	if n > maxVerified || int64(n) != certificates.current.Load().count.Load() {
		t.Errorf("%d certificates are remembered, counted are %d", n, certificates.current.Load().count.Load())
	}
}

func TestTrustDomains(t *testing.T) {
	for _, name := range []string{"", "Example.org", "exa mple", "https://example.org", "example.org:443"} {
		if _, err := NewCertificates([]string{name}, false); err == nil || !strings.Contains(err.Error(), "is not a trust domain like example.org") {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func pemOf(kind string, der []byte) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
}

func TestParseCAs(t *testing.T) {
	root, next := newIssuer(t, "root", nil, nil), newIssuer(t, "next", nil, nil)
	one, two := pemOf("CERTIFICATE", root.pair.Cert.Raw), pemOf("CERTIFICATE", next.pair.Cert.Raw)
	broken := strings.Replace(one, "\nM", "\n!", 1)
	for _, c := range []struct {
		text string
		n    int
		says string
	}{
		{one, 1, ""},
		{"the root\n" + one + "\n# the next one\n" + two, 2, ""},
		{"", 0, "no certificate"},
		{"text", 0, "no certificate"},
		{one[:len(one)/2], 0, "1 of 1 PEM blocks cannot be read"},
		{one + two[:len(two)/2], 0, "1 of 2 PEM blocks cannot be read"},
		{broken + two, 0, "1 of 2 PEM blocks cannot be read"},
		{one + pemOf("PRIVATE KEY", []byte("secret")), 0, `there is a "PRIVATE KEY"`},
		{pemOf("CERTIFICATE", []byte("x")), 0, "certificate 1: "},
		{one + pemOf("CERTIFICATE", root.leaf(t, nil).Leaf.Raw), 0, "certificate 2 () is not that of a CA"},
	} {
		list, err := ParseCAs([]byte(c.text))
		if len(list) != c.n || (err == nil) != (c.says == "") || err != nil && (!strings.Contains(err.Error(), c.says) || strings.Contains(err.Error(), "secret")) {
			t.Errorf("%q: %d certificates, %v, want %q", c.text, len(list), err, c.says)
		}
	}
}

// Text with CAs is read whole or refused.
func FuzzParseCAs(f *testing.F) {
	root := newIssuer(f, "root", nil, nil)
	one := pemOf("CERTIFICATE", root.pair.Cert.Raw)
	for _, text := range []string{one, one + one, one[:100], "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n", "x", ""} {
		f.Add([]byte(text))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		list, err := ParseCAs(text)
		if (err == nil) != (len(list) > 0) || err == nil && strings.Count(string(text), "-----BEGIN") != len(list) {
			t.Errorf("%d certificates, %v", len(list), err)
		}
	})
}

// A certificate of any content names no caller, or one whose name is in its only form.
func FuzzCertificateName(f *testing.F) {
	root := newIssuer(f, "root", nil, nil)
	f.Add(root.leaf(f, nil).Leaf.Raw)
	f.Add(root.leaf(f, func(c *x509.Certificate) { c.URIs, c.DNSNames = nil, []string{"A.example.org"} }).Leaf.Raw)
	f.Add(root.pair.Cert.Raw)
	certificates, _ := newCertificates(f, true, root)
	f.Fuzz(func(t *testing.T, der []byte) {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return
		}
		caller, err := certificates.name(cert)
		if (err == nil) == (caller == Caller{}) {
			t.Fatalf("%v, %v", caller, err)
		}
		if err != nil {
			return
		}
		rest, spiffe := strings.CutPrefix(caller.Name, "spiffe://")
		host, dns := strings.CutPrefix(caller.Name, certificatePrefix)
		switch {
		case spiffe && (strings.HasPrefix(rest, "example.org/") || strings.HasPrefix(rest, "second.test/")) && !strings.ContainsAny(rest, "%?#:@ "):
		case dns && host == strings.ToLower(host) && host != "" && !strings.ContainsAny(host, "*/:@ "):
		default:
			t.Errorf("%q", caller.Name)
		}
	})
}

func BenchmarkCertificateCaller(b *testing.B) {
	root := newIssuer(b, "root", nil, nil)
	certificates, _ := newCertificates(b, false, root)
	state := &tls.ConnectionState{PeerCertificates: []*x509.Certificate{root.leaf(b, nil).Leaf}}
	b.Run("again", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			_, _ = certificates.Caller(state)
		}
	})
	b.Run("first", func(b *testing.B) {
		for b.Loop() {
			trust(certificates, root)
			_, _ = certificates.Caller(state)
		}
	})
}
