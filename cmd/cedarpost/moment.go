package main

import (
	"fmt"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cedarpost/cedarpost/internal/days"
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
const day = days.Day

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *span) UnmarshalText(text []byte) error {
	d, err := days.Parse(string(text))
	if err == nil {
		*s = span(d)
	}
	return err
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
