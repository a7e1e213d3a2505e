package main

import (
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cedarpost/cedarpost/internal/days"
)

// timeForm is the form in which commands print times, in the time zone of this machine. Flags accept it.
const timeForm = time.RFC3339

// localTime returns a time as commands print it.
func localTime(t *timestamppb.Timestamp) string { return t.AsTime().Local().Format(timeForm) }

// moment is a time on the command line, absolute or relative to now.
type moment struct{ time.Time }

// localForms are the forms of times that mean the time zone of this machine. A time without a date is of
// today.
var localForms = []string{"2006-01-02T15:04:05", time.DateTime, "2006-01-02T15:04", "2006-01-02 15:04", time.DateOnly}

// UnmarshalText implements encoding.TextUnmarshaler.
func (m *moment) UnmarshalText(text []byte) (err error) {
	s := string(text)
	if m.Time, err = time.Parse(time.RFC3339, s); err == nil {
		return nil
	}
	for _, form := range localForms {
		if m.Time, err = time.ParseInLocation(form, s, time.Local); err == nil {
			return nil
		}
	}
	for _, form := range []string{"15:04", time.TimeOnly} {
		if clock, err := time.Parse(form, s); err == nil {
			y, month, d := time.Now().Date()
			m.Time = time.Date(y, month, d, clock.Hour(), clock.Minute(), clock.Second(), 0, time.Local)
			return nil
		}
	}
	var ago span
	if err := ago.UnmarshalText(text); err != nil {
		return fmt.Errorf("%q is neither a time like 2006-01-02T15:04:05Z, 2006-01-02 or 15:04, nor a duration like 90m, 12h, 7d or 2w", text)
	}
	m.Time = time.Now().Add(-time.Duration(ago))
	return nil
}

// end is when something ends, on the command line: a time that is given itself, as a date, or as a
// duration from now.
type end struct{ time.Time }

// UnmarshalText implements encoding.TextUnmarshaler. The error names every text that is no time, or
// a time that is not in the future.
func (e *end) UnmarshalText(text []byte) error {
	s, now := string(text), time.Now()
	at, err := time.Parse(time.RFC3339, s)
	if err != nil {
		at, err = time.ParseInLocation(time.DateOnly, s, time.Local)
	}
	if err != nil {
		var in span
		if in.UnmarshalText(text) != nil {
			return fmt.Errorf("%q is neither a time like 2006-01-02T15:04:05Z, nor a date like 2006-01-02, nor a duration like 12h or 90d", text)
		}
		at = now.Add(time.Duration(in))
	}
	if !at.After(now) {
		return fmt.Errorf("%q is not in the future; leave it out for no end", text)
	}
	e.Time = at
	return nil
}

// timestamp returns nil if no end is given.
func (e end) timestamp() *timestamppb.Timestamp { return moment(e).timestamp() }

// span is a duration in flags, the environment and the YAML file: in Go's syntax, with weeks and
// days in front.
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

// String implements fmt.Stringer. It returns the shortest form with days, such as 90d or 1d12h.
func (s span) String() string {
	days, rest := time.Duration(s)/day, (time.Duration(s) % day).String()
	if strings.HasSuffix(rest, "m0s") {
		rest = strings.TrimSuffix(rest, "0s")
	}
	if strings.HasSuffix(rest, "h0m") {
		rest = strings.TrimSuffix(rest, "0m")
	}
	switch {
	case days == 0:
		return rest
	case rest == "0s":
		return fmt.Sprintf("%dd", days)
	}
	return fmt.Sprintf("%dd%s", days, rest)
}

// exact returns the moment with all its digits, or "" if it is not given.
func (m moment) exact() string {
	if m.IsZero() {
		return ""
	}
	return m.Format(time.RFC3339Nano)
}

// timestamp returns nil if the moment is not given.
func (m moment) timestamp() *timestamppb.Timestamp {
	if m.IsZero() {
		return nil
	}
	return timestamppb.New(m.Time)
}
