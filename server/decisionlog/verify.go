package decisionlog

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/cedarpost/cedarpost/auditlog"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/store"
)

// Verification says what of a log to verify, and against what.
type Verification struct {
	// Since verifies the rows of batches that have rows from this time on; the zero time:
	// all. Headers, tree and checkpoints are verified whole in any case: a header is
	// what tells the time of rows, so it has to be proven first.
	Since time.Time
	// Keys are those that checkpoints must be signed with. Without any, signatures are
	// not looked at.
	Keys []note.Verifier
	// Against are the signed checkpoints and statements of truncation that were kept
	// elsewhere, one list for each file. The order means nothing.
	Against [][][]byte
	// MinRetention is how long after its end a day of the log is kept at least. A record
	// that a younger day is dropped is not believed. 0 is 30 days, which is what a
	// database has unless its owner changes it.
	MinRetention time.Duration
	// History compares the stored entities, bundles and keys with the log. Since must
	// be zero.
	History bool
	// Progress, if not nil, is called now and then.
	Progress func(Verified)
}

// clockLeeway is how far the clock of a server may be ahead of that of the verifier.
const clockLeeway = time.Hour

// defaultMinRetention is what the table log_retention has unless it is changed.
const defaultMinRetention = 30 * 24 * time.Hour

// Verified counts what was found to be in order.
type Verified struct {
	Batches, Decisions, Events int64
	// Total is how many batches there are to verify.
	Total int64
	// Dropped are rows of days that were dropped, as the log itself proves.
	Dropped int64
	// Size is what the newest checkpoint covers; Unsigned are the batches after it, and
	// UnsignedSince is when the first of them was made.
	Size, Unsigned int64
	UnsignedSince  time.Time
	// Checkpoints that were compared with the tree.
	Checkpoints int64
	// Truncations are statements, signed with one of the keys, that batches were lost:
	// in Against, in the log, or in both.
	Truncations []TruncationFound
	// Truncated counts the checkpoints in Against that the log does not hold, and by these
	// statements need not hold.
	Truncated int64
	// History is nil if it was not verified.
	History *HistoryVerified
}

// TruncationFound is a statement of truncation, and where it was found.
type TruncationFound struct {
	auditlog.Truncation
	Kept, InLog bool
}

// A Fault is one thing in a log that is not in order.
type Fault struct {
	Leaf int64  // of the batch, or -1
	Row  int    // in the batch, or -1
	What string // in words
}

// String names the place and the reason.
func (f Fault) String() string {
	switch {
	case f.Leaf < 0:
		return f.What
	case f.Row < 0:
		return fmt.Sprintf("batch %d: %s", f.Leaf, f.What)
	}
	return fmt.Sprintf("batch %d, row %d: %s", f.Leaf, f.Row, f.What)
}

// A BadLogError has what is not in order in a log.
type BadLogError struct {
	// Faults are the first ones, at least one.
	Faults []Fault
	// More is how many there are besides.
	More int
}

// Error lists the faults.
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
	maxFaults     = 1_000   // listed
	maxStrays     = 100     // listed of one day
)

// VerifyLog recomputes the log: each row from its bytes, each batch from its rows, the
// tree from the batches, and compares every step with what is stored and with what was
// signed. It trusts no column that is not derived from what the tree commits to. After
// something that is not in order it goes on; the error is a [*BadLogError] then.
//
// It reads while the log grows, and ends at what there was when it began.
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
	// gone are the batches without rows of days that have no partition, by day. They are
	// in order if the log proves that the day was dropped, which it says later.
	gone   map[time.Time]*goneRows
	isGone map[time.Time]bool // whether a day has no partition
	// droppedDay is the newest day that the log proves was dropped, and with it all days
	// before, and droppedBefore the first batch that has rows of a later day, if the
	// record says so.
	droppedDay    time.Time
	droppedBefore int64
	// stated are the truncations of each log, by origin.
	stated map[string]*stated
	// announced: the log says that checkpoints are signed.
	announced bool
	// rootDay is the day of the newest state root that was read: batches after it have
	// rows of that day or of the day before.
	rootDay time.Time
	// history compares what is stored with the log; nil: not to be done.
	history *historyCheck
}

// goneRows are rows of one day that are not there.
type goneRows struct {
	leaf, batches, rows int64 // leaf is the first one
}

