package access

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Certificate is the kind of a caller that presented a client certificate.
const Certificate Kind = "certificate"

// certificatePrefix begins the name of a caller whose certificate has a DNS name and no SPIFFE ID.
const certificatePrefix = "certificate:"

// maxVerified is how many certificates are remembered as verified. A certificate that was forgotten
// is verified again.
const maxVerified = 4096

// The reasons why a client certificate names no caller. They are a fixed set, because the log counts
// failed authentication by reason.
var (
	errCertificateChain   = &UnauthenticatedError{"client certificate: no valid chain to a CA of the server"}
	errCertificateTime    = &UnauthenticatedError{"client certificate: expired or not valid yet"}
	errCertificateUsage   = &UnauthenticatedError{"client certificate: not for client authentication"}
	errCertificateCA      = &UnauthenticatedError{"client certificate: it is that of a CA"}
	errCertificateURIs    = &UnauthenticatedError{"client certificate: several URIs"}
	errCertificateID      = &UnauthenticatedError{"client certificate: no valid SPIFFE ID"}
	errCertificateDomain  = &UnauthenticatedError{"client certificate: another trust domain"}
	errCertificateDNSName = &UnauthenticatedError{"client certificate: not exactly one DNS name"}
	errCertificateNoName  = &UnauthenticatedError{"client certificate: no name that the server takes"}
)

// Certificates verifies client certificates and says which callers they name. The caller of a
// certificate has its SPIFFE ID as its name, as in spiffe://example.org/orders, or
// "certificate:" and its DNS name.
//
// A connection is verified when it is made, and again at each call, with the CAs and the time of the
// call: a connection, or a TLS session that is resumed, does not outlive the certificate or a CA that
// was removed. The result is remembered for each certificate as long as the CAs stay the same, so
// the second check costs one look-up. A nil Certificates accepts no certificate.
//
// Each CA may sign certificates of each trust domain, unless it has name constraints.
type Certificates struct {
	domains  []spiffeid.TrustDomain
	dnsNames bool
	now      func() time.Time

	current atomic.Pointer[authorities]
}

// authorities are CAs, and what was verified with them.
type authorities struct {
	list     []*x509.Certificate
	pool     *x509.CertPool
	verified sync.Map // *x509.Certificate → *verified
	count    atomic.Int64
}

// verified is a certificate with a chain to a CA.
type verified struct {
	from, until time.Time // when all certificates of the chain are valid
	caller      Caller
	unnamed     error // why there is no caller, or nil
}

// NewCertificates returns a verifier without CAs, which accepts no certificate until
// [Certificates.SetCAs]. Callers are named by SPIFFE IDs of the trust domains, such as example.org,
// and, if dnsNames is set, by DNS names. An error names the trust domain that is not valid.
func NewCertificates(trustDomains []string, dnsNames bool) (*Certificates, error) {
	c := &Certificates{dnsNames: dnsNames, now: time.Now}
	for _, name := range trustDomains {
		domain, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return nil, fmt.Errorf("%q is not a trust domain like example.org: %w", name, err)
		}
		c.domains = append(c.domains, domain)
	}
	c.SetCAs(nil)
	return c, nil
}

// SetCAs replaces the CAs that sign client certificates.
func (c *Certificates) SetCAs(list []*x509.Certificate) {
	a := &authorities{list: list, pool: x509.NewCertPool()}
	for _, ca := range list {
		a.pool.AddCert(ca)
	}
	c.current.Store(a)
}

// CAs returns the CAs in use, as a list and as a pool. The caller must not change them.
func (c *Certificates) CAs() ([]*x509.Certificate, *x509.CertPool) {
	a := c.current.Load()
	return a.list, a.pool
}

// Caller returns the caller whose certificate a connection was made with. state is that of the
// connection, or nil without TLS. It is called for each call, and also to find out whether a call
// that takes long may go on. The error is an [UnauthenticatedError]: without a certificate that of a
// call without credentials.
func (c *Certificates) Caller(state *tls.ConnectionState) (Caller, error) {
	if c == nil || state == nil || len(state.PeerCertificates) == 0 {
		return Caller{}, errNoCredentials
	}
	v, err := c.verify(state.PeerCertificates)
	if err != nil {
		return Caller{}, err
	}
	return v.caller, v.unnamed
}

// Until returns when the certificate of a connection, or of a CA that it depends on, ends. The error
// says why the certificate is not valid now. A certificate may be valid although it names no caller.
func (c *Certificates) Until(state *tls.ConnectionState) (time.Time, error) {
	if c == nil || state == nil || len(state.PeerCertificates) == 0 {
		return time.Time{}, errNoCredentials
	}
	v, err := c.verify(state.PeerCertificates)
	if err != nil {
		return time.Time{}, err
	}
	return v.until, nil
}

