package main

import (
	"fmt"
	"math"
	"regexp"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
)

// moment is a time on the command line, absolute or relative to now.
type moment struct{ time.Time }

// UnmarshalText implements encoding.TextUnmarshaler.
func (m *moment) UnmarshalText(text []byte) (err error) {
	s := string(text)
	if m.Time, err = time.Parse(time.RFC3339, s); err == nil {
		return nil
	}
	var ago span
	if err := ago.UnmarshalText(text); err != nil {
		return fmt.Errorf("%q is neither a time like 2006-01-02T15:04:05Z nor a duration like 90m, 12h or 7d", text)
	}
	m.Time = time.Now().Add(-time.Duration(ago))
	return nil
}

// span is a duration in flags, the environment and the YAML file: in Go's syntax, with days in
// front.
type span time.Duration

// day is the unit d of a span.
const day = 24 * time.Hour

// durations matches every valid span, also one that is too large.
var durations = regexp.MustCompile(`^([0-9]+d)?([0-9]+(ns|us|µs|ms|s|m|h))*$`)

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *span) UnmarshalText(text []byte) error {
	days, rest, found := strings.Cut(string(text), "d")
	if !found {
		days, rest = "0", string(text)
	} else if rest == "" {
		rest = "0"
	}
	n, err := strconv.ParseUint(days, 10, 64)
	d, err2 := time.ParseDuration(rest)
	signed := strings.ContainsAny(string(text), "+-")
	if durations.Match(text) && (err != nil || err2 != nil || n > uint64((math.MaxInt64-d)/day)) {
		return fmt.Errorf("%q is too large: a duration is at most 106751 days", text)
	}
	if err != nil || err2 != nil || signed || n > uint64((math.MaxInt64-d)/day) {
		return fmt.Errorf("%q is not a duration like 500ms, 90m, 12h, 7d or 1d12h", text)
	}
	*s = span(time.Duration(n)*day + d)
	return nil
}

// String implements fmt.Stringer.
func (s span) String() string { return time.Duration(s).String() }

// timestamp returns nil if the moment is not given.
func (m moment) timestamp() *timestamppb.Timestamp {
	if m.IsZero() {
		return nil
	}
	return timestamppb.New(m.Time)
}
