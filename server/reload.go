package server

import "log/slog"

// Reload reads the TLS certificate and its key again, now, and says in the log what
// came of it. A pair that does not load leaves the old one in use. Nothing else is read
// again while the server runs.
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
