package egress

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"code.dny.dev/ssrf"
)

// Rule names what a [Client] refuses.
type Rule string

// The rules.
const (
	RuleURL         Rule = "url"          // https, and http to an operator's loopback host; no user name in the URL; the Host header names the host of the URL
	RuleHost        Rule = "host"         // only hosts and ports of the configuration
	RuleAddress     Rule = "address"      // only public addresses, or those that an operator's host may have
	RuleMetadata    Rule = "metadata"     // never the metadata service of a cloud
	RuleRedirect    Rule = "redirect"     // only within one scheme, host and port, and few
	RuleSize        Rule = "size"         // of an answer's body
	RuleTime        Rule = "time"         // of a whole call
	RuleStatus      Rule = "status"       // an answer that is to be decoded has status 200
	RuleContentType Rule = "content type" // of an answer that is to be decoded
	RuleDepth       Rule = "depth"        // of nested JSON
	RuleShape       Rule = "shape"        // of JSON: one value that fits the declared type, without duplicate names
)

// A RefusedError says which rule refused a call or its answer. It has no part of the answer's
// body, and of the URL only the host.
type RefusedError struct {
	// Rule is the rule.
	Rule Rule
	// Host is the host of the URL, with its port if the URL has one.
	Host string
	// Detail says what was refused.
	Detail string

	cause error
}

// Unwrap returns [context.DeadlineExceeded] for [RuleTime], else nil.
func (e *RefusedError) Unwrap() error { return e.cause }

// Error returns the rule, the host and what was refused.
func (e *RefusedError) Error() string {
	return fmt.Sprintf("egress: call to %.200q refused by the rule %q: %s", e.Host, string(e.Rule), e.Detail)
}

// allowance says which addresses a host may have.
type allowance int

const (
	public   allowance = 1 + iota
	internal           // public, private or loopback
)

// hostPort returns the host and the port of a URL in the one form that allowed hosts have: lower
// case, without a final dot, IP addresses as package netip writes them, IPv4-mapped IPv6
// addresses as IPv4.
func hostPort(u *url.URL) (host, port string, err error) {
	host = strings.TrimSuffix(strings.ToLower(u.Hostname()), ".")
	if addr, notAddr := netip.ParseAddr(host); notAddr == nil {
		if addr.Zone() != "" {
			return "", "", errors.New("an address with a zone")
		}
		host = addr.Unmap().String()
	} else if !validName(host) {
		return "", "", errors.New("not a host name and not an IP address")
	}
	port = u.Port()
	switch {
	case port == "" && u.Scheme == "http":
		port = "80"
	case port == "":
		port = "443"
	case !validPort(port):
		return "", "", errors.New("not a port")
	}
	return host, port, nil
}

func validPort(port string) bool {
	n, err := strconv.ParseUint(port, 10, 16)
	return err == nil && n > 0 && port == strconv.FormatUint(n, 10)
}

// validName reports whether a text is a host name (RFC 1123, section 2.1) or has underscores, as
// names in container networks do. Its last label is not a number: resolvers of some systems read
// 127.1 or 0x7f.1 as an address.
func validName(name string) bool {
	if len(name) == 0 || len(name) > 253 {
		return false
	}
	labels := strings.Split(name, ".")
	for _, label := range labels {
		if len(label) == 0 || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return false
		}
		for _, r := range label {
			if !(r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-' || r == '_') {
				return false
			}
		}
	}
	last := labels[len(labels)-1]
	return last[0] < '0' || last[0] > '9'
}

func (c *Client) checkRequest(r *http.Request) error {
	u := r.URL
	refuse := func(rule Rule, detail string) error { return &RefusedError{Rule: rule, Host: u.Host, Detail: detail} }
	switch {
	case u.Scheme != "https" && u.Scheme != "http":
		return refuse(RuleURL, fmt.Sprintf("the scheme %.20q", u.Scheme))
	case u.User != nil:
		return refuse(RuleURL, "a URL with a user name or password")
	case u.Opaque != "":
		return refuse(RuleURL, "a URL without //")
	}
	name, port, err := hostPort(u)
	if err != nil {
		return refuse(RuleHost, err.Error())
	}
	if r.Host != "" {
		host, hostPort, err := hostPort(&url.URL{Scheme: u.Scheme, Host: r.Host})
		if err != nil || host != name || hostPort != port {
			return refuse(RuleURL, "a Host header with another host")
		}
	}
	allowed := c.allowed[net.JoinHostPort(name, port)]
	if allowed == 0 {
		return refuse(RuleHost, "not a configured host, or not its configured port")
	}
	if u.Scheme == "http" && allowed != internal {
		return refuse(RuleURL, "http, which is for an operator's host at a loopback address")
	}
	if addr, notAddr := netip.ParseAddr(name); notAddr == nil { // also if a proxy connects
		return checkAddress(addr, u.Host, allowed)
	}
	return nil
}

