package server

import (
	"crypto/tls"
	"crypto/x509"
	"os"
	"time"

	"github.com/cedarpost/cedarpost/internal/keyfile"
)

// Reload reads the TLS certificate and its key again, now, and says in the log what
// came of it. A pair that does not load leaves the old one in use. Nothing else is read
// again while the server runs.
func (s *Server) Reload() {
	log := s.cfg.Log
	if s.cert == nil {
		log.Info("nothing to reload: there is no TLS certificate")
	} else if expires, err := s.cert.readNow(); err != nil {
		log.Error("TLS certificate not reloaded, the old one stays in use", "cert", s.cert.certFile, "key", s.cert.keyFile, "err", err)
	} else {
		log.Info("TLS certificate reloaded", "cert", s.cert.certFile, "key", s.cert.keyFile, "expires", expires)
	}
	log.Info("settings, database URLs, audit keys and the mask key are read at the start alone: a change of these needs a restart")
}

// readNow loads the pair whether or not its files have changed, and returns when the
// certificate expires.
func (c *certificate) readNow() (expires time.Time, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stamp = [2]time.Time{} // of no file
	if err := c.reload(); err != nil {
		return expires, err
	}
	leaf, err := x509.ParseCertificate(c.current.Certificate[0])
	if err != nil {
		return expires, err
	}
	return leaf.NotAfter, nil
}

// loadPair is tls.LoadX509KeyPair, but for a key that all users of the machine may read.
func loadPair(certFile, keyFile string) (pair tls.Certificate, err error) {
	cert, err := os.ReadFile(certFile)
	if err != nil {
		return pair, err
	}
	key, err := keyfile.Read(keyFile)
	if err != nil {
		return pair, err
	}
	return tls.X509KeyPair(cert, key)
}
