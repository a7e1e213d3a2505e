// Package egress is the HTTP client for calls that a service makes to other services: key sets of
// token issuers, webhooks, collectors of telemetry. Whoever can choose the destination of such a
// call, by a parameter, a redirect or a DNS answer, could otherwise reach what only the service
// can reach (OWASP API7:2023, server-side request forgery).
package egress

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
)

// Config says which hosts a [Client] may call, and bounds its calls. A client of the zero value
// refuses every call.
type Config struct {
	// Hosts may be called while their addresses are public. Each is a host name or an IP address,
	// with a port or without one: "hooks.example.org", "hooks.example.org:8443", "[2001:db8::1]:443".
	// Without a port, only port 443 may be called. Names have no wildcards.
	Hosts []string
	// OperatorHosts may be called, too, and their addresses may be private (RFC 1918, RFC 4193) or
	// loopback. They are for hosts that an operator names in the configuration of a server. Never
	// put a name into it that came with a request. Metadata services of clouds, link-local,
	// multicast and reserved addresses are refused for these hosts, too.
	OperatorHosts []string

	// CAFile is a PEM file with certificate authorities that are trusted besides those of the
	// system.
	CAFile string
	// Proxy is the URL of a proxy that all calls by https go through. Empty: no proxy, whatever
	// the environment says. The proxy resolves the names of the hosts, so it has to refuse private
	// addresses. Its own address may be private.
	Proxy string

	// Timeout bounds a whole call, up to the last byte of its answer. 0: 10 s.
	Timeout time.Duration
	// MaxBytes bounds the body of an answer. 0: 1 MiB.
	MaxBytes int64

	// Resolver resolves the names of hosts. Nil: that of the system.
	Resolver *net.Resolver
}

const (
	defaultTimeout  = 10 * time.Second
	defaultMaxBytes = 1 << 20
	connectTimeout  = 5 * time.Second
	maxHeaderBytes  = 64 << 10
	maxRedirects    = 3
	maxConnections  = 16 // to one host
)

// A Client sends HTTP requests to the hosts of its [Config] and to no others. It is safe for
// concurrent use.
//
// It speaks https with TLS 1.2 or later, and http only to an operator's host at a loopback
// address. It checks the address of each connection after the name was resolved, so a name whose
// address changes between two look-ups gains nothing. It follows at most three redirects, all
// within one scheme, host and port. Its errors are a [RefusedError], or those of package net/http
// without the path and the query of the URL, which can hold secrets.
type Client struct {
	allowed  map[string]allowance // host:port → what its addresses may be
	resolver *net.Resolver
	maxBytes int64
	secure   *http.Transport // for https
	plain    *http.Transport // for http to loopback
	http     *http.Client
}

// New returns a client, or an error that names the part of the configuration that is not valid.
func New(config Config) (*Client, error) {
	c := &Client{
		allowed:  map[string]allowance{},
		resolver: cmp.Or(config.Resolver, net.DefaultResolver),
		maxBytes: cmp.Or(config.MaxBytes, defaultMaxBytes),
	}
	timeout := cmp.Or(config.Timeout, defaultTimeout)
	if timeout < 0 || c.maxBytes < 0 {
		return nil, errors.New("egress: Timeout and MaxBytes must not be negative")
	}
	for _, host := range config.Hosts {
		if err := c.allow(host, public); err != nil {
			return nil, err
		}
	}
	for _, host := range config.OperatorHosts {
		if err := c.allow(host, internal); err != nil {
			return nil, err
		}
	}
	roots, err := trusted(config.CAFile)
	if err != nil {
		return nil, err
	}
	c.secure = c.transport(roots, c.dial)
	c.plain = c.transport(roots, c.dialLoopback)
	if config.Proxy != "" {
		if err := c.useProxy(config.Proxy); err != nil {
			return nil, err
		}
	}
	c.http = &http.Client{Transport: roundTripper{c}, CheckRedirect: checkRedirect, Timeout: timeout}
	return c, nil
}

func (c *Client) allow(host string, a allowance) error {
	u := &url.URL{Scheme: "https", Host: host}
	if port := u.Port(); strings.HasSuffix(host, ":") || port != "" && !validPort(port) {
		return fmt.Errorf("egress: host %.100q: the port must be a number from 1 to 65535", host)
	}
	name, port, err := hostPort(u)
	if err != nil {
		return fmt.Errorf("egress: host %.100q: %w", host, err)
	}
	c.allowed[net.JoinHostPort(name, port)] = a
	return nil
}

// trusted returns the authorities of the system and those of a file, or nil for those of the
// system alone.
func trusted(file string) (*x509.CertPool, error) {
	if file == "" {
		return nil, nil
	}
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("egress: CA file: %w", err)
	}
	roots, err := x509.SystemCertPool()
	if err != nil {
		return nil, fmt.Errorf("egress: authorities of the system: %w", err)
	}
	if !roots.AppendCertsFromPEM(text) {
		return nil, fmt.Errorf("egress: CA file %s has no certificate in PEM form", file)
	}
	return roots, nil
}

