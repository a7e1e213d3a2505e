package decisionlog

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"pgregory.net/rapid"
)

// setClock is a clock that the test sets.
type setClock struct {
	wall    time.Time
	running time.Duration
}

func (c *setClock) pass(d time.Duration) { c.wall, c.running = c.wall.Add(d), c.running+d }

func idsOf(c *setClock, log *slog.Logger) (*ids, *[]time.Duration) {
	var steps []time.Duration
	g := newIDs(log, func(by time.Duration) { steps = append(steps, by) })
	g.clock = func() (time.Time, time.Duration) { return c.wall, c.running }
	return g, &steps
}

// If the clock is set back by two hours, the times of records follow it. They do not stand still.
func TestClockSetBack(t *testing.T) {
	var logged bytes.Buffer
	c := &setClock{wall: time.Date(2026, 3, 4, 12, 0, 0, 0, time.UTC)}
	g, steps := idsOf(c, slog.New(slog.NewTextHandler(&logged, nil)))
	if _, _, err := g.next(); err != nil {
		t.Fatal(err)
	}
	c.pass(time.Second)
	c.wall = c.wall.Add(-2 * time.Hour)
	for range 3 {
		id, at, err := g.next()
		if err != nil || !at.Equal(c.wall) || !time.Unix(id.Time().UnixTime()).Truncate(time.Millisecond).Equal(c.wall) {
			t.Errorf("%v at %v, want %v, %v", id, at, c.wall, err)
		}
		c.pass(time.Minute)
	}
	if fmt.Sprint(*steps) != "[-2h0m0s]" || strings.Count(logged.String(), "was set back") != 1 {
		t.Errorf("%v\n%s", *steps, &logged)
	}
	// A step forward is reported before the next id.
	c.wall = c.wall.AddDate(0, 0, 12)
	g.checkClock()
	g.checkClock()
	if fmt.Sprint(*steps) != "[-2h0m0s 288h0m0s]" || strings.Count(logged.String(), "was set forward") != 1 {
		t.Errorf("%v\n%s", *steps, &logged)
	}
}

// Ids are unique and have the time of the clock, also when the clock is set. They are in order
// unless the clock is set back by more than clockTolerance.
func TestIDsFollowTheClock(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := &setClock{wall: time.Date(2026, 3, 4, 12, 0, 0, 0, time.UTC)}
		g, _ := idsOf(c, nil)
		seen := map[uuid.UUID]bool{}
		var last uuid.UUID
		var lastAt time.Time
		for range rapid.IntRange(1, 60).Draw(t, "ids") {
			c.pass(time.Duration(rapid.Int64Range(0, int64(3*time.Millisecond)).Draw(t, "passes")))
			if rapid.IntRange(0, 4).Draw(t, "set") == 0 {
				c.wall = c.wall.Add(time.Duration(rapid.Int64Range(-int64(5*time.Second), int64(5*time.Second)).Draw(t, "by")))
			}
			id, at, err := g.next()
			if err != nil || id.Version() != 7 || id.Variant() != uuid.RFC4122 || seen[id] {
				t.Fatal(id, err)
			}
			seen[id] = true
			if got := time.UnixMilli(int64(id[0])<<40 | int64(id[1])<<32 | int64(id[2])<<24 | int64(id[3])<<16 | int64(id[4])<<8 | int64(id[5])); !got.Equal(at) {
				t.Fatalf("%v has time %v, not %v", id, got, at)
			}
			off := at.Sub(c.wall)
			if off > clockTolerance+time.Millisecond || off < -time.Millisecond {
				t.Fatalf("at %v, the clock says %v", at, c.wall)
			}
			back := lastAt.Sub(c.wall.Truncate(time.Millisecond))
			if bytes.Compare(id[:8], last[:8]) <= 0 && back <= clockTolerance {
				t.Fatalf("%v after %v, which is %v ahead of the clock", id, last, back)
			}
			last, lastAt = id, at
		}
	})
}
