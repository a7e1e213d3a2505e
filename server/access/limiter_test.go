package access

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// The error of a call over the limit says what the limit is.
func TestRefusalSaysTheRate(t *testing.T) {
	for rate, want := range map[float64]string{5: "5 checks a second, and 100 at once", 0.5: "0.5 checks a second, and 100 at once", 250: "250 checks a second, and 250 at once"} {
		if err := (&Limiter{PerSecond: rate}).Refusal(); !errors.Is(err, ErrRateLimited) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v", rate, err)
		}
	}
}

func TestRateLimitIsPerCaller(t *testing.T) {
	l := &Limiter{PerSecond: 100}
	taken, began := 0, time.Now()
	for range 1000 {
		if l.Allow(Caller{Name: "a"}, 1) {
			taken++
		}
	}
	if most := 101 + int(100*time.Since(began).Seconds()); taken < 100 || taken > most {
		t.Errorf("a burst of 1000 took %d tokens of %d", taken, most)
	}
	if !l.Allow(Caller{Name: "b"}, 1) {
		t.Error("one caller's load refuses another")
	}
	if l.Allow(Caller{Name: "b"}, 101) {
		t.Error("a batch larger than the bucket was let in")
	}
	if unlimited := (&Limiter{}); !unlimited.Allow(Caller{Name: "a"}, 1_000_000) {
		t.Error("no limit should be no limit")
	}
}
