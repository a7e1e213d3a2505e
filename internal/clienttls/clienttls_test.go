package clienttls

import (
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"log"
	"math"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/internal/privateca"
)

type files struct {
	t *testing.T
	Files
}

func newFiles(t *testing.T) *files {
	dir := t.TempDir()
	return &files{t, Files{CA: filepath.Join(dir, "ca.pem"), Cert: filepath.Join(dir, "client.pem"), Key: filepath.Join(dir, "client.key")}}
}

func (f *files) issue(ca *privateca.Pair, template *x509.Certificate) *privateca.Pair {
	f.t.Helper()
	if template.NotAfter.IsZero() {
		template.NotAfter = time.Now().Add(time.Hour)
	}
	pair, err := privateca.Issue(template, ca)
	if err != nil {
		f.t.Fatal(err)
	}
	return pair
}

func (f *files) ca(name string) *privateca.Pair {
	return f.issue(nil, &x509.Certificate{Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true})
}

func (f *files) write(name string, text []byte, mode os.FileMode) {
	f.t.Helper()
	if err := errors.Join(os.WriteFile(name, text, mode), os.Chmod(name, mode)); err != nil {
		f.t.Fatal(err)
	}
}

// client writes a client's certificate and its key.
func (f *files) client(ca *privateca.Pair, name string, change func(*x509.Certificate)) {
	f.t.Helper()
	template := &x509.Certificate{Subject: pkix.Name{CommonName: name}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	if change != nil {
		change(template)
	}
	pair := f.issue(ca, template)
	key, err := pair.KeyPEM()
	if err != nil {
		f.t.Fatal(err)
	}
	f.write(f.Cert, pair.CertPEM(), 0o644)
	f.write(f.Key, key, 0o600)
}

// server is a server that answers with the name of the client's certificate. Its own certificate and
// the CA of its clients can be replaced.
type server struct {
	*httptest.Server
	config atomic.Pointer[tls.Config]
}

func (f *files) server() *server {
	s := &server{}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, r.TLS.PeerCertificates[0].Subject.CommonName)
	}))
	s.EnableHTTP2 = true
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.TLS = &tls.Config{GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) { return s.config.Load(), nil }}
	s.StartTLS()
	f.t.Cleanup(s.Close)
	return s
}

// serve makes a server's certificate of a CA, and trusts another CA for clients.
func (s *server) serve(f *files, ca, clients *privateca.Pair) {
	pair := f.issue(ca, &x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}})
	pool := x509.NewCertPool()
	pool.AddCert(clients.Cert)
	s.config.Store(&tls.Config{
		Certificates: []tls.Certificate{{Certificate: [][]byte{pair.Cert.Raw}, PrivateKey: pair.Key}},
		ClientAuth:   tls.RequireAndVerifyClientCert, ClientCAs: pool, NextProtos: []string{"h2"},
	})
}

func get(t *testing.T, client *http.Client, url string) string {
	t.Helper()
	res, err := client.Get(url)
	if err != nil {
		return err.Error()
	}
	defer func() { _ = res.Body.Close() }()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		return err.Error()
	}
	return string(text)
}

// All files are replaced while calls run, by good and by broken ones. No call fails.
func TestFilesAreReplacedUnderLoad(t *testing.T) {
	f := newFiles(t)
	ca := f.ca("first")
	s := f.server()
	s.serve(f, ca, ca)
	f.write(f.CA, ca.CertPEM(), 0o644)
	f.client(ca, "first", nil)
	var warned atomic.Int64
	transport, err := New(f.Files, func(c *tls.Config) *http.Transport {
		return &http.Transport{TLSClientConfig: c, ForceAttemptHTTP2: true}
	}, func(error) { warned.Add(1) })
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: transport}
	defer client.CloseIdleConnections()
	look := func() {
		transport.mu.Lock()
		defer transport.mu.Unlock()
		transport.look()
		transport.looked.Store(math.MaxInt64) // calls do not look: the files are written one by one
	}
	look()
	var calls, failed atomic.Int64
	stop := make(chan struct{})
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if name := get(t, client, s.URL); name != "first" && name != "second" && name != "third" {
					failed.Add(1)
					t.Errorf("%q", name)
					return
				}
				calls.Add(1)
			}
		})
	}
	says := func(want string, warnings int64) {
		t.Helper()
		before := warned.Load()
		look()
		look()
		if got := get(t, client, s.URL); got != want || warned.Load() != before+warnings {
			t.Errorf("%q and %d warnings, want %q and %d", got, warned.Load()-before, want, warnings)
		}
	}
	says("first", 0)
	f.client(ca, "second", nil)
	says("second", 0)
	f.write(f.Cert, []byte("broken"), 0o644)
	says("second", 1)
	f.client(ca, "past", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
	says("second", 1)
	f.write(f.CA, []byte("broken"), 0o644)
	says("second", 1)
	next := f.ca("next")
	f.write(f.CA, append(ca.CertPEM(), next.CertPEM()...), 0o644)
	f.client(ca, "third", nil)
	says("third", 0)
	s.serve(f, next, ca) // the certificate of the server is of another CA, which the client trusts by now
	client.CloseIdleConnections()
	says("third", 0)
	close(stop)
	group.Wait()
	t.Logf("%d calls while the files were replaced 3 times and broken 3 times: %d failed", calls.Load(), failed.Load())
}

// A mistake in the files is an error that names the file, and shows nothing of a key.
func TestWrongFiles(t *testing.T) {
	f := newFiles(t)
	ca := f.ca("ca")
	f.write(f.CA, ca.CertPEM(), 0o644)
	good := f.Files
	for _, c := range []struct {
		about  string
		change func()
		says   []string
	}{
		{"no key", func() { f.Key = "" }, []string{"needs two files"}},
		{"no certificate", func() { f.Cert = "" }, []string{"needs two files"}},
		{"no such CA", func() { f.CA += "x" }, []string{"CAs: ", f.CA + "x", "no such file"}},
		{"no CA", func() { f.write(f.CA, []byte("text"), 0o644) }, []string{"no certificate in " + f.CA}},
		{"a key that all may read", func() { f.write(f.Key, []byte("secret"), 0o644) }, []string{f.Key, "all users of this machine"}},
		{"a broken key", func() { f.write(f.Key, []byte("secret"), 0o600) }, []string{f.Cert + " and " + f.Key}},
		{"the key of another", func() {
			cert, err := os.ReadFile(f.Cert)
			if err != nil {
				t.Fatal(err)
			}
			f.client(ca, "other", nil)
			f.write(f.Cert, cert, 0o644)
		}, []string{f.Cert, "private key does not match"}},
		{"expired", func() {
			f.client(ca, "past", func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) })
		}, []string{f.Cert, "has expired at"}},
		{"for a server", func() {
			f.client(ca, "server", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} })
		}, []string{f.Cert, "not for client authentication"}},
	} {
		f.Files = good
		f.write(f.CA, ca.CertPEM(), 0o644)
		f.client(ca, "good", nil)
		if _, err := New(f.Files, func(*tls.Config) *http.Transport { return &http.Transport{} }, nil); err != nil {
			t.Fatalf("before %s: %v", c.about, err)
		}
		c.change()
		_, err := New(f.Files, func(*tls.Config) *http.Transport { return &http.Transport{} }, nil)
		for _, says := range c.says {
			if err == nil || !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), "secret") {
				t.Errorf("%s: %v, want %q", c.about, err, says)
			}
		}
	}
}
