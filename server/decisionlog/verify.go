package decisionlog

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/cedarpost/cedarpost/auditlog"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/store"
)

// Verification says which parts of a log to verify, and against what.
type Verification struct {
	// Since limits the verification of rows to batches that have rows from this time on. The
	// zero time means all batches. All headers, the tree and all checkpoints are verified in
	// any case, because the times of rows are known only from proven headers.
	Since time.Time
	// Keys are the keys that checkpoints must be signed with. Without any, signatures are not
	// verified.
	Keys []note.Verifier
	// Against are the signed checkpoints and statements of truncation that were kept outside
	// of the database, one list for each file. Their order does not matter.
	Against [][][]byte
	// MinRetention is the least time for which a day of the log is kept after its end. The
	// verification ignores a record that a younger day was dropped. 0 means 30 days, the
	// default of a database.
	MinRetention time.Duration
	// History also compares the stored entities, bundles and keys with the log. Since must be
	// zero then.
	History bool
	// Progress, if not nil, is called every few thousand rows with the counts so far.
	Progress func(Verified)
}

// clockLeeway is how far the clock of a server may be ahead of the clock of the verifier.
const clockLeeway = time.Hour

// defaultMinRetention is the default of the table log_retention.
const defaultMinRetention = 30 * 24 * time.Hour

// Verified counts what was verified without a fault.
type Verified struct {
	// Batches, Decisions and Events are the verified batches and their rows.
	Batches, Decisions, Events int64
	// Total is how many batches there are to verify.
	Total int64
	// Dropped is how many rows are missing because their day was dropped, as the log proves.
	Dropped int64
	// Size is how many batches the newest checkpoint covers, and Unsigned how many come after
	// it. The first of these was made at UnsignedSince.
	Size, Unsigned int64
	UnsignedSince  time.Time
	// Checkpoints is how many checkpoints match the tree.
	Checkpoints int64
	// Truncations are the statements of truncation that are signed with one of the keys, by
	// origin and number.
	Truncations []TruncationFound
	// Truncated is how many checkpoints in Against do not match the log, but are excused by
	// these statements.
	Truncated int64
	// History is nil if it was not verified.
	History *HistoryVerified
}

// TruncationFound is a statement of truncation, and where it was found.
type TruncationFound struct {
	// Truncation is the statement.
	auditlog.Truncation
	// Kept is whether it is in [Verification.Against], and InLog whether it is in the log.
	Kept, InLog bool
}

// A Fault is one thing in a log that is wrong.
type Fault struct {
	// Leaf is the position of the batch in the log, or -1.
	Leaf int64
	// Row is the position of the row in the batch, or -1.
	Row int
	// What says what is wrong.
	What string
}

// String returns the place and what is wrong there.
func (f Fault) String() string {
	switch {
	case f.Leaf < 0:
		return f.What
	case f.Row < 0:
		return fmt.Sprintf("batch %d: %s", f.Leaf, f.What)
	}
	return fmt.Sprintf("batch %d, row %d: %s", f.Leaf, f.Row, f.What)
}

// A BadLogError lists what is wrong with a log.
type BadLogError struct {
	// Faults are the first faults, at least one.
	Faults []Fault
	// More is how many faults were found besides.
	More int
}

