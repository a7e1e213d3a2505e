package bundle

import (
	"testing"
	"time"

	cron "github.com/netresearch/go-cron"
)

// counted counts how often a schedule is asked.
type counted struct {
	cron.Schedule
	calls int
}

func (c *counted) Next(t time.Time) time.Time {
	c.calls++
	return c.Schedule.Next(t)
}

// An expression is refused, or few steps find the last moment at which a window begins. That moment is not
// later than the one that was asked about, and a later window begins at another one.
func FuzzFreezeWindow(f *testing.F) {
	for _, at := range []string{"0 18 * * FRI", "* * * * *", "*/7 0-23/2 1,15 feb-NOV 7", "0 0 30 2 *", "0 0 29 2 *", "TZ=UTC * * * * *", "@every 1s", "H H * * *", "0 0 L * 5#3", "1-0 * * * *", "*/0 * * * *", "0 0 1 1 */7", "99999999999999999999 * * * *", "? ? ? ? ?", "-1 * * * *", "1--2 * * * *", "\x00 * * * *"} {
		for _, zone := range []string{"", "Europe/Berlin", "Pacific/Apia", "Local", "../../etc/passwd", "Etc/GMT+12", "posixrules"} {
			f.Add(at, zone, uint16(62*60), int64(1795802400))
		}
	}
	f.Fuzz(func(t *testing.T, at, zone string, minutes uint16, unix int64) {
		if err := checkCron(at); err != nil {
			return
		}
		loc, err := location(zone)
		if err != nil {
			return
		}
		s, err := parseCron(at)
		if err != nil {
			t.Fatal(err)
		}
		c := &counted{Schedule: s}
		moment := time.Unix(unix%(1<<33), 0)
		last := min(time.Duration(minutes)*time.Minute, maxFreezeFor)
		v := windows{schedule: c, zone: loc}
		begin, found := v.last(moment, last)
		if c.calls > 20 {
			t.Fatalf("%q: %d steps", at, c.calls)
		}
		if !found {
			return
		}
		if begin.After(moment) {
			t.Fatalf("%q begins at %v, after %v", at, begin, moment)
		}
		if again, found := v.last(begin, last); !found || !again.Equal(begin) {
			t.Fatalf("%q begins at %v, and just then at %v, %v", at, begin, again, found)
		}
		if _, _, _, err := (FreezeWindow{At: at, For: max(last, time.Minute), Zone: zone}).Holds(moment); err != nil {
			t.Fatal(err)
		}
	})
}