// fault reports something that is not in order.
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
		defer v.history.close()
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
	if first > 0 && v.v.Since.IsZero() { // else the record of the drop may not have been read
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

// chunk verifies the batches up to a leaf, and says where to go on.
func (v *verification) chunk(ctx context.Context, from, to int64) (int64, error) {
	batches, err := v.db.Batches(ctx, from, int(to-from))
	if err != nil {
		return 0, err
	}
	if len(batches) > 0 && batches[0].Leaf >= to {
		v.fault(from, -1, "is missing, and all batches up to %d", batches[0].Leaf-1)
		v.tree.broken = true // from here on, nothing can be said of the tree
		return batches[0].Leaf, nil
	}
	if i := slices.IndexFunc(batches, func(b store.Batch) bool { return b.Leaf >= to }); i >= 0 {
		batches = batches[:i] // there are gaps
	}
	headers := make([]*auditlog.Header, len(batches)) // nil: cannot be read
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

// header compares a batch's columns with its header, and puts what the header says in
// their place. It returns nil if the header cannot be read.
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
		// An empty batch has the day on which it was sent, maybe just after midnight.
		columns = append(columns, column{"day", b.Day.Equal(made) || b.Day.Equal(made.AddDate(0, 0, 1))},
			column{"first_at", b.FirstAt.IsZero()}, column{"last_at", b.LastAt.IsZero()})
	case h.Version > 1:
		columns = append(columns, column{"day", b.Day.Equal(DayOf(h.First))},
			column{"first_at", b.FirstAt.Equal(h.First)}, column{"last_at", b.LastAt.Equal(h.Last)})
		b.Day, b.FirstAt, b.LastAt = DayOf(h.First), h.First, h.Last
	default:
		// Version 1 does not have the times: the rows tell them, if they are there. They are
		// at most a day older than their batch.
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

// older reports whether a batch has only rows from before the time to verify from.
func (v *verification) older(h auditlog.Header) bool {
	last := h.Last
	if last.IsZero() {
		last = h.Made // of an empty batch, or one of version 1: its rows are not younger
	}
	return last.Before(v.v.Since)
}

func DayOf(t time.Time) time.Time { return t.UTC().Truncate(24 * time.Hour) }

// event takes notice of an event whose record is one of those that the tree commits
// to. Events come in the order of the log.
func (v *verification) event(h auditlog.Header, rec *cedarpostv1.EventRecord) {
	if h.Made.After(time.Now().Add(clockLeeway)) {
		return // its time is made up, so nothing that depends on it is believed
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
			return // not believed: the day was too young
		}
		before := drop.GetFirstLeaf()
		switch {
		case day.After(v.droppedDay):
			v.droppedDay, v.droppedBefore = day, before
		case day.Equal(v.droppedDay):
			if before > 0 && (v.droppedBefore == 0 || before < v.droppedBefore) {
				v.droppedBefore = before // of several records the strictest one counts
			}
		}
	}
}

// allGone notes a batch that has no rows any more. Where the partition of their day is
// gone too, goneDays decides.
func (v *verification) allGone(ctx context.Context, b store.Batch) error {
	gone, known := v.isGone[b.Day]
	if !known {
		var err error
		if gone, err = v.db.DayGone(ctx, b.Day); err != nil {
			return err
		}
		v.isGone[b.Day] = gone
	}
	if !gone {
		v.fault(b.Leaf, -1, "all %d rows are missing, and their day was not dropped", b.Rows)
		return nil
	}
	if v.rootDay.After(b.Day.AddDate(0, 0, 1)) {
		// A caller with the right to append can forge a batch of a dropped day. Such a batch
		// must not excuse revisions that have no event.
		v.fault(b.Leaf, -1, "all %d rows are missing, and the batch was appended more than a day after their day", b.Rows)
		return nil
	}
	if v.history != nil {
		v.history.missing(1)
	}
	g := v.gone[b.Day]
	if g == nil {
		g = &goneRows{leaf: b.Leaf}
		v.gone[b.Day] = g
	}
	g.batches++
	g.rows += int64(b.Rows)
	return nil
}

// droppedMeanwhile reads what was appended since the verification began, if a day may
// have been dropped meanwhile: the record of that is there.
func (v *verification) droppedMeanwhile(ctx context.Context, end int64) error {
	for day := range v.gone {
		if v.droppedDay.IsZero() || day.After(v.droppedDay) {
			now, err := v.db.NextLeaf(ctx)
			for from := end; from < now && err == nil; {
				from, err = v.chunk(ctx, from, min(from+verifyBatches, now))
			}
			return err
		}
	}
	return nil
}

// goneDays takes missing rows for dropped ones, where the log proves that their day was
// dropped: days go oldest first, so the record of one stands for all before it.
func (v *verification) goneDays() {
	for _, day := range slices.SortedFunc(maps.Keys(v.gone), time.Time.Compare) {
		g := v.gone[day]
		if v.droppedDay.IsZero() || day.After(v.droppedDay) {
			v.fault(g.leaf, -1, "all %d rows of %d batches of %s are missing, and no record in the log made at least %.4g days after that day says that it was dropped",
				g.rows, g.batches, day.Format(time.DateOnly), v.v.MinRetention.Hours()/24)
			continue
		}
		v.done.Dropped += g.rows
		v.done.Batches += g.batches
	}
}

// head makes sure that the batches before the first one are those of dropped days: the
// owner of the database may remove them in whole tiles of the tree.
func (v *verification) head(ctx context.Context, first int64) error {
	batches, err := v.db.Batches(ctx, first, 1)
	if err != nil {
		return err
	}
	var day time.Time
	if len(batches) > 0 {
		if h, err := auditlog.ParseHeader(batches[0].Header); err == nil {
			day = DayOf(h.Made)
		}
	}
	dropped := first%(1<<auditlog.TileHeight) == 0 && !v.droppedDay.IsZero() && !day.IsZero() &&
		!day.After(v.droppedDay.AddDate(0, 0, 1)) && (v.droppedBefore == 0 || first <= v.droppedBefore)
	if !dropped {
		v.fault(0, -1, "is missing, and all batches up to %d: no record in the log says that they are of dropped days", first-1)
	}
	return nil
}
