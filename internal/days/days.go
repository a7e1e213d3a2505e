// Package days reads durations as people write them in flags, in the environment and in files: in Go's
// syntax, with days in front. There is one parser, so that every setting takes the same texts.
package days

import (
	"fmt"
	"math"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// Day is the unit d of a duration.
const Day = 24 * time.Hour

// durations matches every valid duration, also one that is too large.
var durations = regexp.MustCompile(`^([0-9]+d)?([0-9]+(ns|us|µs|ms|s|m|h))*$`)

// Parse reads a duration like 500ms, 90m, 12h, 7d or 1d12h. It is not negative.
func Parse(text string) (time.Duration, error) {
	days, rest, found := strings.Cut(text, "d")
	if !found {
		days, rest = "0", text
	} else if rest == "" {
		rest = "0"
	}
	n, err := strconv.ParseUint(days, 10, 64)
	d, err2 := time.ParseDuration(rest)
	signed := strings.ContainsAny(text, "+-")
	if durations.MatchString(text) && (err != nil || err2 != nil || n > uint64((math.MaxInt64-d)/Day)) {
		return 0, fmt.Errorf("%q is too large: a duration is at most 106751 days", text)
	}
	if err != nil || err2 != nil || signed || n > uint64((math.MaxInt64-d)/Day) {
		return 0, fmt.Errorf("%q is not a duration like 500ms, 90m, 12h, 7d or 1d12h", text)
	}
	return time.Duration(n)*Day + d, nil
}
