package decisionlog

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/cedarpost/cedarpost/auditlog"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/wire"
	"github.com/cedarpost/cedarpost/store"
)

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
			// One batch has far too many rows, and the limit cut off rows of others. Read each
			// batch alone.
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

// rows verifies the rows of one batch. found also has rows of other batches.
func (v *verification) rows(ctx context.Context, b store.Batch, h auditlog.Header, found store.LogRows) error {
	decisions, events := rowsOf(b, found)
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
		rec, err := checkDecision(d)
		if err := cmp.Or(checkBytes(d.Record, d.CRC), err, isDecision(d.Record, rec)); err != nil {
			v.fault(b.Leaf, d.Pos, "decision %s: %s", d.ID, err)
			good = false
		}
	}
	records := make([]*cedarpostv1.EventRecord, len(events))
	for i, e := range events {
		see(e.At)
		rec, err := checkEvent(e)
		if err := cmp.Or(checkBytes(e.Record, e.CRC), err, isEvent(e.Record, rec)); err != nil {
			v.fault(b.Leaf, e.Pos, "event %s: %s", e.ID, err)
			good = false
		}
		records[i] = rec
	}
	leaves, faults := RowHashes(b, found)
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

// whichRow lists the rows of a batch with a wrong root. The root does not tell which row is
// wrong.
func whichRow(b store.Batch, found store.LogRows) string {
	var ids []string
	decisions, events := rowsOf(b, found)
	for _, d := range decisions {
		ids = append(ids, d.ID.String())
	}
	for _, e := range events {
		ids = append(ids, e.ID.String())
	}
	const most = 5
	if len(ids) > most {
		ids = append(ids[:most], fmt.Sprintf("and %d more", len(ids)-most))
	}
	return "; it is one of " + strings.Join(ids, ", ")
}

// isDecision checks that a record is the record of a decision. The tree does not commit to
// the table of a row, and most records of decisions can be read as an event, too.
func isDecision(record []byte, rec *cedarpostv1.DecisionRecord) error {
	if wire.CheckFields(record, rec.ProtoReflect().Descriptor()) != nil || rec.GetPrincipal() == nil || rec.GetAction() == nil || rec.GetResource() == nil ||
		rec.GetDecision() != cedarpostv1.Decision_ALLOW && rec.GetDecision() != cedarpostv1.Decision_DENY {
		return errors.New("its record is not that of a decision, or has fields that this version does not know")
	}
	return nil
}

// isEvent checks that a record is the record of an event: of a known kind, with the detail of
// that kind and no unknown fields.
func isEvent(record []byte, rec *cedarpostv1.EventRecord) error {
	m := rec.ProtoReflect()
	detail := m.WhichOneof(m.Descriptor().Oneofs().ByName("detail"))
	if wire.CheckFields(record, m.Descriptor()) != nil || detail == nil || !strings.EqualFold(string(detail.Name()), rec.Kind.String()) {
		return errors.New("its record is not that of an event, or has fields that this version does not know")
	}
	return nil
}

// shape checks that the tables are plain tables, so that reads return what is stored, and that
// no batch is stored twice.
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

// strays finds rows of the tables that belong to no batch of the log.
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

// rowsOf returns the rows of a batch. found must be sorted by batch.
func rowsOf(b store.Batch, found store.LogRows) ([]store.Decision, []store.Event) {
	return of(found.Decisions, b.ID, func(d store.Decision) uuid.UUID { return d.Batch }),
		of(found.Events, b.ID, func(e store.Event) uuid.UUID { return e.Batch })
}

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

// RowHashes returns the hashes of the rows of a batch, in order: the leaves of the tree of the
// batch. found must have its rows, sorted by batch, and may have rows of other batches. If a
// place of the batch has no row, or more than one, there are faults.
func RowHashes(b store.Batch, found store.LogRows) (leaves []tlog.Hash, faults []Fault) {
	places := map[int]tlog.Hash{}
	put := func(pos int, record []byte) {
		if _, taken := places[pos]; pos < 0 || pos >= b.Rows || taken {
			faults = append(faults, Fault{b.Leaf, pos, "another row has this place, or the batch has no such place"})
			return
		}
		places[pos] = auditlog.Hash(record)
	}
	decisions, events := rowsOf(b, found)
	for _, d := range decisions {
		put(d.Pos, d.Record)
	}
	for _, e := range events {
		put(e.Pos, e.Record)
	}
	for pos := range b.Rows {
		hash, there := places[pos]
		if !there {
			// Only the first missing row is a fault: a forged header can name any number of rows.
			return nil, append(faults, Fault{b.Leaf, pos, fmt.Sprintf("is missing; %d of %d rows are there", len(places), b.Rows)})
		}
		leaves = append(leaves, hash)
	}
	return leaves, faults
}

// checkBytes compares a record with its checksum. The checksum proves nothing, because
// anybody can compute it, but it tells which row of a batch was altered.
func checkBytes(record []byte, crc int32) error {
	if store.Checksum(record) != crc {
		return errors.New("its record was altered")
	}
	return nil
}
