package server

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
	"google.golang.org/protobuf/proto"

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
	made := dayOf(h.Made)
	switch {
	case h.Version > 1 && h.Rows > 0 && (h.First.Before(time.UnixMilli(0)) || h.Last.Before(h.First) || !dayOf(h.First).Equal(dayOf(h.Last))):
		v.fault(b.Leaf, -1, "its header has times that its rows cannot have")
		return nil
	case h.Rows == 0:
		// An empty batch has the day on which it was sent, maybe just after midnight.
		columns = append(columns, column{"day", b.Day.Equal(made) || b.Day.Equal(made.AddDate(0, 0, 1))},
			column{"first_at", b.FirstAt.IsZero()}, column{"last_at", b.LastAt.IsZero()})
	case h.Version > 1:
		columns = append(columns, column{"day", b.Day.Equal(dayOf(h.First))},
			column{"first_at", b.FirstAt.Equal(h.First)}, column{"last_at", b.LastAt.Equal(h.Last)})
		b.Day, b.FirstAt, b.LastAt = dayOf(h.First), h.First, h.Last
	default:
		// Version 1 does not have the times: the rows tell them, if they are there. They are
		// at most a day older than their batch.
		columns = append(columns, column{"day", b.Day.Equal(made) || b.Day.Equal(made.AddDate(0, 0, -1))},
			column{"first_at", dayOf(b.FirstAt).Equal(b.Day)}, column{"last_at", dayOf(b.LastAt).Equal(b.Day) && !b.LastAt.Before(b.FirstAt)})
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

func dayOf(t time.Time) time.Time { return t.UTC().Truncate(24 * time.Hour) }

// group reads and verifies the rows of some batches.
func (v *verification) group(ctx context.Context, batches []store.Batch, headers []*auditlog.Header) error {
	limit := 100
	var young []store.Batch
	for i, b := range batches {
		if headers[i] != nil && !v.older(*headers[i]) {
			limit += b.Rows
			young = append(young, b)
		}
	}
	found, err := v.db.RowsOf(ctx, young, limit)
	if err != nil {
		return err
	}
	if len(found.Decisions) == limit || len(found.Events) == limit {
		if len(batches) > 1 {
			// One of them has far too many rows, which push those of others out.
			for i := range batches {
				if err := v.group(ctx, batches[i:i+1], headers[i:i+1]); err != nil {
					return err
				}
			}
			return nil
		}
		v.fault(batches[0].Leaf, -1, "it has more than the %d rows that its header says", batches[0].Rows)
	}
	for i, b := range batches {
		if headers[i] == nil {
			continue
		}
		if v.older(*headers[i]) {
			v.done.Batches++
			continue
		}
		if err := v.rows(ctx, b, *headers[i], found); err != nil {
			return err
		}
	}
	return nil
}

// rows verifies the rows of one batch, which are among those found.
func (v *verification) rows(ctx context.Context, b store.Batch, h auditlog.Header, found store.LogRows) error {
	decisions := of(found.Decisions, b.ID, func(d store.Decision) uuid.UUID { return d.Batch })
	events := of(found.Events, b.ID, func(e store.Event) uuid.UUID { return e.Batch })
	if h.Rows > 0 && len(decisions)+len(events) == 0 {
		return v.allGone(ctx, b)
	}
	var first, last time.Time
	see := func(at time.Time) {
		if first.IsZero() || at.Before(first) {
			first = at
		}
		if at.After(last) {
			last = at
		}
	}
	good := true
	for _, d := range decisions {
		see(d.At)
		if err := cmp.Or(checkBytes(d.Record, d.CRC), checkDecision(d), isDecision(d.Record)); err != nil {
			v.fault(b.Leaf, d.Pos, "decision %s: %s", d.ID, err)
			good = false
		}
	}
	records := make([]*cedarpostv1.EventRecord, len(events))
	for i, e := range events {
		see(e.At)
		rec, err := checkEvent(e)
		if err := cmp.Or(checkBytes(e.Record, e.CRC), err, isEvent(rec)); err != nil {
			v.fault(b.Leaf, e.Pos, "event %s: %s", e.ID, err)
			good = false
		}
		records[i] = rec
	}
	leaves, faults := rowHashes(b, found)
	for _, f := range faults {
		v.fault(f.Leaf, f.Row, "%s", f.What)
	}
	switch {
	case len(faults) > 0:
		return nil
	case auditlog.Root(leaves) != h.Root:
		v.fault(b.Leaf, -1, "its rows are not those that its header commits to: a record was altered, or two rows changed places%s", whichRow(b, found))
		return nil
	case h.Rows > 0 && (!first.Equal(b.FirstAt) || !last.Equal(b.LastAt)):
		v.fault(b.Leaf, -1, "its rows are not of the time that first_at and last_at say")
		good = false
	}
	if good {
		v.done.Batches++
		v.done.Decisions += int64(len(decisions))
		v.done.Events += int64(len(events))
	}
	for _, rec := range records {
		if rec == nil {
			continue
		}
		v.event(h, rec)
		if v.history != nil {
			if err := v.history.event(ctx, b.Leaf, rec); err != nil {
				return err
			}
		}
	}
	return nil
}

// event takes notice of an event whose record is one of those that the tree commits
// to. Events come in the order of the log.
func (v *verification) event(h auditlog.Header, rec *cedarpostv1.EventRecord) {
	if h.Made.After(time.Now().Add(clockLeeway)) {
		return // its time is made up, so nothing that depends on it is believed
	}
	switch rec.Kind {
	case cedarpostv1.EventRecord_STATE_ROOT:
		if day := dayOf(h.Made); day.After(v.rootDay) {
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

// stated are the truncations of one log.
type stated struct {
	auditlog.Statements
	kept, inLog int64                                    // the largest epochs of what is kept, and of what the log has
	found       map[auditlog.Truncation]*TruncationFound // those that a given key signed
}

func (v *verification) truncationsOf(origin string) *stated {
	if v.stated[origin] == nil {
		v.stated[origin] = &stated{found: map[auditlog.Truncation]*TruncationFound{}}
	}
	return v.stated[origin]
}

// statement takes notice of a statement of truncation that was kept elsewhere or is in the
// log. Without a given key's signature it excuses nothing, and is no fault by itself.
func (v *verification) statement(signed []byte, kept bool, bad string) {
	t, err := auditlog.PeekTruncation(signed)
	if err != nil {
		v.fault(-1, -1, bad, err)
		return
	}
	s := v.truncationsOf(t.Origin)
	if err := s.Add(signed, v.v.Keys...); err != nil {
		v.fault(-1, -1, bad, err)
		return
	}
	if _, err := auditlog.OpenTruncation(signed, v.v.Keys...); err != nil {
		return
	}
	if s.found[t] == nil {
		s.found[t] = &TruncationFound{Truncation: t}
	}
	s.found[t].Kept = s.found[t].Kept || kept
	if !kept {
		s.found[t].InLog = true
		s.inLog = max(s.inLog, t.Number)
	}
}

// olderStatements reads statements of truncation from before the time to verify from. It is
// the signature that makes them count, so their events need not be verified.
func (v *verification) olderStatements(ctx context.Context) error {
	if v.v.Since.IsZero() || len(v.v.Keys) == 0 {
		return nil
	}
	return v.db.EachTruncation(ctx, maxRecord, maxRecorded, func(record []byte) {
		var rec cedarpostv1.EventRecord
		if proto.Unmarshal(record, &rec) != nil {
			return
		}
		signed := []byte(rec.GetLogTruncated().GetStatement())
		t, err := auditlog.OpenTruncation(signed, v.v.Keys...)
		if err != nil {
			return
		}
		s := v.truncationsOf(t.Origin)
		if err := s.Add(signed, v.v.Keys...); err != nil {
			v.fault(-1, -1, "the log has a statement of truncation that does not count: %s", err)
		} else if s.found[t] == nil {
			s.found[t] = &TruncationFound{Truncation: t}
		}
	})
}

// sawEpoch takes notice of the epoch of a checkpoint in the database, which a given key
// signed.
func (v *verification) sawEpoch(c auditlog.Checkpoint) {
	s := v.truncationsOf(c.Origin)
	s.inLog = max(s.inLog, c.Epoch)
}

// truncations lists the statements that were found. One that was kept elsewhere stands in
// the log too, unless the log lost it in a later truncation, or dropped its day.
func (v *verification) truncations() {
	for _, s := range v.stated {
		for _, f := range s.found {
			v.done.Truncations = append(v.done.Truncations, *f)
		}
	}
	slices.SortFunc(v.done.Truncations, func(a, b TruncationFound) int {
		return cmp.Or(cmp.Compare(a.Origin, b.Origin), cmp.Compare(a.Number, b.Number))
	})
	for i, f := range v.done.Truncations {
		again := slices.ContainsFunc(v.done.Truncations[i+1:], func(g TruncationFound) bool { return g.Origin == f.Origin })
		dropped := !v.droppedDay.IsZero() && !dayOf(f.Time).After(v.droppedDay)
		if f.Kept && !f.InLog && !again && !dropped && v.v.Since.IsZero() {
			v.fault(-1, -1, "the statement of %s that %d batches were lost is not in the log: it is recorded when a server signs again", f.Time.Format(time.RFC3339), f.Lost())
		}
	}
}

// whichRow names the rows of a bad batch, for the root alone does not say which.
func whichRow(b store.Batch, found store.LogRows) string {
	var ids []string
	for _, d := range of(found.Decisions, b.ID, func(d store.Decision) uuid.UUID { return d.Batch }) {
		ids = append(ids, d.ID.String())
	}
	for _, e := range of(found.Events, b.ID, func(e store.Event) uuid.UUID { return e.Batch }) {
		ids = append(ids, e.ID.String())
	}
	const most = 5
	if len(ids) > most {
		ids = append(ids[:most], fmt.Sprintf("and %d more", len(ids)-most))
	}
	return "; it is one of " + strings.Join(ids, ", ")
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
			day = dayOf(h.Made)
		}
	}
	dropped := first%(1<<auditlog.TileHeight) == 0 && !v.droppedDay.IsZero() && !day.IsZero() &&
		!day.After(v.droppedDay.AddDate(0, 0, 1)) && (v.droppedBefore == 0 || first <= v.droppedBefore)
	if !dropped {
		v.fault(0, -1, "is missing, and all batches up to %d: no record in the log says that they are of dropped days", first-1)
	}
	return nil
}

// isDecision makes sure that the bytes of a record are those of a decision. The tree
// does not say which table a row is in, and most bytes can be read as an event, too.
func isDecision(record []byte) error {
	rec := &cedarpostv1.DecisionRecord{}
	if err := proto.Unmarshal(record, rec); err != nil || refuseUnknown(rec.ProtoReflect()) != nil ||
		rec.Principal == nil || rec.Action == nil || rec.Resource == nil ||
		rec.Decision != cedarpostv1.Decision_ALLOW && rec.Decision != cedarpostv1.Decision_DENY {
		return errors.New("its record is not that of a decision, or has fields that this version does not know")
	}
	return nil
}

// isEvent makes sure that a record is that of an event: of a known kind, with the detail
// of that kind and nothing else.
func isEvent(rec *cedarpostv1.EventRecord) error {
	m := rec.ProtoReflect()
	detail := m.WhichOneof(m.Descriptor().Oneofs().ByName("detail"))
	if refuseUnknown(m) != nil || detail == nil || !strings.EqualFold(string(detail.Name()), rec.Kind.String()) {
		return errors.New("its record is not that of an event, or has fields that this version does not know")
	}
	return nil
}

// shape makes sure that what is read are the tables themselves, and that no batch is
// there twice.
func (v *verification) shape(ctx context.Context) error {
	odd, err := v.db.OddLogTables(ctx)
	if err != nil {
		return err
	}
	for _, table := range odd {
		v.fault(-1, -1, "%s is not a plain table that shows all of its rows", table)
	}
	twice, err := v.db.DoubledBatches(ctx, maxStrays)
	if err != nil {
		return err
	}
	for _, leaf := range twice {
		v.fault(leaf, -1, "another batch has its id, or the same number of the same writer")
	}
	return nil
}

// strays finds rows that readers of the tables could take for rows of the log.
func (v *verification) strays(ctx context.Context) error {
	rows, err := v.db.StrayRows(ctx, v.v.Since, maxStrays)
	if err != nil {
		return err
	}
	for _, r := range rows {
		kind := "decision"
		if r.Event {
			kind = "event"
		}
		if r.Leaf == nil {
			v.fault(-1, -1, "%s %s of %s belongs to no batch of the log", kind, r.ID, r.At)
		} else {
			v.fault(*r.Leaf, -1, "%s %s of %s names this batch, and is outside of its time or its places", kind, r.ID, r.At)
		}
	}
	return nil
}

// of cuts the rows of one batch out of rows in order of batch.
func of[T any](rows []T, batch uuid.UUID, batchOf func(T) uuid.UUID) []T {
	i, _ := slices.BinarySearchFunc(rows, batch, func(r T, id uuid.UUID) int {
		b := batchOf(r)
		return bytes.Compare(b[:], id[:])
	})
	n := i
	for n < len(rows) && batchOf(rows[n]) == batch {
		n++
	}
	return rows[i:n]
}

// rowHashes are the leaves of a batch, whose rows are among those found. Each place
// must be taken once.
func rowHashes(b store.Batch, found store.LogRows) (leaves []tlog.Hash, faults []Fault) {
	places := map[int]tlog.Hash{}
	put := func(pos int, record []byte) {
		if _, taken := places[pos]; pos < 0 || pos >= b.Rows || taken {
			faults = append(faults, Fault{b.Leaf, pos, "another row has this place, or the batch has no such place"})
			return
		}
		places[pos] = auditlog.Hash(record)
	}
	for _, d := range of(found.Decisions, b.ID, func(d store.Decision) uuid.UUID { return d.Batch }) {
		put(d.Pos, d.Record)
	}
	for _, e := range of(found.Events, b.ID, func(e store.Event) uuid.UUID { return e.Batch }) {
		put(e.Pos, e.Record)
	}
	for pos := range b.Rows {
		hash, there := places[pos]
		if !there {
			// The first one is enough: a header can say any number of rows.
			return nil, append(faults, Fault{b.Leaf, pos, fmt.Sprintf("is missing; %d of %d rows are there", len(places), b.Rows)})
		}
		leaves = append(leaves, hash)
	}
	return leaves, faults
}

// checkBytes finds a record that was altered by someone who forgot its checksum.
// That proves nothing, but names the row.
func checkBytes(record []byte, crc int32) error {
	if store.Checksum(record) != crc {
		return errors.New("its record was altered")
	}
	return nil
}
