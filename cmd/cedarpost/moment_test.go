package main

import (
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"
)

// A flag takes times as people write them, and each form in which a command prints one.
func TestMoments(t *testing.T) {
	now := time.Now()
	noon := time.Date(2026, 11, 27, 12, 5, 6, 0, time.Local)
	for text, want := range map[string]time.Time{
		"2026-11-27T12:05:06Z":           time.Date(2026, 11, 27, 12, 5, 6, 0, time.UTC),
		"2026-11-27T12:05:06+01:00":      time.Date(2026, 11, 27, 11, 5, 6, 0, time.UTC),
		"2026-11-27T12:05:06.789Z":       time.Date(2026, 11, 27, 12, 5, 6, 789e6, time.UTC),
		"2026-11-27":                     time.Date(2026, 11, 27, 0, 0, 0, 0, time.Local),
		"2026-11-27T12:05:06":            noon,
		"2026-11-27 12:05:06":            noon,
		"2026-11-27 12:05":               noon.Truncate(time.Minute),
		localTime(timestamppb.New(noon)): noon,
		moment{noon.Add(5)}.exact():      noon.Add(5),
	} {
		var m moment
		if err := m.UnmarshalText([]byte(text)); err != nil || !m.Equal(want) {
			t.Errorf("%s: %v, %v, want %v", text, m, err, want)
		}
	}
	for text, want := range map[string]string{"13:00": "13:00:00", "13:00:01": "13:00:01"} { // of today
		var m moment
		if err := m.UnmarshalText([]byte(text)); err != nil || m.Format(time.TimeOnly) != want || m.Sub(now).Abs() > 24*time.Hour {
			t.Errorf("%s: %v, %v", text, m, err)
		}
	}
	for text, ago := range map[string]time.Duration{"90m": 90 * time.Minute, "7d": 7 * day, "2w": 14 * day, "1w1d2h": 8*day + 2*time.Hour, "0s": 0} {
		var m moment
		if err := m.UnmarshalText([]byte(text)); err != nil || now.Add(-ago).Sub(m.Time).Abs() > time.Hour {
			t.Errorf("%s: %v, %v", text, m, err)
		}
	}
	for _, text := range []string{"", "yesterday", "25:00", "2026-02-30", "-1w", "w", "1w2w", "1d1w", "15251w", "99999999999999999999w", "2026-11-27T12:05:06X"} {
		var m moment
		if err := m.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q is %v", text, m)
		}
	}
}
