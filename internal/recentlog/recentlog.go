// Package recentlog keeps the newest warnings and errors of a process in memory, so that a bug report
// can contain them wherever the log is written to. Its memory is bounded, and lines that anybody can cause
// do not push out the others.
package recentlog

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"log/slog"
	"slices"
	"strings"
	"sync"
)

const (
	maxLines = 100  // of level ERROR and above, and as many below
	maxSame  = 20   // of those with the same message
	maxBytes = 4096 // of a line; the rest is cut off
)

// Handler passes lines on, and keeps the newest ones of level WARN and above as JSON.
type Handler struct {
	next slog.Handler
	text slog.Handler // writes into lines
	kept *lines
}

// lines are shared by a handler and those made from it by WithAttrs and WithGroup, or around it.
type lines struct {
	mu     sync.Mutex
	number int // of the newest line
	errors share
	others share
}

// share are lines of some levels, the oldest first.
type share []kept

type kept struct {
	number  int
	message string
	line    []byte
}

// add adds a line, in the place of the oldest one with the same message if there are many of these, else
// of the oldest one if the share is full.
func (s *share) add(k kept) {
	same, first := 0, 0
	for i, other := range slices.Backward(*s) {
		if other.message == k.message {
			same, first = same+1, i
		}
	}
	switch {
	case same >= maxSame:
		*s = slices.Delete(*s, first, first+1)
	case len(*s) >= maxLines:
		*s = slices.Delete(*s, 0, 1)
	}
	*s = append(*s, k)
}

// Wrap returns a handler around another one. If that one is a Handler already, Wrap returns it.
func Wrap(next slog.Handler) *Handler {
	if h, ok := next.(*Handler); ok {
		return h
	}
	return around(next, &lines{})
}

func around(next slog.Handler, kept *lines) *Handler {
	return &Handler{next, slog.NewJSONHandler(kept, &slog.HandlerOptions{Level: slog.LevelWarn}), kept}
}

// Around returns a handler around another one that keeps its lines together with those of h.
func (h *Handler) Around(next slog.Handler) *Handler { return around(next, h.kept) }

// Lines returns the lines that are kept, the oldest first. Each ends with a line feed, and is JSON
// unless it was cut off.
func (h *Handler) Lines() (out [][]byte) {
	h.kept.mu.Lock()
	list := slices.Concat(h.kept.errors, h.kept.others)
	h.kept.mu.Unlock()
	slices.SortFunc(list, func(a, b kept) int { return cmp.Compare(a.number, b.number) })
	for _, k := range list {
		out = append(out, k.line)
	}
	return out
}

// Write implements io.Writer for one line.
func (l *lines) Write(line []byte) (int, error) {
	level, message := headOf(line)
	text := slices.Clone(line)
	if len(text) > maxBytes {
		text = slices.Clip(append(text[:maxBytes-1:maxBytes-1], '\n'))
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.number++
	k := kept{l.number, message, text}
	if strings.HasPrefix(level, "ERROR") {
		l.errors.add(k)
	} else {
		l.others.add(k)
	}
	return len(line), nil
}

// headOf returns the level and the message of a line of slog.JSONHandler, which begins with them.
func headOf(line []byte) (level, message string) {
	in := json.NewDecoder(bytes.NewReader(line))
	_, _ = in.Token() // the brace
	for {
		key, err := in.Token()
		if err != nil {
			return level, message
		}
		value, err := in.Token()
		text, ok := value.(string)
		if err != nil || !ok {
			return level, message
		}
		switch key {
		case slog.LevelKey:
			level = text
		case slog.MessageKey:
			return level, text[:min(len(text), maxBytes)]
		}
	}
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