type dialFunc func(ctx context.Context, network, address string) (net.Conn, error)

func (c *Client) transport(roots *x509.CertPool, dial dialFunc) *http.Transport {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetHTTP2(true)
	return &http.Transport{
		Proxy:                  nil, // not from the environment
		DialContext:            dial,
		TLSClientConfig:        &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots},
		TLSHandshakeTimeout:    connectTimeout,
		DisableCompression:     true, // so that MaxBytes bounds what is sent, too
		MaxIdleConnsPerHost:    2,
		MaxConnsPerHost:        maxConnections,
		IdleConnTimeout:        30 * time.Second,
		MaxResponseHeaderBytes: maxHeaderBytes,
		Protocols:              protocols,
	}
}

func (c *Client) useProxy(proxy string) error {
	u, err := url.Parse(proxy)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" {
		return errors.New("egress: the proxy must be a URL with http or https") // it can have a password
	}
	name, port, err := hostPort(u)
	if err != nil {
		return fmt.Errorf("egress: proxy: %w", err)
	}
	// The address of the proxy gets no allowance in c.allowed, so no request can name it as its host.
	toProxy := net.JoinHostPort(name, port)
	c.secure.DialContext = func(ctx context.Context, network, _ string) (net.Conn, error) {
		return c.connect(ctx, network, toProxy, name, internal)
	}
	c.secure.Proxy = http.ProxyURL(u)
	return nil
}

// HTTP returns the client as an [http.Client], for libraries that take one. All rules hold for it,
// too. Do not change it.
func (c *Client) HTTP() *http.Client { return c.http }

// Close closes idle connections.
func (c *Client) Close() {
	c.secure.CloseIdleConnections()
	c.plain.CloseIdleConnections()
}

// Do sends a request. The caller closes the body of the answer. A read of the body fails with a
// [RefusedError] if the body is too long.
func (c *Client) Do(r *http.Request) (*http.Response, error) {
	response, err := c.http.Do(r)
	if err != nil {
		return nil, plainError(r, err)
	}
	return response, nil
}

// plainError takes the URL out of an error of net/http, and names the rule of a timeout.
func plainError(r *http.Request, err error) error {
	if refused, ok := errors.AsType[*RefusedError](err); ok {
		return refused
	}
	if wrapped, ok := errors.AsType[*url.Error](err); ok {
		err = wrapped.Err
	}
	if timeout, ok := errors.AsType[net.Error](err); ok && timeout.Timeout() {
		return &RefusedError{Rule: RuleTime, Host: r.URL.Host, Detail: "the call took too long", cause: context.DeadlineExceeded}
	}
	return fmt.Errorf("egress: %s %s://%s: %w", r.Method, r.URL.Scheme, r.URL.Host, err)
}

// roundTripper checks each request, also those that a redirect asks for.
type roundTripper struct{ client *Client }

func (t roundTripper) RoundTrip(r *http.Request) (*http.Response, error) {
	c := t.client
	if err := c.checkRequest(r); err != nil {
		if r.Body != nil {
			_ = r.Body.Close() // as RoundTripper demands; the request was not sent
		}
		return nil, err
	}
	transport := c.secure
	if r.URL.Scheme == "http" {
		transport = c.plain
	}
	response, err := transport.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	host := r.URL.Host
	if response.ContentLength > c.maxBytes {
		response.Body.Close()
		return nil, tooLarge(host, c.maxBytes)
	}
	response.Body = &cappedBody{ReadCloser: response.Body, left: c.maxBytes, most: c.maxBytes, host: host}
	return response, nil
}

func checkRedirect(r *http.Request, via []*http.Request) error {
	host := r.URL.Host
	if len(via) > maxRedirects {
		return &RefusedError{Rule: RuleRedirect, Host: host, Detail: fmt.Sprintf("more than %d redirects", maxRedirects)}
	}
	from := via[0].URL
	nameFrom, portFrom, errFrom := hostPort(from)
	name, port, err := hostPort(r.URL)
	if errFrom != nil || err != nil || r.URL.Scheme != from.Scheme || name != nameFrom || port != portFrom {
		return &RefusedError{Rule: RuleRedirect, Host: from.Host, Detail: fmt.Sprintf("a redirect to %.100q, which is another scheme, host or port", r.URL.Scheme+"://"+host)}
	}
	return nil
}

// cappedBody ends with an error after so many bytes.
type cappedBody struct {
	io.ReadCloser
	left, most int64
	host       string
}

func (b *cappedBody) Read(p []byte) (int, error) {
	if b.left < 0 {
		return 0, tooLarge(b.host, b.most)
	}
	if int64(len(p)) > b.left+1 {
		p = p[:b.left+1] // one more byte shows that there is one
	}
	n, err := b.ReadCloser.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return n - 1, tooLarge(b.host, b.most)
	}
	return n, err
}

func tooLarge(host string, most int64) error {
	return &RefusedError{Rule: RuleSize, Host: host, Detail: fmt.Sprintf("an answer of more than %d bytes", most)}
}
