// Package recentlog keeps the newest warnings and errors of a process in memory, so that a bug report
// can contain them wherever the log is written to. Its memory is bounded.
package recentlog

import (
	"context"
	"log/slog"
	"slices"
	"sync"
)

const (
	maxLines = 200
	maxBytes = 4096 // of a line; the rest is cut off
)

// Handler passes lines on, and keeps the newest ones of level WARN and above as JSON.
type Handler struct {
	next slog.Handler
	text slog.Handler // writes into lines
	kept *lines
}

// lines are shared by a handler and those made from it by WithAttrs and WithGroup.
type lines struct {
	mu   sync.Mutex
	ring [][]byte // the oldest is at next once it is full
	next int
}

// Wrap returns a handler around another one. If that one is a Handler already, Wrap returns it.
func Wrap(next slog.Handler) *Handler {
	if h, ok := next.(*Handler); ok {
		return h
	}
	kept := &lines{}
	return &Handler{next, slog.NewJSONHandler(kept, &slog.HandlerOptions{Level: slog.LevelWarn}), kept}
}

// Lines returns the lines that are kept, the oldest first. Each ends with a line feed, and is JSON
// unless it was cut off.
func (h *Handler) Lines() [][]byte {
	h.kept.mu.Lock()
	defer h.kept.mu.Unlock()
	return slices.Concat(h.kept.ring[h.kept.next:], h.kept.ring[:h.kept.next])
}

// Write implements io.Writer for one line.
func (l *lines) Write(line []byte) (int, error) {
	kept := slices.Clone(line)
	if len(kept) > maxBytes {
		kept = append(kept[:maxBytes-1:maxBytes-1], '\n')
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.ring) < maxLines {
		l.ring = append(l.ring, kept)
	} else {
		l.ring[l.next] = kept
		l.next = (l.next + 1) % maxLines
	}
	return len(line), nil
}

// Enabled implements slog.Handler.
func (h *Handler) Enabled(ctx context.Context, l slog.Level) bool {
	return l >= slog.LevelWarn || h.next.Enabled(ctx, l)
}

// Handle implements slog.Handler.
func (h *Handler) Handle(ctx context.Context, r slog.Record) error {
	if r.Level >= slog.LevelWarn {
		_ = h.text.Handle(ctx, r.Clone()) // lines never fails
	}
	if !h.next.Enabled(ctx, r.Level) {
		return nil
	}
	return h.next.Handle(ctx, r)
}

// WithAttrs implements slog.Handler.
func (h *Handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &Handler{h.next.WithAttrs(attrs), h.text.WithAttrs(attrs), h.kept}
}

// WithGroup implements slog.Handler.
func (h *Handler) WithGroup(name string) slog.Handler {
	return &Handler{h.next.WithGroup(name), h.text.WithGroup(name), h.kept}
}
