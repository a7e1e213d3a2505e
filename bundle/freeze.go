package bundle

import (
	"errors"
	"fmt"
	"regexp"
	"sort"
	"strings"
	"time"
	_ "time/tzdata" // servers without a zone database know the zones of bundle.yaml, too
	"unicode/utf8"

	cron "github.com/netresearch/go-cron"
	"go.yaml.in/yaml/v4"

	"github.com/cedarpost/cedarpost/internal/days"
)

// A FreezeWindow is a time that comes again and again, in which a bundle is not published. bundle.yaml has
// a list of them under freeze:
//
//	freeze:
//	  - at: 0 18 * * FRI
//	    for: 62h
//	    zone: Europe/Berlin
//	    reason: nobody is at work
type FreezeWindow struct {
	// At says when it begins, as crontab(5) does: minute, hour, day of the month, month, day of the week.
	// If both days are restricted, either of them will do.
	At string
	// For is how long it lasts, in whole minutes. Changes of the clocks do not change that.
	For time.Duration
	// Zone is the IANA time zone of At; "": UTC.
	Zone string
	// Reason is shown to those whose publish is refused.
	Reason string
	// KeptOf is the version that was taken back, and whose window a rollback keeps; 0: the bundle.yaml has it.
	KeptOf int64
}

// Limits of freeze windows.
const (
	maxFreezeWindows = 20
	maxFreezeAt      = 100 // bytes
	maxFreezeZone    = 64  // bytes
	maxFreezeReason  = 500 // bytes
	minFreezeFor     = time.Minute
	maxFreezeFor     = 90 * days.Day

	maxFreezeJoined = 10 // windows that follow each other without a break and whose common end is looked for
)

// cronParser reads expressions with five fields, without the extensions of the library.
var cronParser = cron.MustNewParser(cron.Minute | cron.Hour | cron.Dom | cron.Month | cron.Dow | cron.DowOrDom).
	WithMaxSearchYears(9) // from one leap day to the next there are up to eight years

var (
	cronField = regexp.MustCompile(`^[0-9A-Za-z*,/-]+$`)
	cronWord  = regexp.MustCompile(`[A-Za-z]+`)
	cronNames = regexp.MustCompile(`^(?i:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec|sun|mon|tue|wed|thu|fri|sat)$`)
	zoneName  = regexp.MustCompile(`^[A-Za-z0-9_+-]+(/[A-Za-z0-9_+-]+)*$`)
)

const cronHint = "five fields: minute, hour, day of the month, month, day of the week, such as 0 18 * * FRI"

// freezeWindows reads the windows.
func (y yamlFile) freezeWindows(n *yaml.Node) (list []FreezeWindow) {
	if n.Kind != yaml.SequenceNode {
		y.fail(n, "", "freeze must be a list, not %s", kindName(n))
		return nil
	}
	if len(n.Content) > maxFreezeWindows {
		y.fail(n, "", "freeze must have at most %d windows", maxFreezeWindows)
		return nil
	}
	for _, c := range n.Content {
		list = append(list, y.freezeWindow(c))
	}
	return list
}

func (y yamlFile) freezeWindow(n *yaml.Node) (w FreezeWindow) {
	before := len(*y.probs)
	y.each(n, "a window of freeze", func(k, v *yaml.Node) {
		switch k.Value {
		case "at":
			w.At = strings.Join(strings.Fields(y.str(v, "at")), " ")
			if err := checkCron(w.At); isText(v) && err != nil {
				y.fail(v, cronHint, "at: %v", err)
			}
		case "for":
			if w.For = y.duration(v, "for", minFreezeFor, maxFreezeFor); w.For%time.Minute != 0 {
				y.fail(v, "", "for must be in whole minutes")
			}
		case "zone":
			w.Zone = y.str(v, "zone")
			if _, err := location(w.Zone); isText(v) && (err != nil || w.Zone == "") {
				y.fail(v, "the name of an IANA time zone, such as Europe/Berlin", "zone: there is no time zone %.100q", w.Zone)
			}
		case "reason":
			if w.Reason = y.str(v, "reason"); len(w.Reason) > maxFreezeReason {
				y.fail(v, "", "reason must have at most %d bytes", maxFreezeReason)
			}
		default:
			y.unknown(k, "at", "for", "zone", "reason")
		}
	})
	if n.Kind == yaml.MappingNode && len(*y.probs) == before && (w.At == "" || w.For == 0) {
		y.fail(n, "", "a window of freeze needs at and for")
	}
	return w
}

// duration reads a duration such as 90m, 4h, 7d, 1d12h or 2w.
func (y yamlFile) duration(n *yaml.Node, what string, least, most time.Duration) time.Duration {
	if isText(n) {
		if d, err := days.Parse(n.Value); err == nil && d >= least && d <= most {
			return d
		}
	}
	y.fail(n, "", "%s must be a duration from %s to %s, such as 4h or 7d", what, DurationText(least), DurationText(most))
	return 0
}

// DurationText writes a duration in whole minutes, hours or days, such as 7d.
func DurationText(d time.Duration) string {
	for _, u := range []struct {
		unit time.Duration
		name string
	}{{days.Day, "d"}, {time.Hour, "h"}} {
		if d%u.unit == 0 {
			return fmt.Sprintf("%d%s", d/u.unit, u.name)
		}
	}
	return fmt.Sprintf("%dm", d/time.Minute)
}

