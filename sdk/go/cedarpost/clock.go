package cedarpost

import "time"

// instant is a moment on two clocks, in nanoseconds: the monotonic one, which stops
// while a machine is suspended, and the wall clock, which can be set back.
type instant struct{ mono, wall int64 }

var base = time.Now()

// realClock reads both clocks.
func realClock() instant {
	now := time.Now()
	return instant{int64(now.Sub(base)), now.UnixNano()}
}

// since returns how long ago t was, by the clock that shows the longer time. An answer
// whose age is overestimated costs one more question; one whose age is underestimated could
// be used for too long.
func (now instant) since(t instant) time.Duration {
	return time.Duration(max(now.mono-t.mono, now.wall-t.wall))
}
