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
	"go.opentelemetry.io/otel/trace"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/store"
)

const (
	recordQueue = 4096                   // calls that wait for a commit, at most
	recordRows  = 2000                   // rows in one commit, at most
	recordBytes = 8 << 20                // bytes of their records, at most
	recordWait  = 100 * time.Millisecond // for a place in a full queue, or between two attempts
	heartbeat   = time.Minute            // between two batches of an idle server

	outageMoment = 2 * time.Second // between the first and the last failure of an outage
	outageEnd    = 3 * time.Second // without a failure, until an outage is over
	probeEvery   = time.Second     // between two attempts of an idle server during an outage
)

// RecordTimeout bounds one commit, including the time to find out what became of it if its
// reply is lost.
const RecordTimeout = 5 * time.Second

// The names of background tasks that are reported to [Config.Task].
const (
	// TaskPartitions makes partitions of the log for the days ahead.
	TaskPartitions = "partitions"
	// TaskNoted records what a [Noted] has counted.
	TaskNoted = "noted"
	// TaskMergeKeys merges what commits have added to the index of principals and resources.
	TaskMergeKeys = "merge_keys"
	// TaskPolicyUses stores when policies last determined a decision.
	TaskPolicyUses = "policy_uses"
	// TaskWatchLog looks up how much of the log is signed.
	TaskWatchLog = "watch_log"
)

// bufferBound is how many decisions a server in buffered mode may have answered and not yet
// committed.
const bufferBound = 10_000

// The errors of [Recorder.Record] that say that nothing was recorded.
var (
	// ErrQueueFull means that too many records wait for a commit.
	ErrQueueFull = errors.New("decision log: queue is full")
	// ErrRecorderDown means that the recorder is closed, or that its last commit failed.
	ErrRecorderDown = errors.New("decision log: not available")
)

// Config is the configuration of a [Recorder]. DB, Name, Mode, Log and Metrics are required.
type Config struct {
	// DB is the database that has the log.
	DB *store.DB
	// Name is the name of the server in records.
	Name string
	// Mode says whether decisions are answered after their commit (strict) or before it
	// (buffered).
	Mode auditlog.Mode
	// Log gets a line for each commit that fails, and for each step of the clock.
	Log *slog.Logger
	// MaskKey is the key of the hashes that replace sensitive values in records:
	// [MaskKeyBytes] bytes. If it is empty, the recorder makes a key that ends with it.
	MaskKey secret.Secret
	// Heard, if not nil, is called after each commit with the newest revision that the
	// database reported, and the time at which the statement for it was sent.
	Heard func(p store.Position, asked time.Time)
	// Metrics registers the metrics of the recorder and of its [Signer].
	Metrics prometheus.Registerer
	// Task, if not nil, is called after each run of a background task with its name and
	// its error, or nil.
	Task func(name string, err error)

	mergeEvery time.Duration // between two merges of the index; 0: mergeEvery
	maxWaiting time.Duration // of a record for its commit, until it is an outage; 0: maxWaiting
}

// Recorder commits records in batches. One commit is in flight at a time, and the records
// that arrive meanwhile form the next batch. So batches grow with the load, and a single
// record never waits for others. It is safe for concurrent use.
type Recorder struct {
	cfg        Config
	writer     *store.LogWriter
	metric     *recorderMetrics
	mask       *masker
	ids        *ids // of all records, except the events that the store commits by itself
	partitions *partitions

	queue  chan *pendingRecord
	stop   chan struct{}          // Close closes it, to end run and mergeKeys
	done   chan struct{}          // run closes it when it ends
	merged chan struct{}          // mergeKeys closes it when it ends
	down   atomic.Bool            // the last commit failed
	outage atomic.Pointer[outage] // nil: none; only run changes it
	atRisk atomic.Int64           // decisions that are answered and not yet committed

	began  time.Time
	oldest atomic.Int64 // when the oldest record of the batch in progress was queued, after began; 0: there is no batch

	unmerged atomic.Bool // decisions were committed since the last merge
	uses     policyUses
}

// pendingRecord is the rows of one call that wait for a commit.
type pendingRecord struct {
	ctx       context.Context // of the call; nil if it does not wait for the commit
	span      trace.Span      // of the call, if it is sampled; else nil
	decisions []store.Decision
	events    []store.Event
	queued    time.Time
	bytes     int        // of their records
	err       chan error // gets the outcome of the commit, once
}

