package server

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cedarpost/cedarpost/internal/keyfile"
	"github.com/cedarpost/cedarpost/internal/pause"
	"github.com/cedarpost/cedarpost/server/decisionlog"
)

const (
	certificateCheck = 10 * time.Second
	// certificateSoon is how long before the end of a certificate the warnings begin.
	certificateSoon = 14 * 24 * time.Hour
)

// certificate serves a key pair from files. When they change, it loads the new pair within
// ten seconds. The old pair stays in use if the new one does not load, or is not valid while
// the old one is.
//
// An expired certificate is served, with errors in the log: clients that verify certificates
// refuse it, and the others still work.
type certificate struct {
	certFile, keyFile string
	log               *slog.Logger
	now               func() time.Time

	current  atomic.Pointer[tls.Certificate]
	failures atomic.Int64 // attempts to load what is in the files

	mu         sync.Mutex // held while the files are loaded; guards the fields below
	loaded     [2][]byte  // the content of the files
	trouble    string     // the error of the last load, or ""
	lastLogged string     // what was last logged about the validity
}

func newCertificate(certFile, keyFile string, log *slog.Logger) (*certificate, error) {
	c := &certificate{certFile: certFile, keyFile: keyFile, log: log, now: time.Now}
	if err := c.load(); err != nil {
		return nil, err
	}
	c.logValidity()
	return c, nil
}

// run looks for new files until ctx ends.
func (c *certificate) run(ctx context.Context) {
	for {
		if pause.For(ctx, certificateCheck); ctx.Err() != nil {
			return
		}
		_ = c.reload() // it logs its error
	}
}

// reload loads the files if they changed, and logs what is different from the last look.
func (c *certificate) reload() error { return c.look(c.log) }

// look is reload with another log.
func (c *certificate) look(log *slog.Logger) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	trouble := ""
	before := c.current.Load()
	err := c.load()
	if now := c.current.Load(); now != before {
		log.Info("new certificate taken up", "ends", chainEnd(now).UTC())
	}
	if err != nil {
		c.failures.Add(1)
		trouble = err.Error()
	}
	if trouble != c.trouble {
		c.trouble = trouble
		if trouble == "" {
			log.Info("the files of the certificate are in order again")
		} else {
			log.Error("new certificate not taken up, the one before it is served", "err", trouble)
		}
	}
	c.logValidity()
	return err
}

// load loads the pair if its files changed. The caller holds mu, or nothing else uses c yet.
func (c *certificate) load() error {
	var files [2][]byte
	var err error
	if files[0], err = os.ReadFile(c.certFile); err != nil {
		return &decisionlog.ConfigError{Field: "TLSCert", Err: err}
	}
	if files[1], err = keyfile.Read(c.keyFile); err != nil {
		return &decisionlog.ConfigError{Field: "TLSKey", Err: err}
	}
	old := c.current.Load()
	if old != nil && bytes.Equal(files[0], c.loaded[0]) && bytes.Equal(files[1], c.loaded[1]) {
		return nil
	}
	pair, err := tls.X509KeyPair(files[0], files[1])
	if err != nil {
		return &decisionlog.ConfigError{Field: "TLSCert", Err: fmt.Errorf("%s and %s: %w", c.certFile, c.keyFile, err)}
	}
	if _, problem := c.validity(&pair); problem != "" && old != nil {
		if _, was := c.validity(old); was == "" {
			return errors.New("the certificate in " + c.certFile + " " + problem)
		}
	}
	c.loaded = files
	c.current.Store(&pair)
	return nil
}

// chainEnd returns when the first certificate of a chain expires.
func chainEnd(pair *tls.Certificate) (end time.Time) {
	for _, der := range pair.Certificate {
		if c, err := x509.ParseCertificate(der); err == nil && (end.IsZero() || c.NotAfter.Before(end)) {
			end = c.NotAfter
		}
	}
	return end
}

// validity returns when a certificate expires, and why it is not valid now, or "".
func (c *certificate) validity(pair *tls.Certificate) (end time.Time, problem string) {
	now, end := c.now(), chainEnd(pair)
	switch {
	case now.After(end):
		return end, "has expired at " + end.UTC().Format(time.RFC3339)
	case pair.Leaf != nil && now.Before(pair.Leaf.NotBefore):
		return end, "is not valid before " + pair.Leaf.NotBefore.UTC().Format(time.RFC3339)
	}
	return end, ""
}

// logValidity logs that the certificate is not valid or expires soon, once for each change.
func (c *certificate) logValidity() {
	end, problem := c.validity(c.current.Load())
	text := ""
	level := slog.LevelWarn
	switch {
	case problem != "":
		text, level = "the TLS certificate "+problem+": clients that verify it refuse to connect", slog.LevelError
	case end.Sub(c.now()) < certificateSoon:
		text = "the TLS certificate ends at " + end.UTC().Format(time.RFC3339)
	}
	if text != "" && text != c.lastLogged {
		c.log.Log(context.Background(), level, text)
	}
	c.lastLogged = text
}

// warning returns what is wrong with the certificate, or "".
func (c *certificate) warning() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, problem := c.validity(c.current.Load()); problem != "" {
		return "certificate: it " + problem
	}
	if c.trouble != "" {
		return "certificate: new files are not taken up, the log of the server says why"
	}
	return ""
}

func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return c.current.Load(), nil
}

func (c *certificate) config() *tls.Config {
	return &tls.Config{MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}, GetCertificate: c.get}
}

// checkPlaintext returns an error if an address without TLS can be reached from other
// machines.
func checkPlaintext(addr string) error {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return err // it names addr
	}
	if ip := net.ParseIP(host); strings.EqualFold(strings.TrimSuffix(host, "."), "localhost") || (ip != nil && ip.IsLoopback()) {
		return nil
	}
	return fmt.Errorf("%s is open to other machines: give --tls-cert and --tls-key, or --allow-plaintext when something else encrypts", addr)
}

// Reload reads the TLS certificate and its key again and logs the outcome. If the new pair
// does not load, the old one stays in use. Nothing else is read again while the server runs.
func (s *Server) Reload() {
	log := s.cfg.Log
	if s.cert == nil {
		log.Info("nothing to reload: there is no TLS certificate, and everything else is read only at the start")
	} else if err := s.cert.look(slog.New(slog.DiscardHandler)); err != nil { // the outcome is logged here, each time
		log.Error("TLS certificate not reloaded, the old one stays in use", "cert", s.cert.certFile, "key", s.cert.keyFile, "err", err)
	} else {
		log.Info("TLS certificate reloaded", "cert", s.cert.certFile, "key", s.cert.keyFile, "expires", chainEnd(s.cert.current.Load()))
	}
}
