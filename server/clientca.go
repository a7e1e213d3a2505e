package server

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"time"

	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
)

// renewBefore is how long before the end of its client certificate a connection is closed after a
// call, so that the client makes another one with its new certificate. It is longer than an idle
// connection stays open. So calls of a client that renews its certificate in time do not fail.
const renewBefore = 2 * time.Minute

// ClientCertificates says which client certificates are accepted.
type ClientCertificates struct {
	// CA is a PEM file with the CAs that sign client certificates, which is read again when it
	// changes. A connection with a certificate of another CA is refused. Without CA no certificates
	// are asked for.
	CA string
	// Required refuses connections without a client certificate. Otherwise callers with API keys
	// need none.
	Required bool
	// TrustDomains are the SPIFFE trust domains, such as example.org, whose IDs name callers.
	TrustDomains []string
	// DNSNames makes the DNS name of a certificate without a SPIFFE ID the name of a caller.
	DNSNames bool
}

// clientCAs are the CAs that sign client certificates, from a file. When it changes, the new ones
// are taken up within ten seconds. The old ones stay in use if the new ones do not load, or if none
// of them is valid while one of the old ones is.
type clientCAs struct {
	reloading
	file         string
	required     bool
	certificates *access.Certificates

	content []byte // of the file; guarded by mu
}

// CheckClientCertificates returns the error with which a server with these settings would not start.
// serves says that it has a certificate of its own.
func CheckClientCertificates(config ClientCertificates, serves bool) error {
	_, err := newClientCAs(config, serves, slog.New(slog.DiscardHandler))
	return err
}

// newClientCAs returns nil if no client certificates are configured. serves says that the server has a
// certificate of its own.
func newClientCAs(config ClientCertificates, serves bool, log *slog.Logger) (_ *clientCAs, err error) {
	names := len(config.TrustDomains) > 0 || config.DNSNames
	switch {
	case config.CA == "" && (names || config.Required):
		return nil, &decisionlog.ConfigError{Field: "Clients.CA", Err: errors.New("client certificates need their CAs in a file")}
	case config.CA == "":
		return nil, nil
	case !serves:
		return nil, &decisionlog.ConfigError{Field: "Clients.CA", Err: errors.New("client certificates need TLS: give --tls-cert and --tls-key")}
	case !names && !config.Required:
		return nil, &decisionlog.ConfigError{Field: "Clients.CA", Err: errors.New("it has no effect: give --client-trust-domain, --client-dns-names or --require-client-cert, too")}
	}
	c := &clientCAs{file: config.CA, required: config.Required, reloading: reloading{
		about: "client CAs", files: "client CAs", kept: "those before stay in use", log: log, now: time.Now,
	}}
	if c.certificates, err = access.NewCertificates(config.TrustDomains, config.DNSNames); err != nil {
		return nil, &decisionlog.ConfigError{Field: "Clients.TrustDomains", Err: err}
	}
	if err := c.load(); err != nil {
		return nil, err
	}
	c.sayValidity()
	return c, nil
}

// reload loads the file if it changed, and logs what is different from the last look.
func (c *clientCAs) reload() error { return c.look(c.log) }

// look is reload with another log.
func (c *clientCAs) look(log *slog.Logger) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.content
	err := c.load()
	if !bytes.Equal(c.content, before) {
		log.Info("new client CAs taken up", "file", c.file)
	}
	c.loaded(log, err)
	c.sayValidity()
	return err
}

// load loads the file if it changed. The caller holds mu, or nothing else uses c yet.
func (c *clientCAs) load() error {
	text, err := os.ReadFile(c.file)
	if err != nil {
		return &decisionlog.ConfigError{Field: "Clients.CA", Err: err}
	}
	if bytes.Equal(text, c.content) {
		return nil
	}
	list, err := access.ParseCAs(text)
	if err != nil {
		return &decisionlog.ConfigError{Field: "Clients.CA", Err: fmt.Errorf("%s: %w", c.file, err)}
	}
	old, _ := c.certificates.CAs()
	if problem := problemOf(list, c.now()); problem != "" && len(old) > 0 && problemOf(old, c.now()) == "" {
		return errors.New("no CA in " + c.file + " is valid: " + problem)
	}
	c.content = text
	c.certificates.SetCAs(list)
	return nil
}

// problemOf returns why none of the CAs is valid at a time, or "".
func problemOf(list []*x509.Certificate, now time.Time) (problem string) {
	for _, ca := range list {
		if problem = validity(ca.NotBefore, ca.NotAfter, now); problem == "" {
			return ""
		}
		problem = ca.Subject.String() + " " + problem
	}
	return problem
}

// sayValidity logs that CAs are not valid or expire soon.
func (c *clientCAs) sayValidity() {
	list, _ := c.certificates.CAs()
	now, level, text := c.now(), slog.LevelWarn, ""
	for _, ca := range list {
		problem := validity(ca.NotBefore, ca.NotAfter, now)
		switch {
		case problem != "":
			problem += ": clients with its certificates are refused"
		case endsSoon(ca.NotBefore, ca.NotAfter, now):
			problem = "ends at " + ca.NotAfter.UTC().Format(time.RFC3339)
		default:
			continue
		}
		if text != "" {
			text += "; "
		}
		text += "the client CA " + ca.Subject.String() + " " + problem
	}
	if problemOf(list, now) != "" {
		level = slog.LevelError
	}
	c.say(level, text)
}

// end returns when the first CA ends.
func (c *clientCAs) end() (end time.Time) {
	list, _ := c.certificates.CAs()
	for _, ca := range list {
		if end.IsZero() || ca.NotAfter.Before(end) {
			end = ca.NotAfter
		}
	}
	return end
}

// err returns why no client certificate can be valid now, or nil.
func (c *clientCAs) err() error {
	list, _ := c.certificates.CAs()
	if problem := problemOf(list, c.now()); problem != "" {
		return errors.New("no client CA is valid: " + problem)
	}
	return nil
}

// warning returns what is wrong with the CAs, or "".
func (c *clientCAs) warning() string {
	if err := c.err(); err != nil {
		return c.about + ": " + err.Error()
	}
	return c.reloading.warning()
}

// handler closes connections whose client certificate is not valid any more, or ends soon. A call
// on a connection without a valid certificate is refused if one is required. A nil clientCAs
// changes nothing.
func (c *clientCAs) handler(next http.Handler) http.Handler {
	if c == nil {
		return next
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS != nil && len(r.TLS.PeerCertificates) > 0 {
			until, err := c.certificates.Until(r.TLS)
			if err != nil {
				w.Header().Set("Connection", "close") // in HTTP/2 it ends the connection, too
				if c.required {
					http.Error(w, "the client certificate of this connection is not valid any more: connect again with another one", http.StatusUnauthorized)
					return
				}
			} else if last := until.Add(-renewBefore); c.now().After(last) {
				if conn, ok := r.Context().Value(connKey{}).(*boundedConn); ok && conn.since.Before(last) {
					w.Header().Set("Connection", "close")
				}
			}
		}
		next.ServeHTTP(w, r)
	})
}
