package access

import (
	"errors"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// ErrRateLimited is the error of a call that is over the rate limit of its caller.
var ErrRateLimited = errors.New("this caller sends more than its rate limit; slow down")

// leastBurst is how many checks a caller may always ask at once.
const leastBurst = 100

// A Limiter bounds how much each caller asks, with a token bucket for each of them. The zero
// value has no limit.
type Limiter struct {
	// PerSecond is how many checks a second one caller may ask; 0 means no limit.
	PerSecond float64

	buckets sync.Map // Caller → *rate.Limiter; bounded by the number of live keys
}

// Allow takes n tokens of a caller, and reports whether there were so many.
func (l *Limiter) Allow(c Caller, n int) bool {
	if l.PerSecond <= 0 || n <= 0 {
		return true
	}
	b, ok := l.buckets.Load(c)
	if !ok {
		b, _ = l.buckets.LoadOrStore(c, rate.NewLimiter(rate.Limit(l.PerSecond), max(int(l.PerSecond), leastBurst)))
	}
	return b.(*rate.Limiter).AllowN(time.Now(), n)
}
