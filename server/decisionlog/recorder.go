// Package decisionlog writes the decision log and proves it. A [Recorder] commits decisions and
// events in batches. A [Signer] signs the tree of the batches. [VerifyLog] proves what is
// stored, and [TruncateLog] states what was lost.
package decisionlog

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/store"
)

const (
	recordQueue   = 4096                   // calls waiting for a commit
	recordRows    = 2000                   // rows in one commit, and
	recordBytes   = 8 << 20                // bytes of their records
	RecordTimeout = 5 * time.Second        // of one commit, with finding out what became of it
	recordWait    = 100 * time.Millisecond // for a place in a full queue
	heartbeat     = time.Minute            // an idle server says so often that it is there
)

// The tasks in the background whose outcome a recorder, and what uses it, reports.
const (
	// TaskPartitions makes partitions of the log for the days ahead.
	TaskPartitions = "partitions"
	// TaskAuthenticationFailures records failed authentication.
	TaskAuthenticationFailures = "authentication_failures"
	// TaskWatchLog looks up how much of the log is signed.
	TaskWatchLog = "watch_log"
)

// bufferBound is how many decisions a server that answers before the commit may
// have at risk: those in its queue and those in flight.
const bufferBound = 10_000

var (
	ErrQueueFull    = errors.New("decision log: queue is full")
	ErrRecorderDown = errors.New("decision log: not available")
)

// Config says what a recorder records, and where.
type Config struct {
	DB *store.DB
	// Name is that of the server, in records.
	Name string
	// Mode says whether decisions are answered after their commit or before it.
	Mode auditlog.Mode
	Log  *slog.Logger
	// MaskKey is the key of the hashes that stand in records for sensitive values; 32 bytes.
	// Without one the recorder makes up its own.
	MaskKey []byte
	// Heard, if not nil, learns of the newest revision after each commit, and when the
	// question was sent.
	Heard func(p store.Position, asked time.Time)
	// Metrics gets the metrics of the recorder.
	Metrics prometheus.Registerer
	// Task, if not nil, learns of the outcome of work in the background.
	Task func(name string, err error)
}

// Recorder commits records in batches. One commit is in flight at a time, and the records
// that arrive meanwhile form the next batch. So batches grow with the load, and a record
// that comes alone never waits for others.
type Recorder struct {
	cfg        Config
	writer     *store.LogWriter
	metric     *recorderMetrics
	mask       *masker
	ids        *ids // of all records of this server, except those of changes
	partitions *partitions

	queue  chan *pendingRecord
	stop   chan struct{} // closed to ask run to finish
	done   chan struct{} // closed when it has
	down   atomic.Bool   // the last commit failed
	atRisk atomic.Int64  // decisions that were answered and are not committed
}

// pendingRecord is one call's rows and who waits for them.
type pendingRecord struct {
	ctx       context.Context // of the call; nil when it does not wait
	decisions []store.Decision
	events    []store.Event
	bytes     int // of their records
	err       chan error
}

func newPending(ctx context.Context, decisions []store.Decision, events []store.Event) *pendingRecord {
	p := &pendingRecord{ctx: ctx, decisions: decisions, events: events, err: make(chan error, 1)}
	for i := range decisions {
		p.bytes += len(decisions[i].Record)
	}
	for i := range events {
		p.bytes += len(events[i].Record)
	}
	return p
}

func (p *pendingRecord) rows() int { return len(p.decisions) + len(p.events) }

// day is the UTC day of the rows. The log is dropped by days, so a batch is of one.
func (p *pendingRecord) day() string {
	at := time.Time{}
	switch {
	case len(p.decisions) > 0:
		at = p.decisions[0].At
	case len(p.events) > 0:
		at = p.events[0].At
	}
	return at.UTC().Format(time.DateOnly)
}

// wanted reports whether the call still waits. One that was given up is told
// so, and not recorded: after an overload the commits are for those who are there.
func (p *pendingRecord) wanted() bool {
	if p.ctx == nil {
		return true
	}
	err := p.ctx.Err()
	if err != nil {
		p.err <- err
	}
	return err == nil
}

