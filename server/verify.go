package server

import (
	"bytes"
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/google/uuid"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/cedarpost/cedarpost/auditlog"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/store"
)

// Verification says what of a log to verify, and against what.
type Verification struct {
	// Since verifies rows and batches from this time on; the zero time: all.
	Since time.Time
	// Keys are those that checkpoints must be signed with. Without any, signatures are
	// not looked at.
	Keys []note.Verifier
	// Against are signed checkpoints that were kept elsewhere.
	Against [][]byte
	// Progress, if not nil, is called now and then.
	Progress func(Verified)
}

// Verified counts what was found to be in order.
type Verified struct {
	Batches, Decisions, Events int64
	// Total is how many batches there are to verify.
	Total int64
	// Dropped are rows of days that were dropped, as the log itself says.
	Dropped int64
	// Size is what the newest checkpoint covers; Unsigned are the batches after it.
	Size, Unsigned int64
	// Checkpoints that were compared with the tree.
	Checkpoints int64
}

// A BadLogError names the first thing in a log that is not in order.
type BadLogError struct {
	Leaf int64  // of the batch, or -1
	Row  int    // in the batch, or -1
	What string // in words
}

// Error names the place and the reason.
func (e *BadLogError) Error() string {
	switch {
	case e.Leaf < 0:
		return e.What
	case e.Row < 0:
		return fmt.Sprintf("batch %d: %s", e.Leaf, e.What)
	}
	return fmt.Sprintf("batch %d, row %d: %s", e.Leaf, e.Row, e.What)
}

func badBatch(leaf int64, format string, args ...any) error {
	return &BadLogError{leaf, -1, fmt.Sprintf(format, args...)}
}

const (
	verifyBatches = 1 << 12 // leaves added to the tree at once
	verifyRows    = 5_000   // rows read at once, about
)

// VerifyLog recomputes the log: each row from its bytes, each batch from its rows,
// the tree from the batches, and compares every step with what is stored and with
// what was signed. The error is a [*BadLogError] when something is not in order.
//
// It reads while the log grows, and ends at what there was when it began.
func VerifyLog(ctx context.Context, db *store.DB, v Verification) (Verified, error) {
	run := &verification{db: db, v: v}
	err := run.verify(ctx)
	return run.done, err
}

type verification struct {
	db   *store.DB
	v    Verification
	read auditlog.Tiles // of the tree as it is stored; a new one for each part, since it keeps what it read
	done Verified
}

func (v *verification) verify(ctx context.Context) error {
	latest, err := v.db.LatestCheckpoint(ctx, "")
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return err
	}
	v.done.Size = latest.Size
	end, err := v.db.NextLeaf(ctx)
	if err != nil {
		return err
	}
	if end < latest.Size {
		return badBatch(end, "is missing: %d were signed", latest.Size)
	}
	v.done.Unsigned = end - latest.Size
	start := int64(0)
	if !v.v.Since.IsZero() {
		if start, err = v.db.FindBatch(ctx, 0, v.v.Since); err != nil {
			return err
		}
	}
	v.done.Total = end - start
	for from := start; from < end; {
		v.read = v.db.Tiles(ctx)
		batches, err := v.db.Batches(ctx, from, int(min(verifyBatches, end-from)))
		if err != nil {
			return err
		}
		if err := v.batches(ctx, from, batches); err != nil {
			return err
		}
		if int64(len(batches)) < min(verifyBatches, end-from) {
			return badBatch(from+int64(len(batches)), "is missing")
		}
		if err := v.tree(from, batches, latest.Size); err != nil {
			return err
		}
		from += int64(len(batches))
	}
	if err := v.checkpoints(ctx, start); err != nil {
		return err
	}
	return v.against(latest.Size)
}

// batches verifies headers and rows.
func (v *verification) batches(ctx context.Context, from int64, batches []store.Batch) error {
	for len(batches) > 0 {
		n, rows := 0, 0
		for n < len(batches) && (n == 0 || rows+batches[n].Rows <= verifyRows) {
			rows += batches[n].Rows
			n++
		}
		some := batches[:n]
		for i, b := range some {
			if err := checkHeader(from+int64(i), b); err != nil {
				return err
			}
		}
		found, err := v.db.RowsOf(ctx, some)
		if err != nil {
			return err
		}
		for _, b := range some {
			if err := v.rows(ctx, b, found); err != nil {
				return err
			}
		}
		batches, from = batches[n:], from+int64(n)
		if v.v.Progress != nil {
			v.v.Progress(v.done)
		}
	}
	return nil
}

// checkHeader compares a batch's columns with its header.
func checkHeader(leaf int64, b store.Batch) error {
	if b.Leaf != leaf {
		return badBatch(leaf, "is missing")
	}
	h, err := auditlog.ParseHeader(b.Header)
	if err != nil {
		return badBatch(leaf, "its header cannot be read")
	}
	for _, c := range []struct {
		name string
		same bool
	}{
		{"batch", h.Batch == b.ID}, {"writer", h.Writer == b.Writer},
		{"writer_seq", h.WriterSeq == b.WriterSeq}, {"rows", h.Rows == b.Rows},
		{"first_at", b.FirstAt.IsZero() == (h.Rows == 0)}, {"last_at", b.LastAt.IsZero() == (h.Rows == 0)},
	} {
		if !c.same {
			return badBatch(leaf, "column %s is not what its header says", c.name)
		}
	}
	return nil
}

