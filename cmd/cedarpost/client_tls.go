package main

import (
	"crypto/tls"
	"errors"
	"net"
	"net/http"
	"strings"

	"github.com/cedarpost/cedarpost/internal/clienttls"
)

// clientTLSFlags say which CAs to trust and which client certificate to present.
type clientTLSFlags struct {
	CA         string `name:"ca" help:"PEM file with the CAs to trust, in place of those of the system." env:"CEDARPOST_CA" type:"path" placeholder:"FILE" group:"client"`
	ClientCert string `help:"PEM file with a client certificate, which can take the place of an API key." env:"CEDARPOST_CLIENT_CERT" type:"path" placeholder:"FILE" group:"client" and:"client-cert"`
	ClientKey  string `help:"PEM file with the key of the client certificate." env:"CEDARPOST_CLIENT_KEY" type:"path" placeholder:"FILE" group:"client" and:"client-cert"`
}

// transport makes the transport of calls. It speaks TLS 1.3, or plain http. A command that runs long
// reads the files again when they change.
func (f *clientTLSFlags) transport() (http.RoundTripper, error) {
	transport, err := clienttls.New(clienttls.Files{CA: f.CA, Cert: f.ClientCert, Key: f.ClientKey}, func(config *tls.Config) *http.Transport {
		return &http.Transport{
			Proxy:               http.ProxyFromEnvironment,
			DialContext:         (&net.Dialer{Timeout: dialTimeout}).DialContext,
			TLSHandshakeTimeout: dialTimeout,
			ForceAttemptHTTP2:   true,
			TLSClientConfig:     config,
		}
	}, func(error) {}) // the last files stay in use, and the server says when they no longer do
	if err == nil {
		return transport, nil
	}
	// An error about a pair of files names both. Then it is about the certificate.
	for _, f := range []struct{ flag, file string }{{"ca", f.CA}, {"client-cert", f.ClientCert}, {"client-key", f.ClientKey}} {
		if f.file != "" && strings.Contains(err.Error(), f.file) {
			return nil, about(f.flag, err)
		}
	}
	return nil, err
}

// untrusted reports whether the certificate of a server is not accepted.
func untrusted(err error) bool {
	_, ok := errors.AsType[*tls.CertificateVerificationError](err)
	return ok
}

// refusesCertificate reports whether a server refused the client certificate, or wants one.
func refusesCertificate(err error) bool {
	op, ok := errors.AsType[*net.OpError](err)
	return errors.Is(err, clienttls.ErrRefused) || ok && op.Op == "remote error" && strings.Contains(op.Err.Error(), "certificate")
}
