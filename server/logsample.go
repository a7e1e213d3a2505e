package server

import (
	"cmp"
	"context"
	"log"
	"log/slog"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"time"
)

// How many lines a message may have. In each interval, lines with the same attributes are
// written once and then counted.
const (
	sampleInterval = 10 * time.Second
	sampleKeys     = 256 // sets of attributes that are counted apart
	sampleLines    = 20  // lines that are written at once
	sampleSums     = 10  // lines with a count at the end of the interval, and one for all others
)

// sampler is a slog.Handler for lines that callers, or a lost database, can cause with every
// call. They must not fill the disk, and those of one caller must not hide those of another
// one. So the first line of a message with the same values of sampledBy is written at once, and
// the next ones are counted and written as one line at the end of the interval. Lines below
// WARN are passed on.
type sampler struct {
	next slog.Handler
	seen *sampled
}

// sampledBy are the attributes by which lines are told apart. Others, such as the port of the
// peer, differ from line to line.
var sampledBy = [...]string{"procedure", "code", "caller", "address", "reason"}

type (
	sampleKey struct {
		level   slog.Level
		message string
		values  [len(sampledBy)]string
	}
	sample struct {
		count int64      // lines that are not written yet
		err   slog.Value // of the newest one
	}
	// budget is what is left of an interval for one message.
	lineBudget struct{ lines, sums int }
)

// sampled is the state that a sampler shares with those made from it by WithAttrs.
type sampled struct {
	mu      sync.Mutex
	lines   map[sampleKey]*sample
	budgets map[string]*lineBudget
}

func newSampler(next slog.Handler) *sampler {
	return &sampler{next, &sampled{lines: map[sampleKey]*sample{}, budgets: map[string]*lineBudget{}}}
}

// Enabled implements slog.Handler.
func (s *sampler) Enabled(ctx context.Context, l slog.Level) bool { return s.next.Enabled(ctx, l) }

// WithAttrs implements slog.Handler.
func (s *sampler) WithAttrs(attrs []slog.Attr) slog.Handler {
	return &sampler{s.next.WithAttrs(attrs), s.seen}
}

// WithGroup implements slog.Handler.
func (s *sampler) WithGroup(name string) slog.Handler {
	return &sampler{s.next.WithGroup(name), s.seen}
}

// Handle implements slog.Handler.
func (s *sampler) Handle(ctx context.Context, r slog.Record) error {
	if r.Level < slog.LevelWarn {
		return s.next.Handle(ctx, r)
	}
	key, err := sampleKey{level: r.Level, message: r.Message}, slog.Value{}
	r.Attrs(func(a slog.Attr) bool {
		if i := slices.Index(sampledBy[:], a.Key); i >= 0 {
			key.values[i] = a.Value.String()
		} else if a.Key == "err" || a.Key == "cause" { // the cause comes last, and says more
			err = a.Value
		}
		return true
	})
	if s.seen.count(key, err) {
		return nil
	}
	return s.next.Handle(ctx, r)
}

// count counts a line, or returns false if it is to be written now.
func (s *sampled) count(key sampleKey, err slog.Value) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := s.budgets[key.message]
	if b == nil {
		b = &lineBudget{sampleLines, sampleSums}
		s.budgets[key.message] = b
	}
	line := s.lines[key]
	if line == nil && len(s.lines) >= sampleKeys {
		key.values = [len(sampledBy)]string{} // the line for all others
		line = s.lines[key]
	}
	first := line == nil
	if first {
		line = &sample{}
		s.lines[key] = line
	}
	if first && b.lines > 0 {
		b.lines--
		return false
	}
	line.count++
	line.err = err
	return true
}

// sum writes what was counted in an interval, the most frequent lines first, and begins the
// next one.
func (s *sampler) sum() {
	type entry struct {
		sampleKey
		sample
	}
	s.seen.mu.Lock()
	var due []entry
	for key, line := range s.seen.lines {
		if line.count == 0 {
			delete(s.seen.lines, key) // the next one is written at once
			continue
		}
		due = append(due, entry{key, *line})
		line.count = 0
	}
	budgets := s.seen.budgets
	s.seen.budgets = map[string]*lineBudget{}
	s.seen.mu.Unlock()

	slices.SortFunc(due, func(a, b entry) int {
		return cmp.Or(cmp.Compare(b.count, a.count), cmp.Compare(a.message, b.message), slices.Compare(a.values[:], b.values[:]))
	})
	others := map[string]*entry{}
	for _, e := range due {
		if b := budgets[e.message]; b != nil && b.sums > 0 {
			b.sums--
			s.write(e.level, e.message, e.count, e.values, e.err)
			continue
		}
		o := others[e.message]
		if o == nil {
			o = &entry{sampleKey: sampleKey{level: e.level, message: e.message}}
			others[e.message] = o
		}
		o.count += e.count
		o.level = max(o.level, e.level)
	}
	for _, message := range slices.Sorted(maps.Keys(others)) {
		o := others[message]
		s.write(o.level, message, o.count, o.values, slog.Value{})
	}
}

func (s *sampler) write(level slog.Level, message string, count int64, values [len(sampledBy)]string, err slog.Value) {
	if !s.Enabled(context.Background(), level) {
		return
	}
	r := slog.NewRecord(time.Now(), level, message, 0)
	r.AddAttrs(slog.Int64("more", count), slog.Duration("within", sampleInterval))
	for i, v := range values {
		if v != "" {
			r.AddAttrs(slog.String(sampledBy[i], v))
		}
	}
	if values == [len(sampledBy)]string{} && err.Equal(slog.Value{}) {
		r.AddAttrs(slog.String("about", "others"))
	}
	if !err.Equal(slog.Value{}) {
		r.AddAttrs(slog.Attr{Key: "err", Value: err})
	}
	_ = s.next.Handle(context.Background(), r)
}

// run writes the counts of each interval until ctx ends, and then those that are left.
func (s *sampler) run(ctx context.Context) {
	tick := time.NewTicker(sampleInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			s.sum()
		case <-ctx.Done():
			s.sum()
			return
		}
	}
}

// addressOf returns the part of a peer's address by which calls of strangers are counted and
// bounded: an IPv4 address, or the /64 of an IPv6 address, because one machine usually has all
// of a /64.
func addressOf(peer string) netip.Addr {
	p, err := netip.ParseAddrPort(peer)
	if err != nil {
		return netip.Addr{}
	}
	a := p.Addr().Unmap().WithZone("")
	if a.Is6() {
		prefix, _ := a.Prefix(64)
		a = prefix.Addr()
	}
	return a
}

// httpLog is the ErrorLog of an http.Server. It finds the peer in the text of a line, so that
// lines about one peer are counted together.
func httpLog(handler slog.Handler) *log.Logger { return log.New(httpLines{slog.New(handler)}, "", 0) }

type httpLines struct{ log *slog.Logger }

func (h httpLines) Write(line []byte) (int, error) {
	text := strings.TrimSpace(string(line))
	for from := 0; from < len(text); {
		word, _, _ := strings.Cut(text[from:], " ")
		peer := strings.TrimRight(word, ":,;\n")
		if a := addressOf(peer); a.IsValid() {
			what := strings.TrimSpace(text[:from])
			h.log.Warn("connection failed", "reason", strings.TrimSuffix(what, " from"), "address", a.String(), "peer", peer,
				"err", strings.TrimLeft(text[from+len(peer):], " :"))
			return len(line), nil
		}
		from += len(word) + 1
	}
	h.log.Warn(text[:min(len(text), 100)], "err", text)
	return len(line), nil
}