func newPending(ctx context.Context, decisions []store.Decision, events []store.Event) *pendingRecord {
	p := &pendingRecord{ctx: ctx, decisions: decisions, events: events, queued: time.Now(), err: make(chan error, 1)}
	if span := trace.SpanFromContext(ctx); span.IsRecording() {
		p.span = span
	}
	for i := range decisions {
		p.bytes += len(decisions[i].Record)
	}
	for i := range events {
		p.bytes += len(events[i].Record)
	}
	return p
}

func (p *pendingRecord) rows() int { return len(p.decisions) + len(p.events) }

// day returns the UTC day of the rows. Retention drops whole days of the log, so a batch
// has rows of one day.
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

// wanted reports whether the rows are still to be recorded. If the call has ended, they are
// not, so that after an overload no commits are spent on calls that nobody waits for.
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

// NewRecorder starts a recorder, which runs until [Recorder.Close]. The error is about the
// mask key.
func NewRecorder(cfg Config) (*Recorder, error) {
	bound := 0
	if cfg.Mode == auditlog.Buffered {
		bound = bufferBound
	}
	if cfg.mergeEvery == 0 {
		cfg.mergeEvery = mergeEvery
	}
	if cfg.maxWaiting == 0 {
		cfg.maxWaiting = maxWaiting
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
		began:      time.Now(),
		stop:       make(chan struct{}),
		done:       make(chan struct{}),
		merged:     make(chan struct{}),
	}
	r.metric = newRecorderMetrics(r)
	r.ids = newIDs(cfg.Log, r.metric.clockStep)
	go r.run()
	go r.mergeKeys()
	return r, nil
}

// CheckClock reports a step of the wall clock in the log and the metrics. The recorder
// itself notices a step only when it makes the next record.
func (r *Recorder) CheckClock() { r.ids.checkClock() }

// EnsurePartition makes the partition of the log for a UTC day if it is missing, and reports
// whether it exists. It makes only partitions of days near the clock of this server or of the
// database, and tries at most once in ten seconds.
func (r *Recorder) EnsurePartition(ctx context.Context, day time.Time) bool {
	return r.partitions.ensure(ctx, day)
}

// MaskedHash returns the hash that replaces a sensitive value in records, to search for
// it. text is the value as JSON; text that is not JSON is a string without quotes.
func (r *Recorder) MaskedHash(text string) ([]byte, error) { return r.mask.maskedHash(text) }

// probe is the work of an idle recorder: an empty batch. While the disk is full it first writes as
// much as a busy server does, and takes that back, because a small batch can still fit.
func (r *Recorder) probe() {
	r.working(time.Now())
	defer r.idle()
	o := r.outage.Load()
	if o == nil || !store.IsDiskFull(o.err) {
		_ = r.write(context.Background(), dayRows{}) // write logs its error
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), RecordTimeout)
	defer cancel()
	err := r.writer.Probe(ctx)
	if err == nil {
		_ = r.write(context.Background(), dayRows{})
		return
	}
	r.metric.commitFails.Inc()
	r.note(err)
	r.cfg.Log.Error("the decision log cannot be written", "since", o.first.UTC(), "err", err)
}

// idleFor returns how long an idle recorder waits before the next probe.
func (r *Recorder) idleFor() time.Duration {
	if r.outage.Load() != nil {
		return probeEvery
	}
	return heartbeat
}

// Record commits rows, and returns nil only after the commit. After an error the decisions
// must not be answered. If the reply to a commit was lost, its rows may be in the log in
// spite of the error.
//
// In buffered mode, Record returns nil for decisions as soon as they are in the queue, but
// refuses them while the log is known not to be available. It waits for events as in strict
// mode.
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

// buffer queues decisions that are answered before they are committed.
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

// run makes batches of what is queued and commits them, until the recorder is closed.
func (r *Recorder) run() {
	defer close(r.done)
	defer r.writer.Close()
	var over *pendingRecord // did not fit into the last batch
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
		r.working(first.queued)
		r.commit(batch)
		r.idle()
	}
}

