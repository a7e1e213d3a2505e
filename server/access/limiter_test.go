package access

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/store"
)

// callerWith returns the rights of a caller whose grants have these rates.
func callerWith(name string, rates ...int32) *Rights {
	var grants []store.Grant
	for _, n := range rates {
		grants = append(grants, store.Grant{Caller: name, Role: Enforcer, Bundle: "shop", ChecksPerSecond: n})
	}
	return NewRights(name, grants, nil, time.Now())
}

// The error of a call over the limit says what the limit is, and where it comes from.
func TestRefusalSaysTheRate(t *testing.T) {
	for rate, want := range map[float64]string{5: "5 checks a second, and 100 at once (--rate-limit)", 0.5: "0.5 checks a second, and 100 at once", 250: "250 checks a second, and 250 at once"} {
		if err := (&Limiter{PerSecond: rate}).Refusal(callerWith("a")); !errors.Is(err, ErrRateLimited) || !strings.Contains(err.Error(), want) {
			t.Errorf("%v: %v", rate, err)
		}
	}
	if err := (&Limiter{PerSecond: 5}).Refusal(callerWith("a", 300)); !strings.Contains(err.Error(), "300 checks a second, and 300 at once (checks_per_second of a grant)") {
		t.Error(err)
	}
}

func TestRateLimitIsPerCaller(t *testing.T) {
	l := &Limiter{PerSecond: 100}
	taken, began := 0, time.Now()
	for range 1000 {
		if l.Allow(callerWith("a"), 1) {
			taken++
		}
	}
	if most := 101 + int(100*time.Since(began).Seconds()); taken < 100 || taken > most {
		t.Errorf("a burst of 1000 took %d tokens of %d", taken, most)
	}
	if !l.Allow(callerWith("b"), 1) {
		t.Error("one caller's load refuses another")
	}
	if l.Allow(callerWith("b"), 101) {
		t.Error("a batch larger than the bucket was let in")
	}
	if unlimited := (&Limiter{}); !unlimited.Allow(callerWith("a"), 1_000_000) {
		t.Error("no limit should be no limit")
	}
}

// The largest rate of a caller's live grants counts in place of that of the server, larger or
// smaller, and from the next call after a change of the grants.
func TestRateOfAGrant(t *testing.T) {
	const more = 5_000
	for _, c := range []struct {
		name   string
		server float64
		grants []int32
		ask    int
		may    bool
	}{
		{"a larger one", 100, []int32{0, 200, more}, more, true},
		{"beyond it", 100, []int32{0, 200, more}, more + 1, false},
		{"a smaller one", more, []int32{150}, 151, false},
		{"within it", more, []int32{150}, 150, true},
		{"without a rate of the server", 0, []int32{150}, 151, false},
		{"none", 200, []int32{0}, 200, true},
	} {
		if got := (&Limiter{PerSecond: c.server}).Allow(callerWith("a", c.grants...), c.ask); got != c.may {
			t.Errorf("%s: %v", c.name, got)
		}
	}
	ended := time.Now().Add(-time.Second)
	l := &Limiter{PerSecond: 100}
	if l.Allow(NewRights("a", []store.Grant{{Role: Enforcer, ChecksPerSecond: more, ExpiresAt: &ended}}, nil, time.Now()), 101) {
		t.Error("the rate of a grant that has ended counts")
	}
	began := time.Now()
	l.Allow(callerWith("a", 1), 100)
	if l.Allow(callerWith("a", 1), 1) && time.Since(began) < time.Second { // after a second there is one again
		t.Error("a smaller rate does not count at once")
	}
	for deadline := time.Now().Add(time.Minute); !l.Allow(callerWith("a", 1_000_000), 1000); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("a larger rate does not fill the bucket")
		}
	}
}