// rows verifies the rows of one batch, which are among those found.
func (v *verification) rows(ctx context.Context, b store.Batch, found store.LogRows) error {
	leaves, err := rowHashes(b, found)
	if err != nil {
		return v.excuse(ctx, b, err)
	}
	h, err := auditlog.ParseHeader(b.Header)
	if err != nil {
		return badBatch(b.Leaf, "its header cannot be read")
	}
	for _, d := range of(found.Decisions, b.ID, func(d store.Decision) uuid.UUID { return d.Batch }) {
		if err := cmp.Or(checkBytes(d.Record, d.CRC), checkDecision(d)); err != nil {
			return &BadLogError{b.Leaf, d.Pos, fmt.Sprintf("decision %s: %s", d.ID, err)}
		}
		v.done.Decisions++
	}
	for _, e := range of(found.Events, b.ID, func(e store.Event) uuid.UUID { return e.Batch }) {
		if err := cmp.Or(checkBytes(e.Record, e.CRC), checkEvent(e)); err != nil {
			return &BadLogError{b.Leaf, e.Pos, fmt.Sprintf("event %s: %s", e.ID, err)}
		}
		v.done.Events++
	}
	if auditlog.Root(leaves) != h.Root {
		return badBatch(b.Leaf, "a record was altered, or rows changed places: they are not those its header commits to%s", whichRow(b, found))
	}
	v.done.Batches++
	return nil
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

// excuse takes missing rows for dropped ones, where the log says that their day was
// dropped.
func (v *verification) excuse(ctx context.Context, b store.Batch, missing error) error {
	day := b.Day.Format(time.DateOnly)
	dropped, err := v.db.DayDropped(ctx, day)
	if err != nil {
		return err
	}
	if !dropped {
		return missing
	}
	v.done.Dropped += int64(b.Rows)
	v.done.Batches++
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
func rowHashes(b store.Batch, found store.LogRows) ([]tlog.Hash, error) {
	leaves := make([]tlog.Hash, b.Rows)
	taken := make([]bool, b.Rows)
	put := func(pos int, record []byte) error {
		if pos < 0 || pos >= b.Rows || taken[pos] {
			return &BadLogError{b.Leaf, pos, "stands there twice, or is one too many"}
		}
		leaves[pos], taken[pos] = auditlog.Hash(record), true
		return nil
	}
	for _, d := range of(found.Decisions, b.ID, func(d store.Decision) uuid.UUID { return d.Batch }) {
		if err := put(d.Pos, d.Record); err != nil {
			return nil, err
		}
	}
	for _, e := range of(found.Events, b.ID, func(e store.Event) uuid.UUID { return e.Batch }) {
		if err := put(e.Pos, e.Record); err != nil {
			return nil, err
		}
	}
	if i := slices.Index(taken, false); i >= 0 {
		return nil, &BadLogError{b.Leaf, i, "is missing"}
	}
	return leaves, nil
}

// checkBytes finds a record that was altered by someone who forgot its checksum.
// That proves nothing, but names the row.
func checkBytes(record []byte, crc int32) error {
	if store.Checksum(record) != crc {
		return errors.New("its record was altered")
	}
	return nil
}

// checkDecision compares the columns of a row with its record.
func checkDecision(d store.Decision) error {
	rec := &cedarpostv1.DecisionRecord{}
	if err := proto.Unmarshal(d.Record, rec); err != nil {
		return errors.New("its record cannot be read")
	}
	want, err := decisionRow(rec, d.Record)
	if err != nil {
		return err
	}
	var policies, fields []string
	policies, fields = append(policies, d.Policies...), append(fields, d.Fields...)
	for _, c := range []struct {
		name string
		same bool
	}{
		{"decision_id", d.ID == want.ID}, {"at", d.At.Equal(want.At)}, {"revision", d.Revision == want.Revision},
		{"caller", d.Caller == want.Caller}, {"server", d.Server == want.Server},
		{"principal", d.Principal == want.Principal}, {"action", d.Action == want.Action}, {"resource", d.Resource == want.Resource},
		{"allowed", d.Allowed == want.Allowed}, {"denied_at", d.DeniedAt == want.DeniedAt},
		{"policies", slices.Equal(policies, want.Policies)}, {"fields", slices.Equal(fields, want.Fields)},
		{"masked", sameHashes(d.Masked, want.Masked)},
		{"request_id", d.RequestID == want.RequestID}, {"trace_id", d.TraceID == want.TraceID},
	} {
		if !c.same {
			return fmt.Errorf("column %s is not what its record says", c.name)
		}
	}
	return nil
}

// decisionRow is the row that a record must have: its columns are what the record
// says. record are the bytes of rec.
func decisionRow(rec *cedarpostv1.DecisionRecord, record []byte) (store.Decision, error) {
	id, err := uuid.Parse(rec.DecisionId)
	if err != nil {
		return store.Decision{}, fmt.Errorf("record: %w", err)
	}
	row := store.Decision{
		ID: id, At: rec.Time.AsTime(), Revision: rec.Revision, Caller: rec.Caller, Server: rec.Server,
		Principal: protoToStore(rec.Principal), Action: protoToStore(rec.Action), Resource: protoToStore(rec.Resource),
		Allowed: rec.Decision == cedarpostv1.Decision_ALLOW, DeniedAt: int16(rec.GetDeniedAt()),
		RequestID: rec.RequestId, TraceID: rec.TraceId, Record: record,
	}
	for _, p := range rec.DeterminingPolicies {
		row.Policies = append(row.Policies, p.Bundle+"/"+p.Id)
	}
	row.Fields = decidedFields(rec.Fields.GetPermitted(), rec.Fields.GetDenied())
	collectMasked(structpb.NewStructValue(rec.Context), &row.Masked)
	for _, e := range rec.Entities {
		collectMasked(structpb.NewStructValue(e.Attrs), &row.Masked)
		collectMasked(structpb.NewStructValue(e.Tags), &row.Masked)
	}
	return row, nil
}

// collectMasked finds the hashes that stand in a record for sensitive values.
func collectMasked(v *structpb.Value, into *[][]byte) {
	for _, e := range v.GetListValue().GetValues() {
		collectMasked(e, into)
	}
	fields := v.GetStructValue().GetFields()
	if hash, err := hex.DecodeString(fields["__masked"].GetStringValue()); err == nil && len(fields) == 1 && len(hash) > 0 {
		*into = append(*into, hash)
		return
	}
	for _, e := range fields {
		collectMasked(e, into)
	}
}

// sameHashes compares hashes in any order.
func sameHashes(a, b [][]byte) bool {
	return slices.EqualFunc(slices.SortedFunc(slices.Values(a), bytes.Compare), slices.SortedFunc(slices.Values(b), bytes.Compare), bytes.Equal)
}

// tree computes the tiles of leaves from the headers, and compares them with those
// stored, as far as the tree goes.
func (v *verification) tree(from int64, batches []store.Batch, size int64) error {
	if from >= size {
		return nil
	}
	batches = batches[:min(int64(len(batches)), size-from)]
	// What is read of the tree before is either verified, or that of a time before
	// since, and then the root of a checkpoint that follows depends on it.
	_, tiles, err := grow(from, batches, v.read)
	if err != nil {
		return err
	}
	ids := make([]auditlog.TileID, len(tiles))
	for i, t := range tiles {
		ids[i] = t.TileID
	}
	stored, err := v.read(ids)
	if errors.Is(err, store.ErrNotFound) {
		return badBatch(from, "the tree of the batches from here on is not whole: %v", err)
	}
	if err != nil {
		return err
	}
	for i, t := range tiles {
		if !bytes.HasPrefix(stored[i], t.Hashes) {
			leaf := t.Tile << (auditlog.TileHeight * (t.Level + 1))
			return badBatch(leaf, "the tree is not that of the batches: tile %d of level %d, which begins there", t.Tile, t.Level)
		}
	}
	return nil
}

const checkpointPage = 1000

// checkpoints compares those in the database with the tree.
func (v *verification) checkpoints(ctx context.Context, after int64) error {
	for {
		v.read = v.db.Tiles(ctx)
		page, err := v.db.Checkpoints(ctx, after, checkpointPage)
		if err != nil {
			return err
		}
		for _, c := range page {
			if err := v.checkpoint(c.Note, c.Size, "in the database"); err != nil {
				return err
			}
			after = c.Size
		}
		if len(page) < checkpointPage {
			return nil
		}
	}
}

// against compares checkpoints that were kept elsewhere with the tree.
func (v *verification) against(size int64) error {
	for _, signed := range v.v.Against {
		c, err := auditlog.PeekCheckpoint(signed)
		if err != nil {
			return &BadLogError{-1, -1, "a checkpoint to compare with cannot be read"}
		}
		if c.Size > size {
			return badBatch(size, "the log was cut off: a checkpoint that was kept elsewhere covers %d batches, the database has %d", c.Size, size)
		}
		if err := v.checkpoint(signed, c.Size, "kept elsewhere"); err != nil {
			return err
		}
	}
	return nil
}

// checkpoint compares one with the tree, which has been verified up to there.
func (v *verification) checkpoint(signed []byte, size int64, where string) error {
	c, err := auditlog.PeekCheckpoint(signed)
	if err == nil && len(v.v.Keys) > 0 {
		c, err = auditlog.OpenCheckpoint(signed, v.v.Keys...)
	}
	name := fmt.Sprintf("the checkpoint of size %d %s", size, where)
	if err != nil {
		return &BadLogError{-1, -1, fmt.Sprintf("%s: %s", name, err)}
	}
	root, err := tlog.TreeHash(c.Size, v.read)
	if err != nil {
		return err
	}
	if c.Size != size || root != c.Root {
		return &BadLogError{-1, -1, fmt.Sprintf("%s is not of the same log: the tree has another root", name)}
	}
	v.done.Checkpoints++
	return nil
}
