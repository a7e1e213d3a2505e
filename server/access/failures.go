package access

import (
	"fmt"
	"net/netip"
	"sync"
	"time"
)

// ErrTooManyFailures is the error of a call whose address has sent too many calls without a
// valid key. Its text is for the caller.
var ErrTooManyFailures = fmt.Errorf("this address sends more than %d calls a second without a valid API key; slow down", failuresPerSecond)

const (
	failuresPerSecond = 50   // of one address
	maxAddresses      = 4096 // that are counted apart in one second
)

// Failures counts, by address, the calls of each second whose caller is not authenticated. The
// zero value is ready to use.
//
// A call with a valid key is never refused because of others: a proxy may send the calls of
// honest callers and of strangers from one address.
type Failures struct {
	mu     sync.Mutex
	second int64
	counts map[netip.Addr]int
}

// Allow counts a failure, and reports whether its address has had no more than it may in this
// second.
func (f *Failures) Allow(a netip.Addr, now time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s := now.Unix(); s != f.second || f.counts == nil {
		f.second, f.counts = s, map[netip.Addr]int{}
	}
	if _, known := f.counts[a]; !known && len(f.counts) >= maxAddresses {
		a = netip.Addr{} // all others together
	}
	f.counts[a]++
	return f.counts[a] <= failuresPerSecond
}
