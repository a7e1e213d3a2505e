package cedarpost

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect/v2"
	"pgregory.net/rapid"
)

// In an outage, checks of any number fail open for FailOpenTime. Then they fail closed
// for the rest of the outage, and for a while after it.
func TestFailOpenTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		f := failOpenTime{most: 10 * time.Minute, log: slog.New(slog.NewTextHandler(&log, nil))}
		began, last, n := time.Now(), time.Duration(0), 0
		for ; time.Since(began) < 3*time.Hour; time.Sleep(100 * time.Millisecond) {
			if f.allow(realClock()) {
				n++
				last = time.Since(began)
			}
		}
		// The bucket fills while it empties: 10 minutes, and a sixth of that, and so
		// on.
		if last < 11*time.Minute || last > 13*time.Minute || n != int(last/(100*time.Millisecond))+1 {
			t.Errorf("let %d through, the last after %v", n, last)
		}
		time.Sleep(time.Minute)
		if !f.allow(realClock()) {
			t.Error("closed after a minute without trouble")
		}
		if got := log.String(); strings.Count(got, "fail closed") != 1 || strings.Count(got, "fail open again") != 1 {
			t.Error(got)
		}
	})
}

// For any times of checks, they fail open in no more seconds of an hour than can be
// saved and added in that hour.
func TestFailOpenTimeIsBounded(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		most := time.Duration(rapid.Int64Range(int64(failOpenSlot), int64(failOpenWindow)).Draw(t, "most"))
		f := failOpenTime{most: most, log: slog.New(slog.DiscardHandler)}
		var now instant
		var slots []int64
		for range rapid.IntRange(1, 3000).Draw(t, "checks") {
			now.mono += int64(rapid.OneOf(rapid.Just(time.Second), rapid.SampledFrom([]time.Duration{time.Millisecond, 5 * time.Second, time.Minute})).Draw(t, "wait"))
			if f.allow(now) && (len(slots) == 0 || slots[len(slots)-1] != f.slot) {
				slots = append(slots, f.slot)
			} else if most == failOpenWindow && !f.open {
				t.Fatal("an hour of each hour is closed")
			}
		}
		for i := range slots {
			n := 0
			for _, s := range slots[i:] {
				if time.Duration(s-slots[i]) < failOpenWindow {
					n++
				}
			}
			if bound := 2*int(most/time.Second) + 2; n > bound {
				t.Fatalf("%d seconds of an hour, with %v", n, most)
			}
		}
	})
}

// The client counts checks that it does not let through, and the error says why.
func TestFailOpenTimeOfAClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, err := New(Config{Transports: []connect.Transport{nowhere}, CacheBytes: -1, FailOpenTime: time.Minute, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			t.Fatal(err)
		}
		open := hitCheck
		open.FailOpen = "reads may go on"
		through, refused := 0, 0
		for range 200 {
			r, err := c.failed(t.Context(), t.Context(), &open, connect.NewError(connect.CodeUnavailable, "away"))
			switch {
			case r.FailedOpen():
				through++
			case errors.Is(err, ErrUnavailable) && strings.Contains(err.Error(), "FailOpenTime"):
				refused++
			default:
				t.Fatal(err)
			}
			time.Sleep(time.Second)
		}
		st := c.Stats()
		if through < 60 || through > 62 || st.FailedOpen != int64(through) || st.FailOpenRefused != int64(refused) || st.Errors != int64(refused) {
			t.Errorf("%d through, %d refused; %+v", through, refused, st)
		}
		over, cancel := context.WithCancel(t.Context())
		cancel()
		_ = c.Close(over)
	})
	for _, d := range []time.Duration{-1, time.Millisecond, time.Hour + 1} {
		if _, err := New(Config{FailOpenTime: d}); err == nil || !strings.Contains(err.Error(), "FailOpenTime") {
			t.Errorf("%v: %v", d, err)
		}
	}
}
