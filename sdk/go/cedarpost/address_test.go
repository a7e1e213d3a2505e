package cedarpost_test

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/fstest"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/cedarposttest"
	"github.com/cedarpost/cedarpost/server/servertest"
	"pgregory.net/rapid"
)

const addressSchema = `namespace Net { entity U; @source("request") entity Host { ip: ipaddr };
	action Enter appliesTo { principal: [U], resource: [U], context: { ip: ipaddr } };
	action Reach appliesTo { principal: [U], resource: [Host] }; }`

const addressPolicies = `
@id("office") permit (principal, action == Net::Action::"Enter", resource) when { context.ip.isInRange(ip("10.0.0.0/8")) };
@id("hosts") permit (principal, action == Net::Action::"Reach", resource) when { resource.ip.isInRange(ip("10.0.0.0/8")) };`

// An address as a Go server gets it from its listener. The test kit and a real server
// must give the same answer about it.
func TestAddresses(t *testing.T) {
	kit := cedarposttest.NewFS(t, fstest.MapFS{
		"bundle.yaml": {Data: []byte("name: net")}, "schema.cedarschema": {Data: []byte(addressSchema)}, "p.cedar": {Data: []byte(addressPolicies)},
	})
	served := servertest.New(t)
	served.MustApply("net", "schema.cedarschema", addressSchema, "p.cedar", addressPolicies)
	clients := map[string]*cedarpost.Client{"test service": kit.Client(), "server": dial(t, served)}

	mapped := netip.MustParsePrefix("::ffff:10.1.0.0/112")
	for _, c := range []struct {
		name string
		ip   any
		want string // allow, deny or a part of the error
	}{
		{"IPv4", netip.MustParseAddr("10.1.2.3"), "allow"},
		{"IPv4 of a listener on both", netip.MustParseAddr("::ffff:10.1.2.3"), "allow"},
		{"the same in hexadecimal", netip.MustParseAddr("::ffff:a01:203"), "allow"},
		{"another IPv4 of a listener on both", netip.MustParseAddr("::ffff:11.1.2.3"), "deny"},
		{"IPv6", netip.MustParseAddr("2001:db8::1"), "deny"},
		{"IPv6 that ends like IPv4", netip.MustParseAddr("::10.1.2.3"), "deny"},
		{"a range", netip.MustParsePrefix("10.1.0.0/16"), "allow"},
		{"a range that is mapped", mapped, "allow"},
		{"a wider range that is mapped", netip.MustParsePrefix("::ffff:0:0/96"), "deny"},
		{"a range around what is mapped", netip.PrefixFrom(mapped.Addr(), 95), "a range of IPv6 around IPv4"},
		{"an address with a zone", netip.MustParseAddr("fe80::1%eth0"), "has a zone"},
		{"a mapped address with a zone", netip.MustParseAddr("::ffff:10.1.2.3%eth0"), "has a zone"},
		{"no address", netip.Addr{}, "is no address"},
		{"no range", netip.PrefixFrom(netip.MustParseAddr("10.0.0.0"), 33), "not a valid netip.Prefix"},
		{"the bytes of an address", net.ParseIP("10.1.2.3"), "a net.IP cannot be sent"},
		{"an address with a port", netip.MustParseAddrPort("10.1.2.3:80"), "a netip.AddrPort cannot be sent"},
		{"text", "10.1.2.3", "allow"},
		{"text of a mapped address, which Cedar does not read", "::ffff:10.1.2.3", "is not a ipaddr"},
		{"text of IPv6, as Cedar reads it", "::ffff:a01:203", "deny"},
	} {
		u, host := cedarpost.UID("Net::U", "u"), cedarpost.UID("Net::Host", "h")
		for where, client := range clients {
			for action, check := range map[string]cedarpost.Check{
				"Enter": {Resource: u, Context: map[string]any{"ip": c.ip}},
				"Reach": {Resource: host, Entities: []cedarpost.Entity{{UID: host, Attrs: map[string]any{"ip": c.ip}}}},
			} {
				check.Principal, check.Action, check.FailOpen = u, cedarpost.UID("Net::Action", action), "never for a bad question"
				r, err := client.Authorize(t.Context(), check)
				got := "deny"
				switch {
				case errors.Is(err, cedarpost.ErrInvalid):
					got = err.Error()
				case err != nil:
					t.Fatal(err)
				case r.Allowed():
					got = "allow"
				}
				if !strings.Contains(got, c.want) || r.FailedOpen() {
					t.Errorf("%s, %s, %s: got %s, want %s", where, action, c.name, got, c.want)
				}
			}
		}
	}
}

// An IPv4 address or range in any form is the same question, with the same key in the
// cache, and is in the same ranges as in Go.
func TestMappedAddressesAreIPv4(t *testing.T) {
	client := cedarposttest.NewFS(t, fstest.MapFS{
		"bundle.yaml": {Data: []byte("name: net")}, "schema.cedarschema": {Data: []byte(addressSchema)}, "p.cedar": {Data: []byte(addressPolicies)},
	}).Client(func(c *cedarpost.Config) { c.CacheBytes = 0 })
	office := netip.MustParsePrefix("10.0.0.0/8")
	ask := func(t *rapid.T, ip any) bool {
		r, err := client.Authorize(t.Context(), cedarpost.Check{
			Principal: cedarpost.UID("Net::U", "u"), Action: cedarpost.UID("Net::Action", "Enter"), Resource: cedarpost.UID("Net::U", "u"),
			Context: map[string]any{"ip": ip},
		})
		if err != nil {
			t.Fatalf("%v: %v", ip, err)
		}
		return r.Allowed()
	}
	rapid.Check(t, func(t *rapid.T) {
		four := netip.AddrFrom4([4]byte{rapid.SampledFrom([]byte{9, 10, 11}).Draw(t, "first"), rapid.Byte().Draw(t, "b"), rapid.Byte().Draw(t, "c"), rapid.Byte().Draw(t, "d")})
		mapped := netip.AddrFrom16(four.As16())
		bits := rapid.IntRange(0, 32).Draw(t, "bits")
		if got := ask(t, mapped); got != office.Contains(four) || ask(t, four) != got {
			t.Errorf("%s is allowed: %v", mapped, got)
		}
		if got := ask(t, netip.PrefixFrom(mapped, 96+bits)); got != ask(t, netip.PrefixFrom(four, bits)) || got != (office.Contains(four) && bits >= 8) {
			t.Errorf("%s/%d is allowed: %v", mapped, 96+bits, got)
		}
	})
}
