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
// zero value limits only callers with a rate of their own. Set PerSecond before the first call of
// Allow.
type Limiter struct {
	// PerSecond is how many checks a caller may ask each second, unless one of its grants has a rate;
	// 0 means no limit.
	PerSecond float64

	buckets sync.Map // name of a caller → *rate.Limiter
	count   atomic.Int64
}

// Allow takes n tokens of the bucket of the caller with these rights, and reports whether there
// were enough. Without enough it takes none.
func (l *Limiter) Allow(r *Rights, n int) bool {
	perSecond := l.of(r)
	if perSecond <= 0 || n <= 0 {
		return true
	}
	b, ok := l.buckets.Load(r.caller)
	if !ok {
		// Callers with tokens are not bounded by the number of the API keys. Without their
		// buckets, all begin again with a full one.
		if l.count.Add(1) > maxBuckets {
			l.buckets.Clear()
			l.count.Store(0)
		}
		b, _ = l.buckets.LoadOrStore(r.caller, rate.NewLimiter(rate.Limit(perSecond), burst(perSecond)))
	}
	bucket := b.(*rate.Limiter)
	if bucket.Limit() != rate.Limit(perSecond) { // a grant changed it
		bucket.SetLimit(rate.Limit(perSecond))
		bucket.SetBurst(burst(perSecond))
	}
	return bucket.AllowN(time.Now(), n)
}

// of returns the rate limit of a caller; 0 means none.
func (l *Limiter) of(r *Rights) float64 {
	if own := r.checksPerSecond(); own > 0 {
		return float64(own)
	}
	return l.PerSecond
}

// burst is how many checks a caller may ask at once.
func burst(perSecond float64) int { return max(int(perSecond), leastBurst) }

// Refusal returns the error of a call of the caller with these rights that [Limiter.Allow] refused. It
// is an [ErrRateLimited], and its text is for the caller.
func (l *Limiter) Refusal(r *Rights) error {
	perSecond, by := l.of(r), "--rate-limit"
	if r.checksPerSecond() > 0 {
		by = "checks_per_second of a grant"
	}
	return fmt.Errorf("%w: %v checks a second, and %d at once (%s); slow down", ErrRateLimited, perSecond, burst(perSecond), by)
}
