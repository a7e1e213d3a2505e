package store

import (
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgxpool"
)

// ErrPlaintext means that a connection to the database would not be encrypted, or would not verify
// which server answers.
var ErrPlaintext = errors.New("the connection to the database is not safe")

// CheckTransport refuses a database URL whose connections leave this machine without TLS that
// verifies the server's certificate and its name (sslmode=verify-full). Connections to loopback
// addresses, to localhost and to unix sockets need none. It looks at everything that the driver
// does: the URL, the variables PGSSLMODE and the like, and each of several hosts. The error is
// [ErrPlaintext], or that of a URL that cannot be read.
func CheckTransport(databaseURL string) error {
	config, err := pgxpool.ParseConfig(databaseURL)
	if err != nil {
		return err
	}
	c := config.ConnConfig
	problem := ""
	var worst *pgconn.FallbackConfig
	for _, way := range append([]*pgconn.FallbackConfig{{Host: c.Host, Port: c.Port, TLSConfig: c.TLSConfig}}, c.Fallbacks...) {
		switch {
		case staysHere(way.Host, way.Port), verifies(way.TLSConfig, way.Host):
		case way.TLSConfig == nil:
			problem, worst = "may be made without encryption", way
		case worst == nil:
			problem, worst = "is encrypted, but does not verify the server's certificate and its name", way
		}
	}
	if worst == nil {
		return nil
	}
	return fmt.Errorf("%w: the one to %s %s; set sslmode=verify-full, and sslrootcert to the file of its CA if that is a private one",
		ErrPlaintext, net.JoinHostPort(worst.Host, strconv.Itoa(int(worst.Port))), problem)
}

// verifies reports whether a connection verifies the certificate and the name of its server.
func verifies(c *tls.Config, host string) bool {
	return c != nil && !c.InsecureSkipVerify && c.ServerName == host
}

// staysHere reports whether a connection to a host does not leave this machine.
func staysHere(host string, port uint16) bool {
	if network, _ := pgconn.NetworkAddress(host, port); network == "unix" || strings.EqualFold(strings.TrimSuffix(host, "."), "localhost") {
		return true
	}
	addr, err := netip.ParseAddr(host)
	return err == nil && addr.Unmap().IsLoopback()
}

// readTLSAgain reads the files of sslrootcert, sslcert and sslkey again for a new connection, so that
// they can be replaced while the program runs. If they cannot be used, those that were read last stay
// in use. Nothing else of the URL is read again. With sslmode=verify-ca the CAs stay as they were.
func (s *sessions) readTLSAgain(c *pgx.ConnConfig) {
	if c.TLSConfig == nil {
		return
	}
	fresh, err := pgx.ParseConfig(c.ConnString())
	trouble := ""
	switch {
	case err != nil:
		trouble = "the files of the database's TLS cannot be used, those read before stay in use"
	case fresh.TLSConfig != nil:
		s.files.Store(fresh.TLSConfig)
	}
	s.trouble.Store(&trouble)
	files := s.files.Load()
	if files == nil {
		return
	}
	use := func(to *tls.Config) {
		if to != nil {
			to.RootCAs, to.Certificates = files.RootCAs, files.Certificates
		}
	}
	use(c.TLSConfig)
	for _, way := range c.Fallbacks {
		use(way.TLSConfig)
	}
}

// TLSFiles returns when the client certificate of the newest connection to the database ends, or the
// zero time if there is none, and what is wrong with the files of certificates that the database URL
// names, or "".
func (db *DB) TLSFiles() (end time.Time, trouble string) {
	if text := db.sessions.trouble.Load(); text != nil {
		trouble = *text
	}
	if files := db.sessions.files.Load(); files != nil && len(files.Certificates) > 0 && files.Certificates[0].Leaf != nil {
		end = files.Certificates[0].Leaf.NotAfter
	}
	return end, trouble
}