// NewRecorder makes a recorder, which runs until it is closed.
func NewRecorder(cfg Config) (*Recorder, error) {
	bound := 0
	if cfg.Mode == auditlog.Buffered {
		bound = bufferBound
	}
	if cfg.Task == nil {
		cfg.Task = func(string, error) {}
	}
	mask, err := newMasker(cfg.MaskKey, cfg.Log)
	if err != nil {
		return nil, err
	}
	r := &Recorder{
		cfg:        cfg,
		writer:     cfg.DB.NewLogWriter(cfg.Name, cfg.Mode, bound),
		mask:       mask,
		partitions: &partitions{db: cfg.DB, log: cfg.Log, task: cfg.Task, every: partitionsEvery},
		queue:      make(chan *pendingRecord, recordQueue),
		stop:       make(chan struct{}),
		done:       make(chan struct{}),
	}
	r.metric = newRecorderMetrics(r)
	r.ids = newIDs(cfg.Log, r.metric.clockStep)
	go r.run()
	return r, nil
}

// LookAtClock notices that the clock was set while nothing was recorded.
func (r *Recorder) LookAtClock() { r.ids.look() }

// MakePartition makes the partition of the log for a day, if that is near the clock, and
// reports whether it is there.
func (r *Recorder) MakePartition(ctx context.Context, day time.Time) bool {
	return r.partitions.make(ctx, day)
}

// MaskedHash returns the hash that stands in records for a value. text is the value as
// JSON; a text that is not JSON is the value itself, a string.
func (r *Recorder) MaskedHash(text string) ([]byte, error) { return r.mask.maskedHash(text) }

// Record returns nil only after all rows are committed. After any error the
// decisions must not be answered; rows whose commit was lost on the way back may
// be in the log all the same.
//
// In buffered mode, decisions are as good as recorded when they are in the queue.
// Even then nothing is taken while the log is known not to be available.
func (r *Recorder) Record(ctx context.Context, decisions []store.Decision, events []store.Event) error {
	if len(decisions)+len(events) == 0 {
		return nil
	}
	p := newPending(ctx, decisions, events)
	if r.cfg.Mode == auditlog.Buffered && len(events) == 0 {
		p.ctx = nil
		return r.buffer(ctx, p)
	}
	if err := r.enqueue(ctx, p); err != nil {
		return err
	}
	select {
	case err := <-p.err:
		return err
	case <-r.done:
		select {
		case err := <-p.err:
			return err
		default:
			return ErrRecorderDown
		}
	case <-ctx.Done():
		return ctx.Err()
	}
}

// buffer takes decisions that are answered before they are committed.
func (r *Recorder) buffer(ctx context.Context, p *pendingRecord) error {
	if r.down.Load() || r.writer.Trouble() {
		return ErrRecorderDown
	}
	n := int64(len(p.decisions))
	if r.atRisk.Add(n) > bufferBound {
		r.atRisk.Add(-n)
		return ErrQueueFull
	}
	if err := r.enqueue(ctx, p); err != nil {
		r.atRisk.Add(-n)
		return err
	}
	return nil
}

// enqueue waits a short time for a place in a full queue.
func (r *Recorder) enqueue(ctx context.Context, p *pendingRecord) error {
	select {
	case <-r.stop:
		return ErrRecorderDown
	default:
	}
	select {
	case r.queue <- p:
		return nil
	default:
	}
	full := time.NewTimer(recordWait)
	defer full.Stop()
	select {
	case r.queue <- p:
		return nil
	case <-full.C:
		if r.down.Load() || r.writer.Trouble() {
			return ErrRecorderDown
		}
		return ErrQueueFull
	case <-ctx.Done():
		return ctx.Err()
	}
}

// run is the one batcher of the process.
func (r *Recorder) run() {
	defer close(r.done)
	defer r.writer.Close()
	var over *pendingRecord // did not fit into the batch before
	for {
		first := over
		if first == nil || !first.wanted() {
			first = r.wait()
		}
		if first == nil {
			return
		}
		var batch []*pendingRecord
		batch, over = r.fill(first)
		r.commit(batch)
	}
}

// wait returns the next that is wanted, or nil when the recorder is stopped and
// the queue empty.
func (r *Recorder) wait() *pendingRecord {
	idle := time.NewTicker(heartbeat)
	defer idle.Stop()
	for {
		var p *pendingRecord
		select {
		case p = <-r.queue:
		case <-idle.C:
			_ = r.write(dayRows{}) // an empty batch; what failed is logged
			continue
		case <-r.stop:
			if p = r.take(); p == nil {
				return nil
			}
		}
		if p.wanted() {
			return p
		}
	}
}

// take returns the next in the queue, or nil.
func (r *Recorder) take() *pendingRecord {
	select {
	case p := <-r.queue:
		return p
	default:
		return nil
	}
}

