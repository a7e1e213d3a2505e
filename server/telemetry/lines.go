package telemetry

import (
	"bytes"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	maxLineBytes = 1 << 20     // of the lines that wait for their reader
	flushTimeout = time.Second // how long [Lines.Close] waits for the reader
)

// Lines writes log lines in a goroutine of its own, so that a reader of the log that is slow, or that
// has stopped to read, delays nobody who logs. It counts the lines that do not fit into its queue, and
// those that cannot be written because nobody is left to read them. It is safe for concurrent use.
type Lines struct {
	w     io.Writer
	lost  atomic.Int64
	ended chan struct{} // the goroutine closes it

	mu     sync.Mutex
	queue  [][]byte
	bytes  int           // of the lines in the queue and of those being written
	wake   chan struct{} // has a value when the queue has a line
	closed bool          // and so is wake
}

// NewLines returns a writer of lines to w. Its caller closes it.
func NewLines(w io.Writer) *Lines {
	l := &Lines{w: w, ended: make(chan struct{}), wake: make(chan struct{}, 1)}
	go l.run()
	return l
}

// Write implements io.Writer. It never waits for the reader, and never fails.
func (l *Lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || l.bytes+len(p) > maxLineBytes {
		l.lost.Add(1)
		return len(p), nil
	}
	l.queue = append(l.queue, bytes.Clone(p))
	l.bytes += len(p)
	select {
	case l.wake <- struct{}{}:
	default:
	}
	return len(p), nil
}

func (l *Lines) run() {
	defer close(l.ended)
	for range l.wake {
		l.writeQueued()
	}
	l.writeQueued()
}

// writeQueued writes lines until the queue is empty.
func (l *Lines) writeQueued() {
	for {
		l.mu.Lock()
		list := l.queue
		l.queue = nil
		l.mu.Unlock()
		if len(list) == 0 {
			return
		}
		for _, line := range list {
			if _, err := l.w.Write(line); err != nil {
				l.lost.Add(1)
			}
			l.mu.Lock()
			l.bytes -= len(line)
			l.mu.Unlock()
		}
	}
}

// Close writes what is queued, for at most a second. Lines that come later are lost.
func (l *Lines) Close() {
	l.mu.Lock()
	if !l.closed {
		l.closed = true
		close(l.wake)
	}
	l.mu.Unlock()
	select {
	case <-l.ended:
	case <-time.After(flushTimeout):
	}
}

// Lost returns the metric of the lines that are lost.
func (l *Lines) Lost() prometheus.Collector {
	return prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "cedarpost_log_lines_lost_total",
		Help: "Log lines that could not be written to stderr, because its reader is gone or does not read, or its disk is full."}, func() float64 { return float64(l.lost.Load()) })
}