// wait returns the next record that is wanted, or nil when the recorder is stopped and the
// queue is empty.
func (r *Recorder) wait() *pendingRecord {
	idle := time.NewTimer(r.idleFor())
	defer idle.Stop()
	for {
		var p *pendingRecord
		select {
		case p = <-r.queue:
		case <-idle.C:
			r.probe()
			idle.Reset(r.idleFor())
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

// take returns the next record in the queue, or nil.
func (r *Recorder) take() *pendingRecord {
	select {
	case p := <-r.queue:
		return p
	default:
		return nil
	}
}

// fill makes a batch of first and of queued records that are wanted, within the bounds of a
// batch. A record that is larger than the bounds is a batch by itself. over is a record that
// was taken from the queue and belongs to the next batch.
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

// commit writes a batch and reports the outcome to all calls in it.
func (r *Recorder) commit(batch []*pendingRecord) {
	risked, nDecisions, nEvents := 0, 0, 0
	for _, p := range batch {
		nDecisions, nEvents = nDecisions+len(p.decisions), nEvents+len(p.events)
	}
	decisions, events := make([]store.Decision, 0, nDecisions), make([]store.Event, 0, nEvents)
	for _, p := range batch {
		decisions = append(decisions, p.decisions...)
		events = append(events, p.events...)
		if p.ctx == nil {
			risked += len(p.decisions)
		}
	}
	ctx, span := traceCommit(batch, len(decisions), len(events))
	var err error
	for _, d := range splitDays(decisions, events) {
		err = r.write(ctx, d)
		// Some decisions are answered already, so try until they are committed. Meanwhile
		// down is set, so no other decision is answered.
		for err != nil && risked > 0 && !r.stopping() {
			if errors.Is(err, store.ErrBehind) {
				// A failover lost their revision. They are recorded anyway, because they were
				// answered; without a mark, the store does not compare the revision.
				for i := range d.decisions {
					d.decisions[i].Mark = uuid.Nil
				}
			} else {
				time.Sleep(recordWait)
			}
			err = r.write(ctx, d)
		}
		if err != nil {
			break
		}
	}
	endCommit(span, err)
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
func (r *Recorder) write(ctx context.Context, rows dayRows) error {
	ctx, cancel := context.WithTimeout(ctx, RecordTimeout)
	defer cancel()
	began := time.Now()
	done, err := r.writer.Append(ctx, rows.decisions, rows.events)
	if errors.Is(err, store.ErrNoPartition) && r.partitions.ensure(ctx, rows.day()) {
		done, err = r.writer.Append(ctx, rows.decisions, rows.events)
	}
	if r.cfg.Mode == auditlog.Buffered && errors.Is(err, store.ErrRecorded) {
		err = nil // an earlier attempt was committed, and its reply was lost
	}
	r.metric.commit.Observe(time.Since(began).Seconds())
	r.metric.batchRows.Observe(float64(len(rows.decisions) + len(rows.events)))
	r.down.Store(err != nil)
	r.note(err)
	if err != nil {
		r.metric.commitFails.Inc()
		r.cfg.Log.Error("not recorded", "decisions", len(rows.decisions), "events", len(rows.events), "err", err)
		return err
	}
	noteLeaf(ctx, done.Leaf)
	if len(rows.decisions) > 0 {
		r.unmerged.Store(true)
		r.uses.note(rows.decisions)
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

// day returns a time within the day of the rows.
func (d dayRows) day() time.Time {
	if len(d.decisions) > 0 {
		return d.decisions[0].At
	}
	if len(d.events) > 0 {
		return d.events[0].At
	}
	return time.Now()
}

// splitDays divides rows by day. There is more than one day only if a call was in progress at
// midnight.
func splitDays(decisions []store.Decision, events []store.Event) []dayRows {
	day := func(at time.Time) int64 { return at.Unix() / (24 * 3600) }
	first := day(dayRows{decisions, events}.day())
	if !slices.ContainsFunc(decisions, func(d store.Decision) bool { return day(d.At) != first }) &&
		!slices.ContainsFunc(events, func(e store.Event) bool { return day(e.At) != first }) {
		return []dayRows{{decisions, events}} // nearly always
	}
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

// Close commits what is queued, stops the recorder, and returns. Later calls of
// [Recorder.Record] get [ErrRecorderDown]. It must be called once.
func (r *Recorder) Close() {
	close(r.stop)
	<-r.done
	<-r.merged
	ctx, cancel := context.WithTimeout(context.Background(), RecordTimeout)
	defer cancel()
	r.storeUses(ctx)
}
