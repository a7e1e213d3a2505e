package main

import (
	"crypto/tls"

	"github.com/cedarpost/cedarpost/server"
)

// tlsFlags are the settings of TLS of serve.
type tlsFlags struct {
	TLSCert        string   `name:"tls-cert" help:"PEM file with the certificate of the decision and admin planes. The server reads it again when it changes." env:"CEDARPOST_TLS_CERT" type:"path" placeholder:"FILE" group:"server" and:"tls"`
	TLSKey         string   `name:"tls-key" help:"PEM file with the key of the certificate." env:"CEDARPOST_TLS_KEY" type:"path" placeholder:"FILE" group:"server" and:"tls"`
	TLSMin         string   `name:"tls-min-version" help:"Least version of TLS of clients: 1.2 or 1.3 (default ${default}). The Go client and this command need 1.3." env:"CEDARPOST_TLS_MIN_VERSION" enum:"1.2,1.3" default:"1.2" placeholder:"VERSION" group:"server"`
	ClientCA       string   `name:"client-ca" help:"PEM file with the CAs that sign client certificates. The server reads it again when it changes. Callers with API keys need no certificate." env:"CEDARPOST_CLIENT_CA" type:"path" placeholder:"FILE" group:"server"`
	RequireClient  bool     `name:"require-client-cert" help:"Refuse connections without a client certificate of --client-ca." env:"CEDARPOST_REQUIRE_CLIENT_CERT" group:"server"`
	TrustDomains   []string `name:"client-trust-domain" help:"SPIFFE trust domain, such as example.org: a client certificate with one of its IDs names a caller, such as spiffe://example.org/orders. Several separated by spaces, or repeated." env:"CEDARPOST_CLIENT_TRUST_DOMAIN" sep:" " placeholder:"NAME" group:"server"`
	ClientDNSNames bool     `name:"client-dns-names" help:"A client certificate with a DNS name and no SPIFFE ID names a caller, such as certificate:orders.example.org." env:"CEDARPOST_CLIENT_DNS_NAMES" group:"server"`
}

// configureTLS puts the settings into the configuration of the server.
func (f *tlsFlags) configureTLS(c *server.Config) {
	c.TLSCert, c.TLSKey = f.TLSCert, f.TLSKey
	if f.TLSMin == "1.3" {
		c.TLSMinVersion = tls.VersionTLS13
	}
	c.Clients = f.clients()
}

// clients are the settings of client certificates.
func (f *tlsFlags) clients() server.ClientCertificates {
	return server.ClientCertificates{CA: f.ClientCA, Required: f.RequireClient, TrustDomains: f.TrustDomains, DNSNames: f.ClientDNSNames}
}
