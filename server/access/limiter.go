package access

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"
)

// ErrRateLimited is a call that exceeds the rate limit of its caller, see [Limiter.Refusal].
var ErrRateLimited = errors.New("this caller asks more than its rate limit")

// leastBurst is how many checks a caller may ask at once, however low its rate limit is: as many
// as one batch can have.
const leastBurst = 100

// maxBuckets bounds the callers whose buckets are kept.
const maxBuckets = 65_536

// A Limiter bounds how many checks each caller asks, with a token bucket for each caller. The
// zero value has no limit. Set PerSecond before the first call of Allow.
type Limiter struct {
	// PerSecond is how many checks one caller may ask each second; 0 means no limit.
	PerSecond float64

	buckets sync.Map // name of a caller → *rate.Limiter
	count   atomic.Int64
}

// Allow takes n tokens of the caller's bucket, and reports whether there were enough. Without
// enough it takes none.
func (l *Limiter) Allow(c Caller, n int) bool {
	if l.PerSecond <= 0 || n <= 0 {
		return true
	}
	b, ok := l.buckets.Load(c.Name)
	if !ok {
		// Callers with tokens are not bounded by the number of the API keys. Without their
		// buckets, all begin again with a full one.
		if l.count.Add(1) > maxBuckets {
			l.buckets.Clear()
			l.count.Store(0)
		}
		b, _ = l.buckets.LoadOrStore(c.Name, rate.NewLimiter(rate.Limit(l.PerSecond), l.burst()))
	}
	return b.(*rate.Limiter).AllowN(time.Now(), n)
}

// burst is how many checks a caller may ask at once.
func (l *Limiter) burst() int { return max(int(l.PerSecond), leastBurst) }

// Refusal returns the error of a call that [Limiter.Allow] refused. It is an [ErrRateLimited], and
// its text is for the caller.
func (l *Limiter) Refusal() error {
	return fmt.Errorf("%w: %v checks a second, and %d at once (--rate-limit); slow down", ErrRateLimited, l.PerSecond, l.burst())
}
