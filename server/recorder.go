package server

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/cedarpost/cedarpost/store"
)

const (
	recordQueue   = 4096                   // calls waiting for a commit
	recordRows    = 2000                   // rows in one commit, and
	recordBytes   = 8 << 20                // bytes of their records
	recordTimeout = 5 * time.Second        // of one commit
	recordWait    = 100 * time.Millisecond // for a place in a full queue
)

var (
	errQueueFull    = errors.New("decision log: queue is full")
	errRecorderDown = errors.New("decision log: stopped")
)

// recorder commits decision records in batches. One commit is in flight at a
// time; what comes meanwhile forms the next batch, so batches grow with the load
// and a lone caller never waits for company.
type recorder struct {
	writer *store.DecisionWriter
	log    *slog.Logger
	metric *metrics
	queue  chan *pendingRecord
	stop   chan struct{} // closed to ask run to finish
	done   chan struct{} // closed when it has
}

// pendingRecord is one call's rows and who waits for them.
type pendingRecord struct {
	ctx   context.Context // of the call
	rows  []store.Decision
	bytes int // of their records
	err   chan error
}

func newPending(ctx context.Context, rows []store.Decision) *pendingRecord {
	p := &pendingRecord{ctx: ctx, rows: rows, err: make(chan error, 1)}
	for i := range rows {
		p.bytes += len(rows[i].Record)
	}
	return p
}

// wanted reports whether the call still waits. One that was given up is told
// so, and not recorded: after an overload the commits are for those who are there.
func (p *pendingRecord) wanted() bool {
	err := p.ctx.Err()
	if err != nil {
		p.err <- err
	}
	return err == nil
}

func newRecorder(db *store.DB, log *slog.Logger, m *metrics) *recorder {
	r := &recorder{
		writer: db.NewDecisionWriter(),
		log:    log,
		metric: m,
		queue:  make(chan *pendingRecord, recordQueue),
		stop:   make(chan struct{}),
		done:   make(chan struct{}),
	}
	go r.run()
	return r
}

// record returns nil only after all rows are committed. After any error the
// decisions must not be answered; rows whose commit was lost on the way back may
// be in the log all the same.
func (r *recorder) record(ctx context.Context, rows []store.Decision) error {
	if len(rows) == 0 {
		return nil
	}
	p := newPending(ctx, rows)
	select {
	case r.queue <- p:
	default:
		full := time.NewTimer(recordWait)
		defer full.Stop()
		select {
		case r.queue <- p:
		case <-full.C:
			return errQueueFull
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	select {
	case err := <-p.err:
		return err
	case <-r.done:
		select {
		case err := <-p.err:
			return err
		default:
			return errRecorderDown
		}
	case <-ctx.Done():
		return ctx.Err()
	}
}

// run is the one batcher of the process.
func (r *recorder) run() {
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
func (r *recorder) wait() *pendingRecord {
	for {
		var p *pendingRecord
		select {
		case p = <-r.queue:
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
func (r *recorder) take() *pendingRecord {
	select {
	case p := <-r.queue:
		return p
	default:
		return nil
	}
}

// fill adds what is queued and wanted to first, within the bounds of a batch. A
// call that is larger than those goes alone.
func (r *recorder) fill(first *pendingRecord) (batch []*pendingRecord, over *pendingRecord) {
	batch = append(batch, first)
	rows, bytes := len(first.rows), first.bytes
	for {
		p := r.take()
		switch {
		case p == nil:
			return batch, nil
		case !p.wanted():
		case rows+len(p.rows) > recordRows || bytes+p.bytes > recordBytes:
			return batch, p
		default:
			batch = append(batch, p)
			rows, bytes = rows+len(p.rows), bytes+p.bytes
		}
	}
}

// commit writes a batch and tells everyone in it.
func (r *recorder) commit(batch []*pendingRecord) {
	var rows []store.Decision
	for _, p := range batch {
		rows = append(rows, p.rows...)
	}
	ctx, cancel := context.WithTimeout(context.Background(), recordTimeout)
	defer cancel()
	began := time.Now()
	err := r.writer.Write(ctx, rows)
	r.metric.commit.Observe(time.Since(began).Seconds())
	r.metric.batchRows.Observe(float64(len(rows)))
	if err != nil {
		r.metric.commitFails.Inc()
		r.log.Error("decisions not recorded", "rows", len(rows), "err", err)
	}
	for _, p := range batch {
		p.err <- err
	}
}

// close commits what is queued and stops. A record call that comes later, or too
// late to be committed, gets an error.
func (r *recorder) close() {
	close(r.stop)
	<-r.done
}
