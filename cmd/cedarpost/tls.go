package main

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/cedarpost/cedarpost/internal/privateca"
)

type tlsCmd struct {
	Init tlsInitCmd `cmd:"" help:"Make a private CA and certificates, to try TLS and client certificates on this machine."`
}

type tlsInitCmd struct {
	Client      []string `help:"Name of a client, the last part of its SPIFFE ID; may be repeated (default ${default})." default:"app" placeholder:"NAME"`
	TrustDomain string   `help:"SPIFFE trust domain of the clients (default ${default})." default:"cedarpost.internal" placeholder:"NAME"`
	Dir         string   `arg:"" help:"Folder for the files. It is made if it is missing." type:"path"`
}

const (
	caLife   = 365 * 24 * time.Hour
	certLife = 30 * 24 * time.Hour
)

// Help is the long help of tls init.
func (*tlsInitCmd) Help() string {
	return `Makes ca.pem and ca.key, server.pem and server.key for localhost, 127.0.0.1 and ::1, and NAME.pem and NAME.key for each client, and prints commands that use them. The CA ends after a year, the certificates after 30 days: then make new ones in another folder. Keys are ECDSA on the curve P-256, which every TLS library and browser understands, and have mode 0600.

The CA can sign nothing but localhost, loopback addresses and SPIFFE IDs of the trust domain. It is for trying things out: anybody who can read ca.key can make certificates of every client. No file is overwritten.`
}

// Run makes the files.
func (i *tlsInitCmd) Run(c *console) error {
	domain, err := spiffeid.TrustDomainFromString(i.TrustDomain)
	if err != nil {
		return misuse("--trust-domain: %q is not a trust domain like example.org: %w", i.TrustDomain, err)
	}
	templates, names, err := i.templates(domain, time.Now())
	if err != nil {
		return err
	}
	for _, name := range names {
		for _, file := range []string{name + ".pem", name + ".key"} {
			if _, err := os.Lstat(filepath.Join(i.Dir, file)); err == nil {
				return fmt.Errorf("%s exists: no file is overwritten; give another folder", filepath.Join(i.Dir, file))
			}
		}
	}
	if err := os.MkdirAll(i.Dir, 0o755); err != nil {
		return err
	}
	var ca *privateca.Pair
	for _, name := range names {
		pair, err := privateca.Issue(templates[name], ca)
		if err != nil {
			return err
		}
		if ca == nil {
			ca = pair
		}
		if err := i.write(name, pair); err != nil {
			return err
		}
	}
	i.explain(c, domain, templates)
	return nil
}

// templates returns what the certificates say, by the names of their files, and these names, that of
// the CA first.
func (i *tlsInitCmd) templates(domain spiffeid.TrustDomain, now time.Time) (templates map[string]*x509.Certificate, names []string, err error) {
	now = now.UTC().Truncate(time.Second)
	begin, end := now.Add(-time.Minute), now.Add(certLife) // the clocks of clients may be behind
	loopback := []*net.IPNet{
		{IP: net.IPv4(127, 0, 0, 0).To4(), Mask: net.CIDRMask(8, 32)}, {IP: net.IPv6loopback, Mask: net.CIDRMask(128, 128)},
	}
	templates = map[string]*x509.Certificate{
		"ca": {
			Subject: pkix.Name{CommonName: "cedarpost tls init " + now.Format(time.DateTime)}, NotBefore: begin, NotAfter: now.Add(caLife),
			IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
			PermittedDNSDomainsCritical: true, PermittedDNSDomains: []string{"localhost"}, PermittedIPRanges: loopback,
			PermittedURIDomains: []string{domain.Name()},
		},
		"server": {
			Subject: pkix.Name{CommonName: "localhost"}, NotBefore: begin, NotAfter: end,
			DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		},
	}
	names = []string{"ca", "server"}
	for _, name := range i.Client {
		if err := spiffeid.ValidatePathSegment(name); err != nil {
			return nil, nil, misuse("--client: %q cannot be the last part of a SPIFFE ID: letters, digits, dots, hyphens and underscores", name)
		}
		if slices.ContainsFunc(names, func(n string) bool { return strings.EqualFold(n, name) }) {
			return nil, nil, misuse("--client: %q is taken: give each client a name of its own, other than ca and server", name)
		}
		names = append(names, name)
		templates[name] = &x509.Certificate{
			Subject: pkix.Name{CommonName: name}, NotBefore: begin, NotAfter: end,
			URIs:     []*url.URL{{Scheme: "spiffe", Host: domain.Name(), Path: "/" + name}},
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		}
	}
	return templates, names, nil
}

// write writes a certificate and its key into new files.
func (i *tlsInitCmd) write(name string, pair *privateca.Pair) error {
	key, err := pair.KeyPEM()
	if err != nil {
		return err
	}
	if err := writeNew(filepath.Join(i.Dir, name+".key"), key, 0o600); err != nil {
		return err
	}
	return writeNew(filepath.Join(i.Dir, name+".pem"), pair.CertPEM(), 0o644)
}

// explain prints how to use the files.
func (i *tlsInitCmd) explain(c *console, domain spiffeid.TrustDomain, templates map[string]*x509.Certificate) {
	file := func(name string) string { return quote(filepath.Join(i.Dir, name)) }
	fmt.Fprintf(c.out, "made a private CA, which ends %s, and certificates, which end %s, in %s\n",
		templates["ca"].NotAfter.Format(time.DateOnly), templates["server"].NotAfter.Format(time.DateOnly), i.Dir)
	fmt.Fprintf(c.out, "\nserve with them:\n  cedarpost serve --tls-cert %s --tls-key %s \\\n    --client-ca %s --client-trust-domain %s\n",
		file("server.pem"), file("server.key"), file("ca.pem"), domain.Name())
	for _, name := range i.Client {
		fmt.Fprintf(c.out, "\ncall as %s:\n  cedarpost whoami --admin-url https://localhost:8081 \\\n    --ca %s --client-cert %s --client-key %s\n",
			domain.IDString()+"/"+name, file("ca.pem"), file(name+".pem"), file(name+".key"))
	}
	if len(i.Client) > 0 {
		fmt.Fprintf(c.out, "\nit has no rights until an operator gives it a role, for example:\n  cedarpost grants put %s enforcer --bundle NAME\n", domain.IDString()+"/"+i.Client[0])
	}
}

// quote puts a text into quotes for a shell, if it needs them.
func quote(text string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("/._-+=:,@", r)
	}
	if text != "" && !strings.ContainsFunc(text, func(r rune) bool { return !plain(r) }) {
		return text
	}
	return "'" + strings.ReplaceAll(text, "'", `'\''`) + "'"
}