// checkCron returns an error if nothing can begin by an expression.
func checkCron(text string) error {
	s, err := parseCron(text)
	if err != nil {
		return err
	}
	if s.Next(time.Date(2024, 1, 1, 0, 0, 0, 0, time.UTC)).IsZero() {
		return fmt.Errorf("%q never comes", text)
	}
	return nil
}

// parseCron reads an expression. It is evaluated in UTC.
func parseCron(text string) (cron.Schedule, error) {
	fields := strings.Fields(text)
	switch {
	case len(text) > maxFreezeAt:
		return nil, fmt.Errorf("an expression has at most %d bytes", maxFreezeAt)
	case len(fields) != 5:
		return nil, fmt.Errorf("%q does not have five fields", text)
	}
	for _, f := range fields {
		if !cronField.MatchString(f) {
			return nil, fmt.Errorf("%q is not a list of numbers, ranges and steps", f)
		}
		for _, word := range cronWord.FindAllString(f, -1) {
			if !cronNames.MatchString(word) {
				return nil, fmt.Errorf("%q is neither a month nor a day of the week", word)
			}
		}
	}
	s, err := cronParser.Parse(text)
	if err != nil {
		return nil, err
	}
	if spec, ok := s.(*cron.SpecSchedule); ok {
		spec.Location = time.UTC
		return spec, nil
	}
	return nil, errors.New("it is not a time of the day")
}

// location returns a time zone. That of the server is none: each server could have another one.
func location(zone string) (*time.Location, error) {
	if zone == "" {
		return time.UTC, nil
	}
	if len(zone) > maxFreezeZone || zone == "Local" || !zoneName.MatchString(zone) {
		return nil, errors.New("it is not the name of a time zone")
	}
	return time.LoadLocation(zone)
}

// Text describes the window in words: 0 18 * * FRI for 62h, Europe/Berlin (nobody is at work).
func (w FreezeWindow) Text() string {
	text := w.At + " for " + DurationText(w.For) + ", "
	if w.Zone == "" {
		text += "UTC"
	} else {
		text += w.Zone
	}
	if w.Reason != "" {
		text += " (" + strings.ToValidUTF8(w.Reason, string(utf8.RuneError)) + ")"
	}
	return text
}

// Holds reports whether a moment is in the window, and when the window ends, in its zone. If the next
// window begins before it ends, or just then, the end is that of the last one of a row. open says that
// there are more of them than are looked at, so that the end is a later one. An error means that the window
// cannot be understood, which [ReadRules] and the reading of a bundle find out first.
//
// The work is bounded, whatever the window is.
func (w FreezeWindow) Holds(at time.Time) (in bool, end time.Time, open bool, err error) {
	s, err := parseCron(w.At)
	if err != nil {
		return false, end, false, err
	}
	zone, err := location(w.Zone)
	if err != nil {
		return false, end, false, err
	}
	v := windows{schedule: s, zone: zone}
	begin, found := v.last(at, w.For)
	if end = begin.Add(w.For); !found || !at.Before(end) {
		return false, time.Time{}, false, nil
	}
	for range maxFreezeJoined {
		next, found := v.last(end, w.For)
		if !found || !next.Add(w.For).After(end) {
			return true, end.In(zone), false, nil
		}
		end = next.Add(w.For)
	}
	return true, end.In(zone), true, nil
}

// windows finds moments at which a window begins. The schedule is evaluated on the wall clock of the zone,
// written as if it was UTC, so that no change of the clocks can make it skip a day.
type windows struct {
	schedule cron.Schedule
	zone     *time.Location
}

// clockChange is more than any clock was ever changed by: Samoa left out a day.
const clockChange = 26 * time.Hour

// last returns the last begin that is not after a moment, and not more than a time before it.
func (v windows) last(at time.Time, within time.Duration) (begin time.Time, found bool) {
	_, offset := at.In(v.zone).Zone()
	wall := at.UTC().Add(time.Duration(offset) * time.Second).Truncate(time.Minute)
	from := wall.Add(-within - clockChange)
	// after is the first begin after the minute i. The later i, the later it is.
	after := func(i int) (time.Time, bool) {
		next := v.schedule.Next(from.Add(time.Duration(i) * time.Minute))
		if next.IsZero() {
			return next, false
		}
		moment := v.moment(next)
		return moment, !moment.After(at)
	}
	n := int((within + 2*clockChange) / time.Minute)
	i := sort.Search(n, func(i int) bool { _, ok := after(i); return !ok })
	if i == 0 {
		return time.Time{}, false
	}
	return after(i - 1)
}

// moment returns the first moment at which the clocks of the zone show a time. If they skip it, that is
// when they skip it.
func (v windows) moment(wall time.Time) time.Time {
	t := time.Date(wall.Year(), wall.Month(), wall.Day(), wall.Hour(), wall.Minute(), 0, 0, v.zone)
	began, ends := t.ZoneBounds()
	_, offset := t.Zone()
	shown := t.UTC().Add(time.Duration(offset) * time.Second)
	switch {
	case shown.After(wall) && !began.IsZero():
		return began
	case shown.Before(wall) && !ends.IsZero():
		return ends
	case began.IsZero():
		return t
	}
	_, before := began.Add(-time.Second).Zone()
	if first := wall.Add(-time.Duration(before) * time.Second); first.Before(began) {
		return first
	}
	return t
}
