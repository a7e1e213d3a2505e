// Package clienttls gives the Go client and the command line the CAs that they trust and the client
// certificate that they present, from files that can be replaced while a program runs.
package clienttls

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cedarpost/cedarpost/internal/keyfile"
)

// MinVersion is the least version of TLS that our own clients speak.
const MinVersion = tls.VersionTLS13

// ErrRefused means that the server closed the connection right after the TLS handshake. In TLS 1.3 it
// does so when it does not accept the client certificate; the alert that says why can be lost.
var ErrRefused = errors.New("the server closed the connection after the TLS handshake; it may want another client certificate")

// interval is the time between two looks at the files.
const interval = time.Second

// Files are names of PEM files. Each may be empty, but Cert and Key only together.
type Files struct {
	CA   string // the CAs to trust, in place of those of the system
	Cert string // the certificate to present, then its intermediate certificates
	Key  string // its key, which others may not read
}

// Transport is a transport whose files are read again when they change. Then new calls get new
// connections, and calls under way end on the old ones. If the new files cannot be used, or hold a
// certificate that has expired while the one before has not, the old ones stay in use.
type Transport struct {
	files Files
	make  func(*tls.Config) *http.Transport
	warn  func(error)

	current atomic.Pointer[http.Transport]
	looked  atomic.Int64 // in Unix nanoseconds

	mu      sync.Mutex // held while the files are read; guards the fields below
	content [3][]byte
	end     time.Time // of the certificate, if there is one
	trouble string    // what was last told to warn
}

// New reads the files. newTransport makes a transport, and warn gets the errors of later reads, once
// for each change. The error names the file.
func New(files Files, newTransport func(*tls.Config) *http.Transport, warn func(error)) (*Transport, error) {
	t := &Transport{files: files, make: newTransport, warn: warn}
	if err := t.load(); err != nil {
		return nil, err
	}
	t.looked.Store(time.Now().UnixNano())
	return t, nil
}

// RoundTrip implements http.RoundTripper.
func (t *Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	if time.Now().UnixNano()-t.looked.Load() >= int64(interval) && t.mu.TryLock() {
		t.look()
		t.mu.Unlock()
	}
	res, err := t.current.Load().RoundTrip(r)
	if err != nil && r.URL.Scheme == "https" && strings.Contains(err.Error(), "http2: client conn could not be established") {
		err = fmt.Errorf("%w: %w", ErrRefused, err)
	}
	return res, err
}

// CloseIdleConnections closes connections that no call uses.
func (t *Transport) CloseIdleConnections() { t.current.Load().CloseIdleConnections() }

// look reads the files again. The caller holds mu.
func (t *Transport) look() {
	t.looked.Store(time.Now().UnixNano())
	trouble := ""
	err := t.load()
	if err != nil {
		trouble = err.Error()
	}
	if trouble != t.trouble && err != nil {
		t.warn(err)
	}
	t.trouble = trouble
}

// load makes a transport if the files changed. The caller holds mu, or nothing else uses t yet.
func (t *Transport) load() error {
	var content [3][]byte
	for i, f := range []struct {
		name, what string
		read       func(string) ([]byte, error)
	}{{t.files.CA, "CAs", os.ReadFile}, {t.files.Cert, "client certificate", os.ReadFile}, {t.files.Key, "key of the client certificate", keyfile.Read}} {
		if f.name == "" {
			continue
		}
		text, err := f.read(f.name)
		if err != nil {
			return fmt.Errorf("%s: %w", f.what, err)
		}
		content[i] = text
	}
	old := t.current.Load()
	if old != nil && slices.EqualFunc(content[:], t.content[:], bytes.Equal) {
		return nil
	}
	config, end, err := t.files.config(content)
	if err != nil {
		return err
	}
	if now := time.Now(); !end.IsZero() && now.After(end) && (old == nil || now.Before(t.end)) {
		return fmt.Errorf("the client certificate in %s has expired at %s", t.files.Cert, end.UTC().Format(time.RFC3339))
	}
	t.content, t.end = content, end
	t.current.Store(t.make(config))
	if old != nil {
		old.CloseIdleConnections()
	}
	return nil
}

// config makes the configuration of TLS from the content of the files, and returns when the client
// certificate ends.
func (f Files) config(content [3][]byte) (_ *tls.Config, end time.Time, err error) {
	config := &tls.Config{MinVersion: MinVersion}
	if f.CA != "" {
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(content[0]) {
			return nil, end, fmt.Errorf("CAs: there is no certificate in %s", f.CA)
		}
	}
	if f.Cert == "" && f.Key == "" {
		return config, end, nil
	}
	if f.Cert == "" || f.Key == "" {
		return nil, end, errors.New("a client certificate needs two files, of the certificate and of its key")
	}
	pair, err := tls.X509KeyPair(content[1], content[2])
	if err != nil {
		return nil, end, fmt.Errorf("client certificate in %s and %s: %w", f.Cert, f.Key, err)
	}
	usages := []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageAny}
	if len(pair.Leaf.ExtKeyUsage) > 0 && !slices.ContainsFunc(pair.Leaf.ExtKeyUsage, func(u x509.ExtKeyUsage) bool { return slices.Contains(usages, u) }) {
		return nil, end, fmt.Errorf("the certificate in %s is not for client authentication", f.Cert)
	}
	// It is presented also to a server that names other CAs, whose error then says what is wrong.
	config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
	return config, pair.Leaf.NotAfter, nil
}
