package server

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
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
	// certificateReminder is how often a warning is logged that stays the same.
	certificateReminder = 24 * time.Hour
)

// reloading reports on files that are read again when they change: in the log, in a metric, and as
// a warning of /readyz.
type reloading struct {
	about string // begins warnings, such as "certificate"
	files string // what the files hold, such as "certificate"
	kept  string // what stays in use if new files cannot be used
	log   *slog.Logger
	now   func() time.Time

	failures atomic.Int64 // attempts to load what is in the files

	mu       sync.Mutex // held while files are loaded; guards the fields below
	trouble  string     // the error of the last load, or ""
	lastSaid string     // what was last logged about the validity
	saidAt   time.Time
}

// loaded notes the outcome of a load, and logs it if it is another one than the last time. The
// caller holds mu.
func (r *reloading) loaded(log *slog.Logger, err error) {
	trouble := ""
	if err != nil {
		r.failures.Add(1)
		trouble = err.Error()
	}
	if trouble == r.trouble {
		return
	}
	r.trouble = trouble
	if trouble == "" {
		log.Info("the files of the " + r.files + " are in order again")
	} else {
		log.Error("new "+r.files+" not taken up, "+r.kept, "err", trouble)
	}
}

// say logs what is wrong with the validity, or "": each change, and again after a day. The caller
// holds mu, or nothing else uses r yet.
func (r *reloading) say(level slog.Level, text string) {
	if now := r.now(); text != "" && (text != r.lastSaid || now.Sub(r.saidAt) >= certificateReminder) {
		r.log.Log(context.Background(), level, text)
		r.saidAt = now
	}
	r.lastSaid = text
}

// warning returns what is wrong with the files, or "".
func (r *reloading) warning() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.trouble != "" {
		return r.about + ": new files are not taken up, the log of the server says why"
	}
	return ""
}

// keepLoading calls reload, which logs its error, every ten seconds until ctx ends.
func keepLoading(ctx context.Context, reload func() error) {
	for {
		if pause.For(ctx, certificateCheck); ctx.Err() != nil {
			return
		}
		_ = reload()
	}
}

// validity returns why something that is valid from begin to end is not valid at a time, or "".
func validity(begin, end, now time.Time) string {
	switch {
	case now.After(end):
		return "has expired at " + end.UTC().Format(time.RFC3339)
	case now.Before(begin):
		return "is not valid before " + begin.UTC().Format(time.RFC3339)
	}
	return ""
}

// endsSoon reports whether a certificate that is valid from begin to end needs a warning: two weeks
// before its end, or in the last third of a shorter life.
func endsSoon(begin, end, now time.Time) bool {
	return end.Sub(now) < min(certificateSoon, end.Sub(begin)/3)
}

// certificate serves a key pair from files. When they change, it loads the new pair within
// ten seconds. The old pair stays in use if the new one does not load, or is not valid while
// the old one is.
//
// An expired certificate is served, and the server is not ready: clients that verify certificates
// refuse it, and the others still work.
type certificate struct {
	reloading
	certFile, keyFile string

	current atomic.Pointer[servedPair]
	content [2][]byte // of the files; guarded by mu
}

// servedPair is a certificate with its key.
type servedPair struct {
	*tls.Certificate
	begin, end time.Time // when it is valid; end is the first of the chain
}

func newCertificate(certFile, keyFile string, log *slog.Logger) (*certificate, error) {
	c := &certificate{certFile: certFile, keyFile: keyFile, reloading: reloading{
		about: "certificate", files: "certificate", kept: "the one before it is served", log: log, now: time.Now,
	}}
	if err := c.load(); err != nil {
		return nil, err
	}
	c.sayValidity()
	return c, nil
}

// reload loads the files if they changed, and logs what is different from the last look.
func (c *certificate) reload() error { return c.look(c.log) }

// look is reload with another log.
func (c *certificate) look(log *slog.Logger) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	before := c.current.Load()
	err := c.load()
	if now := c.current.Load(); now != before {
		log.Info("new certificate taken up", "ends", now.end.UTC())
	}
	c.loaded(log, err)
	c.sayValidity()
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
	if old != nil && bytes.Equal(files[0], c.content[0]) && bytes.Equal(files[1], c.content[1]) {
		return nil
	}
	loaded, err := tls.X509KeyPair(files[0], files[1])
	if err != nil {
		return &decisionlog.ConfigError{Field: "TLSCert", Err: fmt.Errorf("%s and %s: %w", c.certFile, c.keyFile, err)}
	}
	if err := CheckServerUse(loaded.Leaf); err != nil {
		return &decisionlog.ConfigError{Field: "TLSCert", Err: fmt.Errorf("%s: %w", c.certFile, err)}
	}
	pair := newServedPair(&loaded)
	if problem := pair.problem(c.now()); problem != "" && old != nil && old.problem(c.now()) == "" {
		return errors.New("the certificate in " + c.certFile + " " + problem)
	}
	c.content = files
	c.current.Store(pair)
	return nil
}