// fill adds what is queued and wanted to first, within the bounds of a batch. A
// call that is larger than those goes alone.
func (r *Recorder) fill(first *pendingRecord) (batch []*pendingRecord, over *pendingRecord) {
	batch = append(batch, first)
	rows, bytes, day := first.rows(), first.bytes, first.day()
	for {
		p := r.take()
		switch {
		case p == nil:
			return batch, nil
		case !p.wanted():
		case rows+p.rows() > recordRows || bytes+p.bytes > recordBytes || p.day() != day:
			return batch, p
		default:
			batch = append(batch, p)
			rows, bytes = rows+p.rows(), bytes+p.bytes
		}
	}
}

// commit writes a batch and tells everyone in it.
func (r *Recorder) commit(batch []*pendingRecord) {
	var decisions []store.Decision
	var events []store.Event
	risked := 0
	for _, p := range batch {
		decisions = append(decisions, p.decisions...)
		events = append(events, p.events...)
		if p.ctx == nil {
			risked += len(p.decisions)
		}
	}
	var err error
	for _, d := range splitDays(decisions, events) {
		err = r.write(d)
		// They were answered: try until they are in the log. Meanwhile nobody gets an
		// answer, for down is set.
		for err != nil && risked > 0 && !r.stopping() {
			if errors.Is(err, store.ErrBehind) {
				// Their revision was lost in a failover. The log has to say that they were answered.
				for i := range d.decisions {
					d.decisions[i].Mark = uuid.Nil
				}
			} else {
				time.Sleep(recordWait)
			}
			err = r.write(d)
		}
		if err != nil {
			break
		}
	}
	if err != nil && risked > 0 {
		r.cfg.Log.Error("answered decisions lost: the server stops and the log is not available", "decisions", risked)
		r.metric.lost.Add(float64(risked))
	}
	r.atRisk.Add(-int64(risked))
	for _, p := range batch {
		p.err <- err
	}
}

// write is one attempt at a commit.
func (r *Recorder) write(rows dayRows) error {
	ctx, cancel := context.WithTimeout(context.Background(), RecordTimeout)
	defer cancel()
	began := time.Now()
	done, err := r.writer.Append(ctx, rows.decisions, rows.events)
	if errors.Is(err, store.ErrNoPartition) && r.partitions.make(ctx, rows.day()) {
		done, err = r.writer.Append(ctx, rows.decisions, rows.events)
	}
	if r.cfg.Mode == auditlog.Buffered && errors.Is(err, store.ErrRecorded) {
		err = nil // the attempt before this one went through
	}
	r.metric.commit.Observe(time.Since(began).Seconds())
	r.metric.batchRows.Observe(float64(len(rows.decisions) + len(rows.events)))
	r.down.Store(err != nil)
	if err != nil {
		r.metric.commitFails.Inc()
		r.cfg.Log.Error("not recorded", "decisions", len(rows.decisions), "events", len(rows.events), "err", err)
		return err
	}
	if r.cfg.Heard != nil && !done.Asked.IsZero() {
		r.cfg.Heard(done.Position, done.Asked)
	}
	return nil
}

// dayRows are rows of one UTC day.
type dayRows struct {
	decisions []store.Decision
	events    []store.Event
}

// day is a time of the day of the rows.
func (d dayRows) day() time.Time {
	if len(d.decisions) > 0 {
		return d.decisions[0].At
	}
	if len(d.events) > 0 {
		return d.events[0].At
	}
	return time.Now()
}

// splitDays divides rows by day. There is more than one only when a call was at
// work at midnight.
func splitDays(decisions []store.Decision, events []store.Event) []dayRows {
	day := func(at time.Time) int64 { return at.Unix() / (24 * 3600) }
	byDay := map[int64]*dayRows{}
	of := func(at time.Time) *dayRows {
		if byDay[day(at)] == nil {
			byDay[day(at)] = &dayRows{}
		}
		return byDay[day(at)]
	}
	for _, d := range decisions {
		rows := of(d.At)
		rows.decisions = append(rows.decisions, d)
	}
	for _, e := range events {
		rows := of(e.At)
		rows.events = append(rows.events, e)
	}
	if len(byDay) < 2 {
		return []dayRows{{decisions, events}} // as ever
	}
	var days []dayRows
	for _, d := range slices.Sorted(maps.Keys(byDay)) {
		days = append(days, *byDay[d])
	}
	return days
}

func (r *Recorder) stopping() bool {
	select {
	case <-r.stop:
		return true
	default:
		return false
	}
}

// Close commits what is queued and stops. A record call that comes later, or too
// late to be committed, gets an error.
func (r *Recorder) Close() {
	close(r.stop)
	<-r.done
}
