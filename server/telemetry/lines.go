package telemetry

import (
	"io"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
)

// Lines writes log lines, and counts those that cannot be written because nobody is left to read them.
type Lines struct {
	w    io.Writer
	lost atomic.Int64
}

// NewLines returns a writer of lines to w.
func NewLines(w io.Writer) *Lines { return &Lines{w: w} }

// Write implements io.Writer.
func (l *Lines) Write(p []byte) (int, error) {
	n, err := l.w.Write(p)
	if err != nil {
		l.lost.Add(1)
	}
	return n, err
}

// Lost returns the metric of the lines that are lost.
func (l *Lines) Lost() prometheus.Collector {
	return prometheus.NewCounterFunc(prometheus.CounterOpts{Name: "cedarpost_log_lines_lost_total",
		Help: "Log lines that could not be written to stderr, because its reader is gone or its disk is full."}, func() float64 { return float64(l.lost.Load()) })
}
