package access

import (
	"net/netip"
	"testing"
	"time"
)

// One address does not use up the failures of another one, each second begins anew, and however
// many addresses there are, a bounded number of them is kept.
func TestFailuresAreCountedByAddress(t *testing.T) {
	var f Failures
	now := time.Unix(1000, 0)
	a, b := netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("192.0.2.2")
	many := func(a netip.Addr) (allowed int) {
		for range 10 * failuresPerSecond {
			if f.Allow(a, now) {
				allowed++
			}
		}
		return allowed
	}
	for range 3 {
		if x, y := many(a), many(b); x != failuresPerSecond || y != failuresPerSecond {
			t.Errorf("%d and %d failures are allowed, want %d", x, y, failuresPerSecond)
		}
		now = now.Add(time.Second)
	}
	for i := range 20_000 {
		f.Allow(netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)}), now)
	}
	if n := len(f.counts); n > maxAddresses+1 {
		t.Errorf("%d addresses are kept", n)
	}
}
