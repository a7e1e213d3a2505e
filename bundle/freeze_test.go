package bundle_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/bundle"
)

func TestFreezeWindows(t *testing.T) {
	const weekend, berlin = "0 18 * * FRI", "Europe/Berlin"
	for _, c := range []struct {
		what, at  string
		hours     int
		zone      string
		moment    string
		in        bool
		end       string
		neverEnds bool
	}{
		{"before it begins", weekend, 62, berlin, "2026-11-27T17:59:59+01:00", false, "", false},
		{"when it begins", weekend, 62, berlin, "2026-11-27T18:00:00+01:00", true, "2026-11-30T08:00:00+01:00", false},
		{"the moment is given in another zone", weekend, 62, berlin, "2026-11-29T23:00:00-08:00", false, "", false},
		{"just before it ends", weekend, 62, berlin, "2026-11-30T07:59:59+01:00", true, "2026-11-30T08:00:00+01:00", false},
		{"when it ends", weekend, 62, berlin, "2026-11-30T08:00:00+01:00", false, "", false},
		{"in UTC", weekend, 62, "", "2026-11-27T18:30:00+01:00", false, "", false},
		{"two that overlap end together", "0 0 * * 6,0", 30, "", "2026-11-28T01:00:00Z", true, "2026-11-30T06:00:00Z", false},
		{"two that follow each other end together", "0 0 * * 6,0", 24, "", "2026-11-28T01:00:00Z", true, "2026-11-30T00:00:00Z", false},
		{"each minute", "* * * * *", 2160, "", "2026-11-28T01:02:00Z", true, "2029-08-14T01:02:00Z", true},
		{"either day will do", "0 0 13 * FRI", 24, "", "2026-11-20T12:00:00Z", true, "2026-11-21T00:00:00Z", false},
		{"a leap day", "0 0 29 2 *", 24, "", "2028-02-29T12:00:00Z", true, "2028-03-01T00:00:00Z", false},
		{"a leap day after eight years", "0 0 29 FEB *", 24, "", "2104-02-29T12:00:00Z", true, "2104-03-01T00:00:00Z", false},
		// The clocks of Berlin skip from 2:00 to 3:00 on March 29, 2026, and go from 3:00 back to 2:00 on October 25.
		{"a begin that the clocks skip is when they skip it", "30 2 * * *", 1, berlin, "2026-03-29T03:00:00+02:00", true, "2026-03-29T04:00:00+02:00", false},
		{"before the clocks skip", "30 2 * * *", 1, berlin, "2026-03-29T01:59:59+01:00", false, "", false},
		{"four hours stay four hours", "0 0 * * *", 4, berlin, "2026-03-29T04:59:59+02:00", true, "2026-03-29T05:00:00+02:00", false},
		{"four hours are over", "0 0 * * *", 4, berlin, "2026-03-29T05:00:00+02:00", false, "", false},
		{"the first of two times that the clocks show", "30 2 * * *", 1, berlin, "2026-10-25T02:30:00+02:00", true, "2026-10-25T02:30:00+01:00", false},
		{"the second one is after it", "30 2 * * *", 1, berlin, "2026-10-25T02:30:00+01:00", false, "", false},
		{"half an hour is skipped", "15 2 * * *", 1, "Australia/Lord_Howe", "2026-10-04T02:45:00+11:00", true, "2026-10-04T03:30:00+11:00", false},
		{"midnight is skipped", "0 0 * * *", 1, "Africa/Cairo", "2026-04-24T01:30:00+03:00", true, "2026-04-24T02:00:00+03:00", false},
		{"a day is skipped", "0 12 30 12 *", 1, "Pacific/Apia", "2011-12-31T00:30:00+14:00", true, "2011-12-31T01:00:00+14:00", false},
	} {
		at, err := time.Parse(time.RFC3339, c.moment)
		if err != nil {
			t.Fatal(err)
		}
		w := bundle.FreezeWindow{At: c.at, For: time.Duration(c.hours) * time.Hour, Zone: c.zone}
		in, end, open, err := w.Holds(at)
		got := ""
		if in {
			got = end.Format(time.RFC3339)
		}
		if err != nil || in != c.in || got != c.end || open != c.neverEnds {
			t.Errorf("%s: %v, end %q, open %v, %v; want %v, %q", c.what, in, got, open, err, c.in, c.end)
		}
	}
	for _, w := range []bundle.FreezeWindow{{At: "1 2 3 4", For: time.Hour}, {At: weekend, For: time.Hour, Zone: "../etc/passwd"}} {
		if _, _, _, err := w.Holds(time.Now()); err == nil {
			t.Errorf("%+v: no error", w)
		}
	}
	if got, want := (bundle.FreezeWindow{At: weekend, For: 48 * time.Hour, Zone: berlin, Reason: "nobody is at work"}).Text(), "0 18 * * FRI for 2d, Europe/Berlin (nobody is at work)"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// cronField is a field of an expression with the numbers that it stands for.
type cronField struct {
	text    string
	numbers []int // nil: all
}

func drawField(rt *rapid.T, name string, least, most int) cronField {
	switch rapid.IntRange(0, 5).Draw(rt, name) {
	case 0, 1, 2: // more often, so that windows hold
		return cronField{text: "*"}
	case 3:
		from := rapid.IntRange(least, most-1).Draw(rt, "from")
		to := rapid.IntRange(from+1, most).Draw(rt, "to")
		step := rapid.IntRange(1, to-from).Draw(rt, "step")
		f := cronField{text: fmt.Sprintf("%d-%d/%d", from, to, step)}
		for n := from; n <= to; n += step {
			f.numbers = append(f.numbers, n)
		}
		return f
	default:
		f := cronField{numbers: rapid.SliceOfNDistinct(rapid.IntRange(least, most), 1, 4, rapid.ID[int]).Draw(rt, "list")}
		var texts []string
		for _, n := range f.numbers {
			texts = append(texts, fmt.Sprint(n))
		}
		f.text = strings.Join(texts, ",")
		return f
	}
}

func (f cronField) has(n int) bool { return f.numbers == nil || slices.Contains(f.numbers, n) }

// A window holds at a moment if it begins at one of the minutes before it, says a search through all of them
// that knows nothing of the parser.
func TestFreezeWindowsBySearch(t *testing.T) {
	zones := []string{"", "Europe/Berlin", "Asia/Kathmandu", "America/St_Johns", "Pacific/Kiritimati"}
	held := 0
	rapid.Check(t, func(rt *rapid.T) {
		minute, hour, day, month, weekday := drawField(rt, "minute", 0, 59), drawField(rt, "hour", 0, 23), drawField(rt, "day", 1, 31), drawField(rt, "month", 1, 12), drawField(rt, "weekday", 0, 6)
		w := bundle.FreezeWindow{
			At: strings.Join([]string{minute.text, hour.text, day.text, month.text, weekday.text}, " "), Zone: rapid.SampledFrom(zones).Draw(rt, "zone"),
			For: time.Duration(rapid.IntRange(1, 1200).Draw(rt, "minutes")) * time.Minute,
		}
		zone, err := time.LoadLocation(w.Zone)
		if err != nil {
			rt.Fatal(err)
		}
		at := time.Date(2026, 1, 1, 0, 0, rapid.IntRange(0, 2*366*86400).Draw(rt, "second"), 0, time.UTC).In(zone)
		if began, ends := at.ZoneBounds(); at.Sub(began) < 24*time.Hour || !ends.IsZero() && ends.Sub(at) < 24*time.Hour {
			return // a change of the clocks is near; TestFreezeWindows is about that
		}
		want := false
		for m := at.Truncate(time.Minute); m.After(at.Add(-w.For)); m = m.Add(-time.Minute) {
			date := day.has(m.Day()) && weekday.has(int(m.Weekday()))
			if day.numbers != nil && weekday.numbers != nil { // crontab(5): either
				date = day.has(m.Day()) || weekday.has(int(m.Weekday()))
			}
			want = want || minute.has(m.Minute()) && hour.has(m.Hour()) && date && month.has(int(m.Month()))
		}
		in, end, _, err := w.Holds(at)
		if err != nil || in != want || in && !end.After(at) {
			rt.Fatalf("%s at %s: %v until %s, %v; want %v", w.Text(), at, in, end, err, want)
		}
		if in {
			held++
		}
	})
	t.Logf("in a window: %d", held)
}