// CheckServerUse returns an error if a certificate says that it is not for servers (extended key usage,
// RFC 5280, section 4.2.1.12): clients would refuse to connect. One that says nothing is for all uses.
func CheckServerUse(leaf *x509.Certificate) error {
	uses := leaf.ExtKeyUsage
	if len(uses)+len(leaf.UnknownExtKeyUsage) == 0 || slices.Contains(uses, x509.ExtKeyUsageServerAuth) || slices.Contains(uses, x509.ExtKeyUsageAny) {
		return nil
	}
	return errors.New("the certificate is not for servers, so clients that verify it refuse to connect: give one with the extended key usage serverAuth")
}

func newServedPair(loaded *tls.Certificate) *servedPair {
	pair := &servedPair{Certificate: loaded, begin: loaded.Leaf.NotBefore, end: loaded.Leaf.NotAfter}
	for _, der := range loaded.Certificate[1:] {
		if c, err := x509.ParseCertificate(der); err == nil && c.NotAfter.Before(pair.end) {
			pair.end = c.NotAfter
		}
	}
	return pair
}

// problem returns why the certificate is not valid at a time, or "".
func (p *servedPair) problem(now time.Time) string { return validity(p.begin, p.end, now) }

// sayValidity logs that the certificate is not valid or expires soon.
func (c *certificate) sayValidity() {
	pair, now := c.current.Load(), c.now()
	switch problem := pair.problem(now); {
	case problem != "":
		c.say(slog.LevelError, "the TLS certificate "+problem+": clients that verify it refuse to connect")
	case endsSoon(pair.begin, pair.end, now):
		c.say(slog.LevelWarn, "the TLS certificate ends at "+pair.end.UTC().Format(time.RFC3339))
	default:
		c.say(slog.LevelInfo, "")
	}
}

// err returns why clients cannot trust the certificate now, or nil.
func (c *certificate) err() error {
	if problem := c.current.Load().problem(c.now()); problem != "" {
		return errors.New("the TLS certificate " + problem)
	}
	return nil
}

// warning returns what is wrong with the certificate or its files, or "".
func (c *certificate) warning() string {
	if problem := c.current.Load().problem(c.now()); problem != "" {
		return c.about + ": it " + problem
	}
	return c.reloading.warning()
}

// end returns when the certificate that is served ends.
func (c *certificate) end() time.Time { return c.current.Load().end }

func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return c.current.Load().Certificate, nil
}

// tlsConfig returns the configuration of listeners with a certificate. clients is nil if no client
// certificates are accepted. Clients and server agree on TLS 1.3 if both have it.
func tlsConfig(c *certificate, clients *clientCAs, minVersion uint16) *tls.Config {
	config := &tls.Config{
		MinVersion: cmp.Or(minVersion, tls.VersionTLS12), NextProtos: []string{"h2", "http/1.1"}, GetCertificate: c.get,
	}
	if clients == nil {
		return config
	}
	config.ClientAuth = tls.VerifyClientCertIfGiven
	if clients.required {
		config.ClientAuth = tls.RequireAndVerifyClientCert
	}
	_, config.ClientCAs = clients.certificates.CAs()
	outer := config.Clone()
	// A session is resumed only if one of these CAs has signed its certificate and all of the chain
	// is still valid: crypto/tls looks, since Go 1.26.
	outer.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		config := config.Clone()
		_, config.ClientCAs = clients.certificates.CAs()
		return config, nil
	}
	return outer
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

// Reload reads the TLS certificate, its key and the CAs of clients again and logs the outcome. What
// does not load stays as it was. [Server.ReloadSecrets] does the same for files of keys.
func (s *Server) Reload() {
	log := s.cfg.Log
	quiet := slog.New(slog.DiscardHandler) // the outcome is logged here, each time
	if s.cert == nil {
		log.Info("there is no TLS certificate to reload")
	} else if err := s.cert.look(quiet); err != nil {
		log.Error("TLS certificate not reloaded, the old one stays in use", "cert", s.cert.certFile, "key", s.cert.keyFile, "err", err)
	} else {
		log.Info("TLS certificate reloaded", "cert", s.cert.certFile, "key", s.cert.keyFile, "expires", s.cert.current.Load().end)
	}
	if s.clients == nil {
		return
	}
	if err := s.clients.look(quiet); err != nil {
		log.Error("client CAs not reloaded, the old ones stay in use", "file", s.clients.file, "err", err)
	} else {
		log.Info("client CAs reloaded", "file", s.clients.file)
	}
}
