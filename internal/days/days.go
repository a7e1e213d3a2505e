// Package days reads durations as people write them in flags, in the environment and in files: in Go's
// syntax, with weeks and days in front. There is one parser, so that every setting takes the same texts.
package days

import (
	"fmt"
	"math"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// Day is the unit d of a duration, and Week the unit w.
const (
	Day  = 24 * time.Hour
	Week = 7 * Day
)

// durations matches every valid duration, also one that is too large.
var durations = regexp.MustCompile(`^([0-9]+w)?([0-9]+d)?([0-9]+(ns|us|µs|ms|s|m|h))*$`)

// Parse reads a duration like 500ms, 90m, 12h, 7d, 1d12h or 2w. It is not negative.
func Parse(text string) (time.Duration, error) {
	rest, sum := text, time.Duration(0)
	tooLarge, wrong := false, strings.ContainsAny(text, "+-")
	for _, unit := range []struct {
		name string
		of   time.Duration
	}{{"w", Week}, {"d", Day}} {
		number, after, found := strings.Cut(rest, unit.name)
		if !found {
			continue
		}
		n, err := strconv.ParseUint(number, 10, 64)
		tooLarge = tooLarge || err != nil || n > uint64((math.MaxInt64-sum)/unit.of)
		if !tooLarge {
			sum += time.Duration(n) * unit.of
		}
		rest = after
		if rest == "" {
			rest = "0"
		}
	}
	d, err := time.ParseDuration(rest)
	wrong = wrong || err != nil
	tooLarge = tooLarge || d > math.MaxInt64-sum
	switch {
	case (tooLarge || wrong) && durations.MatchString(text):
		return 0, fmt.Errorf("%q is too large: a duration is at most 106751 days", text)
	case tooLarge || wrong:
		return 0, fmt.Errorf("%q is not a duration like 500ms, 90m, 12h, 7d, 1d12h or 2w", text)
	}
	return sum + d, nil
}