// Error lists the faults, one on a line.
func (e *BadLogError) Error() string {
	if len(e.Faults) == 1 && e.More == 0 {
		return e.Faults[0].String()
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%d faults", len(e.Faults)+e.More)
	for _, f := range e.Faults {
		fmt.Fprintf(&b, "\n  %s", f)
	}
	if e.More > 0 {
		fmt.Fprintf(&b, "\n  and %d more", e.More)
	}
	return b.String()
}

const (
	verifyBatches = 1 << 12 // leaves added to the tree at once
	verifyRows    = 5_000   // rows read at once, about
	maxFaults     = 1_000   // in a BadLogError
	maxStrays     = 100     // rows of no batch that are listed for one day
)

// VerifyLog recomputes the log, each row from its record, each batch from its rows, and the
// tree from the batches. It compares every step with what is stored and what was signed. It
// trusts a column only if it follows from what the tree commits to.
//
// It goes on after a fault, and returns all faults in a [*BadLogError] with the counts of what
// is right. Any other error means that the verification did not end. The log may grow
// meanwhile: the verification ends at the batch that was the last one when it began.
func VerifyLog(ctx context.Context, db *store.DB, v Verification) (Verified, error) {
	if v.History && !v.Since.IsZero() {
		return Verified{}, errors.New("verify: the stored history can only be verified with the whole log")
	}
	v.MinRetention = cmp.Or(v.MinRetention, defaultMinRetention)
	run := &verification{db: db, v: v, gone: map[time.Time]*goneRows{}, isGone: map[time.Time]bool{}, stated: map[string]*stated{}}
	err := run.verify(ctx)
	if err == nil && len(run.bad.Faults) > 0 {
		err = &run.bad
	}
	return run.done, err
}

type verification struct {
	db   *store.DB
	v    Verification
	done Verified
	bad  BadLogError
	tree treeCheck
	// gone has the batches without rows of days that have no partition, by day. A later
	// record in the log has to prove that the day was dropped.
	gone   map[time.Time]*goneRows
	isGone map[time.Time]bool // whether a day has no partition
	// droppedDay is the newest day that was dropped, as the log proves. All days before it
	// were dropped, too. droppedBefore is the first batch with rows of a later day; 0 if the
	// record does not say it.
	droppedDay    time.Time
	droppedBefore int64
	// stated are the truncations of each log, by origin.
	stated map[string]*stated
	// announced is whether the log has a record that checkpoints are signed.
	announced bool
	// rootDay is the day of the newest state root that was read: batches after it have
	// rows of that day or of the day before.
	rootDay time.Time
	// history compares stored data with the log; nil if that is not asked for.
	history *historyCheck
}

// fault adds a fault. leaf and row are -1 where they do not apply.
func (v *verification) fault(leaf int64, row int, format string, args ...any) {
	if len(v.bad.Faults) == maxFaults {
		v.bad.More++
		return
	}
	v.bad.Faults = append(v.bad.Faults, Fault{leaf, row, fmt.Sprintf(format, args...)})
}

func (v *verification) verify(ctx context.Context) error {
	if v.v.History {
		var err error
		v.history, err = newHistoryCheck(ctx, v.db, func(what string) { v.fault(-1, -1, "%s", what) })
		if err != nil {
			return err
		}
		defer v.history.h.Close()
	}
	end, err := v.db.NextLeaf(ctx)
	if err != nil {
		return err
	}
	latest, err := v.db.CheckpointUpTo(ctx, end)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	v.done.Size, v.done.Unsigned = latest.Size, end-latest.Size
	first, err := v.db.FirstLeaf(ctx)
	if err != nil {
		return err
	}
	if v.history != nil && first > 0 {
		v.history.missing(first)
	}
	v.done.Total = end - first
	v.startTree(first, latest.Size)
	if err := v.olderStatements(ctx); err != nil {
		return err
	}
	if err := v.checkpoints(ctx, first); err != nil {
		return err
	}
	for from := first; from < end; {
		if from, err = v.chunk(ctx, from, min(from+verifyBatches, end)); err != nil {
			return err
		}
	}
	if first > 0 && v.v.Since.IsZero() { // otherwise, the record of the drop may be too old to be read
		if err := v.head(ctx, first); err != nil {
			return err
		}
	}
	if err := v.droppedMeanwhile(ctx, end); err != nil {
		return err
	}
	v.goneDays()
	if err := v.strays(ctx); err != nil {
		return err
	}
	if err := v.shape(ctx); err != nil {
		return err
	}
	v.truncations()
	if err := v.endTree(ctx, end); err != nil || v.history == nil {
		return err
	}
	v.done.History, err = v.history.finish(ctx)
	return err
}

// chunk verifies the batches from one leaf up to another, and returns the leaf to continue at.
func (v *verification) chunk(ctx context.Context, from, to int64) (int64, error) {
	batches, err := v.db.Batches(ctx, from, int(to-from))
	if err != nil {
		return 0, err
	}
	if len(batches) > 0 && batches[0].Leaf >= to {
		v.fault(from, -1, "is missing, and all batches up to %d", batches[0].Leaf-1)
		v.tree.broken = true
		return batches[0].Leaf, nil
	}
	if i := slices.IndexFunc(batches, func(b store.Batch) bool { return b.Leaf >= to }); i >= 0 {
		batches = batches[:i] // there are gaps
	}
	headers := make([]*auditlog.Header, len(batches)) // nil where one cannot be read
	for i := range batches {
		headers[i] = v.header(&batches[i])
	}
	if err := v.growTree(ctx, from, to, batches); err != nil {
		return 0, err
	}
	for rest := 0; rest < len(batches); {
		n, rows := rest, 0
		for n < len(batches) && (n == rest || rows+batches[n].Rows <= verifyRows) {
			rows += batches[n].Rows
			n++
		}
		if err := v.group(ctx, batches[rest:n], headers[rest:n]); err != nil {
			return 0, err
		}
		rest = n
		if v.v.Progress != nil {
			v.v.Progress(v.done)
		}
	}
	return to, nil
}

// header compares the columns of a batch with its header, and then replaces them with the
// values of the header. It returns nil if the header cannot be read.
func (v *verification) header(b *store.Batch) *auditlog.Header {
	h, err := auditlog.ParseHeader(b.Header)
	if err != nil {
		v.fault(b.Leaf, -1, "its header cannot be read")
		return nil
	}
	if b.Leaf >= v.done.Size && v.done.UnsignedSince.IsZero() {
		v.done.UnsignedSince = h.Made
	}
	columns := []column{
		{"batch", h.Batch == b.ID}, {"writer", h.Writer == b.Writer}, {"writer_seq", h.WriterSeq == b.WriterSeq}, {"rows", h.Rows == b.Rows},
	}
	made := DayOf(h.Made)
	switch {
	case h.Version > 1 && h.Rows > 0 && (h.First.Before(time.UnixMilli(0)) || h.Last.Before(h.First) || !DayOf(h.First).Equal(DayOf(h.Last))):
		v.fault(b.Leaf, -1, "its header has times that its rows cannot have")
		return nil
	case h.Rows == 0:
		// The day of an empty batch is the one when it was committed, which can be the day after
		// it was made.
		columns = append(columns, column{"day", b.Day.Equal(made) || b.Day.Equal(made.AddDate(0, 0, 1))},
			column{"first_at", b.FirstAt.IsZero()}, column{"last_at", b.LastAt.IsZero()})
	case h.Version > 1:
		columns = append(columns, column{"day", b.Day.Equal(DayOf(h.First))},
			column{"first_at", b.FirstAt.Equal(h.First)}, column{"last_at", b.LastAt.Equal(h.Last)})
		b.Day, b.FirstAt, b.LastAt = DayOf(h.First), h.First, h.Last
	default:
		// A header of version 1 does not have the times of the rows. Rows are at most a day older
		// than their batch.
		columns = append(columns, column{"day", b.Day.Equal(made) || b.Day.Equal(made.AddDate(0, 0, -1))},
			column{"first_at", DayOf(b.FirstAt).Equal(b.Day)}, column{"last_at", DayOf(b.LastAt).Equal(b.Day) && !b.LastAt.Before(b.FirstAt)})
	}
	for _, c := range columns {
		if !c.same {
			v.fault(b.Leaf, -1, "column %s is not what its header says", c.name)
		}
	}
	b.ID, b.Rows = h.Batch, h.Rows
	return &h
}

// older reports whether all rows of a batch are from before Verification.Since.
func (v *verification) older(h auditlog.Header) bool {
	last := h.Last
	if last.IsZero() {
		last = h.Made // an empty batch, or a header of version 1: rows are not newer than this
	}
	return last.Before(v.v.Since)
}

// DayOf returns the begin of the UTC day of a time. The log is stored, batched and dropped by
// these days.
func DayOf(t time.Time) time.Time { return t.UTC().Truncate(24 * time.Hour) }

// event collects what an event says about the log. The tree commits to its record. It must be
// called in the order of the log.
func (v *verification) event(h auditlog.Header, rec *cedarpostv1.EventRecord) {
	if h.Made.After(time.Now().Add(clockLeeway)) {
		return // the time is false, so nothing is concluded from the event
	}
	switch rec.Kind {
	case cedarpostv1.EventRecord_STATE_ROOT:
		if day := DayOf(h.Made); day.After(v.rootDay) {
			v.rootDay = day
		}
	case cedarpostv1.EventRecord_CHECKPOINT_KEY:
		v.announced = true
	case cedarpostv1.EventRecord_LOG_TRUNCATED:
		v.statement([]byte(rec.GetLogTruncated().GetStatement()), false, "the log has a statement of truncation that does not count: %s")
	case cedarpostv1.EventRecord_RETENTION_DROP:
		drop := rec.GetRetentionDrop()
		day, err := time.Parse(time.DateOnly, drop.GetDay())
		if err != nil || h.Made.Before(day.AddDate(0, 0, 1).Add(v.v.MinRetention)) {
			return // the day was too young to be dropped
		}
		before := drop.GetFirstLeaf()
		switch {
		case day.After(v.droppedDay):
			v.droppedDay, v.droppedBefore = day, before
		case day.Equal(v.droppedDay):
			if before > 0 && (v.droppedBefore == 0 || before < v.droppedBefore) {
				v.droppedBefore = before // of several records, the strictest one counts
			}
		}
	}
}
