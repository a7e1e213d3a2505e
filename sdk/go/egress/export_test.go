package egress

import (
	"net/http"
	"net/netip"
)

// PublicAddress reports whether a host that the operator did not name may have an address.
func PublicAddress(a netip.Addr) bool { return checkAddress(a, "", public) == nil }

// CheckRequest is what each request passes first.
func CheckRequest(c *Client, r *http.Request) error { return c.checkRequest(r) }
