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
	recordRows    = 2000                   // rows in one commit
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
	rows []store.Decision
	err  chan error
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
	p := &pendingRecord{rows: rows, err: make(chan error, 1)}
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
	for {
		var first *pendingRecord
		select {
		case first = <-r.queue:
		case <-r.stop:
			select {
			case first = <-r.queue:
			default:
				return
			}
		}
		batch := []*pendingRecord{first}
		rows := first.rows
	fill:
		for len(rows) < recordRows {
			select {
			case p := <-r.queue:
				batch = append(batch, p)
				rows = append(rows, p.rows...)
			default:
				break fill
			}
		}
		ctx, cancel := context.WithTimeout(context.Background(), recordTimeout)
		began := time.Now()
		err := r.writer.Write(ctx, rows)
		cancel()
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
}

// close commits what is queued and stops. A record call that comes later, or too
// late to be committed, gets an error.
func (r *recorder) close() {
	close(r.stop)
	<-r.done
}
