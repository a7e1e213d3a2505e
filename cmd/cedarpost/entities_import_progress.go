package main

import (
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

const (
	rateWindow   = 5 * time.Second
	liveInterval = 200 * time.Millisecond // between lines that are rewritten
	lineInterval = 5 * time.Second        // between lines that stay
)

// progress prints on stderr how far a long command is. On a terminal it rewrites one line,
// elsewhere it adds a line from time to time. A nil progress prints nothing.
type progress struct {
	c     *console
	last  time.Time // of the last line
	marks []mark    // of the last seconds
	width int       // of the line on the terminal, 0 if there is none
}

type mark struct {
	at time.Time
	n  int64
}

func newProgress(c *console) *progress { return &progress{c: c, last: time.Now()} }

// moved notes that n entities are sent, and how many bytes of all are read. all is 0 if it is not
// known.
func (p *progress) moved(n, read, all int64) {
	if p == nil {
		return
	}
	now := time.Now()
	p.marks = append(p.marks, mark{now, n})
	for len(p.marks) > 2 && now.Sub(p.marks[0].at) > rateWindow {
		p.marks = p.marks[1:]
	}
	interval := lineInterval
	if p.c.live {
		interval = liveInterval
	}
	if now.Sub(p.last) < interval {
		return
	}
	p.last = now
	line := entities(n) + " sent"
	if all > 0 {
		line += fmt.Sprintf(", %d %% of the file", min(100*read/all, 100))
	}
	first := p.marks[0]
	if span := now.Sub(first.at); span > 0 && n > first.n {
		line += fmt.Sprintf(", %s/s", thousands(int64(float64(n-first.n)/span.Seconds())))
	}
	if !p.c.live {
		fmt.Fprintln(p.c.err, line)
		return
	}
	width := utf8.RuneCountInString(line)
	fmt.Fprint(p.c.err, "\r"+line+strings.Repeat(" ", max(p.width-width, 0)))
	p.width = width
}

// clear removes the line from the terminal, so that other output can follow.
func (p *progress) clear() {
	if p == nil || p.width == 0 {
		return
	}
	fmt.Fprint(p.c.err, "\r"+strings.Repeat(" ", p.width)+"\r")
	p.width = 0
}

// note writes a line that stays. The rate starts from zero after it.
func (p *progress) note(format string, args ...any) {
	if p == nil {
		return
	}
	p.clear()
	p.marks = nil
	fmt.Fprintln(p.c.err, clean(fmt.Sprintf(format, args...)))
}

// thousands returns 1000000 as "1,000,000".
func thousands(n int64) string {
	s := strconv.FormatInt(n, 10)
	for i := len(s) - 3; i > 0 && s[i-1] != '-'; i -= 3 {
		s = s[:i] + "," + s[i:]
	}
	return s
}

// seconds returns "0.4 s" or "31 s".
func seconds(d time.Duration) string {
	if d < 10*time.Second {
		return fmt.Sprintf("%.1f s", d.Seconds())
	}
	return fmt.Sprintf("%.0f s", d.Seconds())
}
