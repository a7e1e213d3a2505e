package telemetry

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"
)

// A pipe that nobody reads delays nobody who logs. What does not fit into the queue is counted, the rest
// is written in order when the reader goes on, and closing does not wait for the reader for ever.
func TestReaderOfTheLogStops(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	l := NewLines(w)
	n := 0
	for ; l.lost.Load() == 0; n++ {
		if n > 10_000 {
			t.Fatal("nothing is lost, so nothing bounds the queue")
		}
		if _, err := fmt.Fprintf(l, "%d %s\n", n, strings.Repeat("x", 1000)); err != nil {
			t.Fatal(err)
		}
	}
	if n*1000 < maxLineBytes {
		t.Errorf("lines are lost after %d", n)
	}
	l.Close() // the reader still does not read
	if _, err := l.Write([]byte("late\n")); err != nil || l.lost.Load() != 2 {
		t.Errorf("%v, %v lost", err, l.lost.Load())
	}
	in := bufio.NewScanner(r)
	for i := range n - 1 {
		if !in.Scan() || !strings.HasPrefix(in.Text(), fmt.Sprint(i, " xxx")) {
			t.Fatalf("line %d: %.20s", i, in.Text())
		}
	}
	<-l.ended
}

// What is queued at the end is written, and a write that fails is counted.
func TestLinesAreFlushed(t *testing.T) {
	var out strings.Builder
	l := NewLines(&out)
	for i := range 100 {
		_, _ = fmt.Fprintln(l, i)
	}
	l.Close()
	l.Close()
	if got := strings.Count(out.String(), "\n"); got != 100 || !strings.HasPrefix(out.String(), "0\n1\n") {
		t.Errorf("%d lines", got)
	}
	r, w := io.Pipe()
	_ = r.Close()
	l = NewLines(w)
	_, _ = l.Write([]byte("x\n"))
	l.Close()
	if n := l.lost.Load(); n != 1 {
		t.Errorf("%v lost", n)
	}
}