// dial connects to an allowed host, for https.
func (c *Client) dial(ctx context.Context, network, address string) (net.Conn, error) {
	name, allowed, err := c.lookUp(address)
	if err != nil {
		return nil, err
	}
	return c.connect(ctx, network, address, name, allowed)
}

// dialLoopback connects to an operator's host at a loopback address, for http.
func (c *Client) dialLoopback(ctx context.Context, network, address string) (net.Conn, error) {
	name, allowed, err := c.lookUp(address)
	if err != nil {
		return nil, err
	}
	return c.connect(ctx, network, address, name, allowed, func(a netip.Addr) error {
		if !a.IsLoopback() {
			return &RefusedError{Rule: RuleURL, Host: name, Detail: fmt.Sprintf("http to %s, which is not a loopback address", a)}
		}
		return nil
	})
}

func (c *Client) lookUp(address string) (name string, _ allowance, _ error) {
	name, port, err := hostPort(&url.URL{Scheme: "https", Host: address})
	if err != nil {
		return "", 0, &RefusedError{Rule: RuleHost, Host: address, Detail: err.Error()}
	}
	return name, c.allowed[net.JoinHostPort(name, port)], nil
}

// connect resolves a name and connects. Control runs for each socket, after the name was resolved
// and before the connection is made, so what it checks is the address that is connected to.
func (c *Client) connect(ctx context.Context, network, address, name string, allowed allowance, further ...func(netip.Addr) error) (net.Conn, error) {
	d := net.Dialer{Timeout: connectTimeout, Resolver: c.resolver, Control: func(_, resolved string, _ syscall.RawConn) error {
		ap, err := netip.ParseAddrPort(resolved)
		if err != nil {
			return &RefusedError{Rule: RuleAddress, Host: name, Detail: "not an IP address"}
		}
		addr := ap.Addr().Unmap()
		if err := checkAddress(addr, name, allowed); err != nil {
			return err
		}
		for _, check := range further {
			if err := check(addr); err != nil {
				return err
			}
		}
		return nil
	}}
	return d.DialContext(ctx, network, address)
}

// metadata has the addresses at which clouds give credentials to whoever asks from a machine.
var metadata = []netip.Prefix{
	netip.MustParsePrefix("169.254.0.0/16"),     // 169.254.169.254 of most clouds, 169.254.170.2 of Amazon ECS, and others
	netip.MustParsePrefix("100.100.100.200/32"), // Alibaba Cloud
	netip.MustParsePrefix("168.63.129.16/32"),   // Azure; a public address
	netip.MustParsePrefix("192.0.0.192/32"),     // Oracle Cloud
	netip.MustParsePrefix("fd00:ec2::/32"),      // AWS: ::254, and ::23 of EKS
	netip.MustParsePrefix("fd20:ce::254/128"),   // Google Cloud
	netip.MustParsePrefix("fd00:42::42/128"),    // Scaleway
}

// notPublic knows the special-purpose addresses of IANA: shared (RFC 6598), link-local, multicast,
// documentation, NAT64 (RFC 6052), 6to4 (RFC 3056), Teredo (RFC 4380) and so on.
var notPublic = ssrf.New(ssrf.WithAnyPort(), ssrf.WithAnyNetwork())

// checkAddress checks the address of a host. It may be an IPv4-mapped IPv6 address.
func checkAddress(addr netip.Addr, host string, allowed allowance) error {
	addr = addr.Unmap()
	refuse := func(rule Rule, what string) error {
		return &RefusedError{Rule: rule, Host: host, Detail: fmt.Sprintf("the address %s, %s", addr, what)}
	}
	if slices.ContainsFunc(metadata, func(p netip.Prefix) bool { return p.Contains(addr.WithZone("")) }) {
		return refuse(RuleMetadata, "where clouds have their metadata service")
	}
	if allowed == internal && (addr.IsPrivate() || addr.IsLoopback()) {
		return nil
	}
	if allowed == 0 || notPublic.SafeAddr(addr.WithZone("")) != nil {
		return refuse(RuleAddress, "which is not public")
	}
	return nil
}
