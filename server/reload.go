package server

import "time"

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
	log.Info("settings, database URLs, audit keys and the mask key are read only at the start: to change them needs a restart")
}

// readNow takes up what is in the files, and returns when the certificate ends.
func (c *certificate) readNow() (expires time.Time, err error) {
	if err := c.reload(); err != nil {
		return expires, err
	}
	return chainEnd(c.current.Load()), nil
}