// verify verifies a certificate with the current CAs, or takes what it has found before. The proof
// that the client has the key of the certificate is the handshake's.
//
// The key of what it remembers is the certificate alone, without the intermediate certificates that
// the client sent: they only help to find the chain.
func (c *Certificates) verify(presented []*x509.Certificate) (*verified, error) {
	a, now := c.current.Load(), c.now()
	if known, ok := a.verified.Load(presented[0]); ok {
		if v := known.(*verified); !now.Before(v.from) && !now.After(v.until) {
			return v, nil
		}
	}
	v, err := c.chain(a, presented, now)
	if err != nil {
		return nil, err
	}
	v.caller, v.unnamed = c.name(presented[0])
	if a.count.Load() >= maxVerified {
		a.verified.Clear()
		a.count.Store(0)
	}
	if _, replaced := a.verified.Swap(presented[0], v); !replaced {
		a.count.Add(1)
	}
	return v, nil
}

// chain finds the chain from a certificate to a CA that is valid longest.
func (c *Certificates) chain(a *authorities, presented []*x509.Certificate, now time.Time) (*verified, error) {
	leaf := presented[0]
	if now.Before(leaf.NotBefore) || now.After(leaf.NotAfter) {
		return nil, errCertificateTime
	}
	intermediates := x509.NewCertPool()
	for _, cert := range presented[1:] {
		intermediates.AddCert(cert)
	}
	chains, err := leaf.Verify(x509.VerifyOptions{
		Roots: a.pool, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	if err != nil {
		if invalid, ok := errors.AsType[x509.CertificateInvalidError](err); ok {
			switch invalid.Reason {
			case x509.Expired:
				return nil, errCertificateTime
			case x509.IncompatibleUsage:
				return nil, errCertificateUsage
			}
		}
		return nil, errCertificateChain
	}
	best := &verified{}
	for _, chain := range chains {
		v := &verified{from: chain[0].NotBefore, until: chain[0].NotAfter}
		for _, cert := range chain[1:] {
			if cert.NotBefore.After(v.from) {
				v.from = cert.NotBefore
			}
			if cert.NotAfter.Before(v.until) {
				v.until = cert.NotAfter
			}
		}
		if v.until.After(best.until) {
			best = v
		}
	}
	return best, nil
}

// name returns the caller that a verified certificate names. A certificate with a SPIFFE ID is
// a leaf as section 5.2 of the X.509-SVID standard describes it, and must be for client
// authentication, so that the certificate of a server names no caller.
func (c *Certificates) name(leaf *x509.Certificate) (Caller, error) {
	switch {
	case leaf.IsCA || leaf.KeyUsage&(x509.KeyUsageCertSign|x509.KeyUsageCRLSign) != 0:
		return Caller{}, errCertificateCA
	case !slices.Contains(leaf.ExtKeyUsage, x509.ExtKeyUsageClientAuth):
		return Caller{}, errCertificateUsage
	case len(leaf.URIs) > 1:
		return Caller{}, errCertificateURIs
	case len(leaf.URIs) == 1:
		id, err := x509svid.IDFromCert(leaf)
		if err != nil || id.Path() == "" { // without a path it is the ID of the trust domain itself
			return Caller{}, errCertificateID
		}
		if !slices.Contains(c.domains, id.TrustDomain()) {
			return Caller{}, errCertificateDomain
		}
		return Caller{Name: id.String(), Kind: Certificate}, nil
	case !c.dnsNames:
		return Caller{}, errCertificateNoName
	case len(leaf.DNSNames) != 1:
		return Caller{}, errCertificateDNSName
	}
	host := strings.ToLower(leaf.DNSNames[0])
	if !isHostName(host) {
		return Caller{}, errCertificateDNSName
	}
	return Caller{Name: certificatePrefix + host, Kind: Certificate}, nil
}

// isHostName reports whether a text is a DNS name in lower case: letters, digits, hyphens and
// underscores, with dots between labels. Wildcards are not.
func isHostName(host string) bool {
	if len(host) > 253 {
		return false
	}
	for label := range strings.SplitSeq(host, ".") {
		foreign := func(r rune) bool { return !strings.ContainsRune("abcdefghijklmnopqrstuvwxyz0123456789-_", r) }
		if label == "" || len(label) > 63 || strings.ContainsFunc(label, foreign) {
			return false
		}
	}
	return true
}

// ParseCAs reads certificates of CAs from PEM. It refuses text that has no certificate, one that is
// not that of a CA, or anything else in PEM, such as a private key. Text between the certificates
// is a comment.
func ParseCAs(text []byte) ([]*x509.Certificate, error) {
	var list []*x509.Certificate
	blocks := bytes.Count(text, []byte("-----BEGIN"))
	for {
		var block *pem.Block
		block, text = pem.Decode(text)
		switch {
		case block == nil && blocks == 0:
			return nil, errors.New("there is no certificate in PEM")
		case block == nil && blocks != len(list): // pem.Decode skips a block that it cannot read
			return nil, fmt.Errorf("%d of %d PEM blocks cannot be read", blocks-len(list), blocks)
		case block == nil:
			return list, nil
		case block.Type != "CERTIFICATE":
			return nil, fmt.Errorf("there is a %q besides the certificates of CAs", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(list)+1, err)
		}
		if !cert.IsCA || !cert.BasicConstraintsValid {
			return nil, fmt.Errorf("certificate %d (%s) is not that of a CA", len(list)+1, cert.Subject)
		}
		list = append(list, cert)
	}
}
