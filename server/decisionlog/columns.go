package decisionlog

import (
	"bytes"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/server/wire"
	"github.com/cedarpost/cedarpost/store"
)

// The columns of a row are copies of parts of its record, by which queries find it. The
// writer and the verifier derive them with the same two functions, DecisionRow and eventRow.

// DecisionRow returns the row of the record of a decision. record must be the encoding of
// rec. The error is that rec has no valid id.
func DecisionRow(rec *cedarpostv1.DecisionRecord, record []byte) (store.Decision, error) {
	id, err := uuid.Parse(rec.DecisionId)
	if err != nil {
		return store.Decision{}, fmt.Errorf("record: %w", err)
	}
	row := store.Decision{
		ID: id, At: rec.Time.AsTime(), Revision: rec.Revision, Caller: rec.Caller, Server: rec.Server,
		Principal: stored.FromProto(rec.Principal), Action: stored.FromProto(rec.Action), Resource: stored.FromProto(rec.Resource),
		Allowed: rec.Decision == cedarpostv1.Decision_ALLOW, DeniedAt: int16(rec.GetDeniedAt()),
		Fields:    decidedFields(rec.Fields.GetPermitted(), rec.Fields.GetDenied()),
		RequestID: rec.RequestId, TraceID: rec.TraceId, Record: record,
	}
	for _, p := range rec.DeterminingPolicies {
		row.Policies = append(row.Policies, wire.PolicyName(p))
	}
	if len(rec.Masked) > 0 {
		collectMasked(structpb.NewStructValue(rec.Context), &row.Masked)
		for _, e := range rec.Entities {
			collectMasked(structpb.NewStructValue(e.Attrs), &row.Masked)
			collectMasked(structpb.NewStructValue(e.Tags), &row.Masked)
		}
	}
	return row, nil
}

// eventRow returns the row of the record of an event. record must be the encoding of rec.
func eventRow(rec *cedarpostv1.EventRecord, record []byte) (store.Event, error) {
	id, err := uuid.Parse(rec.EventId)
	if err != nil {
		return store.Event{}, fmt.Errorf("record: %w", err)
	}
	decisions, err := reusedBy(rec)
	return store.Event{
		ID: id, At: rec.Time.AsTime(), Kind: strings.ToLower(rec.Kind.String()), Caller: rec.Caller, Server: rec.Server,
		Subject: rec.Subject, Revision: rec.Revision, RequestID: rec.RequestId, TraceID: rec.TraceId,
		Decisions: decisions, Record: record,
	}, err
}

var errUnreadable = errors.New("its record cannot be read")

// checkDecision compares the columns of a row with its record. It returns the record if it
// can be read.
func checkDecision(d store.Decision) (*cedarpostv1.DecisionRecord, error) {
	rec := &cedarpostv1.DecisionRecord{}
	if proto.Unmarshal(d.Record, rec) != nil {
		return nil, errUnreadable
	}
	want, err := DecisionRow(rec, d.Record)
	if err != nil {
		return rec, err
	}
	return rec, firstDifferent([]column{
		{"decision_id", d.ID == want.ID}, {"at", d.At.Equal(want.At)}, {"revision", d.Revision == want.Revision},
		{"caller", d.Caller == want.Caller}, {"server", d.Server == want.Server},
		{"principal", d.Principal == want.Principal}, {"action", d.Action == want.Action}, {"resource", d.Resource == want.Resource},
		{"allowed", d.Allowed == want.Allowed}, {"denied_at", d.DeniedAt == want.DeniedAt},
		{"policies", slices.Equal(d.Policies, want.Policies)}, {"fields", slices.Equal(d.Fields, want.Fields)},
		{"masked", sameHashes(d.Masked, want.Masked)},
		{"request_id", d.RequestID == want.RequestID}, {"trace_id", d.TraceID == want.TraceID},
	})
}

// checkEvent compares the columns of a row with its record. It returns the record if it
// can be read.
func checkEvent(e store.Event) (*cedarpostv1.EventRecord, error) {
	rec := &cedarpostv1.EventRecord{}
	if proto.Unmarshal(e.Record, rec) != nil {
		return nil, errUnreadable
	}
	want, err := eventRow(rec, e.Record)
	if err != nil {
		return rec, err
	}
	return rec, firstDifferent([]column{
		{"event_id", e.ID == want.ID}, {"at", e.At.Equal(want.At)}, {"kind", e.Kind == want.Kind},
		{"caller", e.Caller == want.Caller}, {"server", e.Server == want.Server}, {"subject", e.Subject == want.Subject},
		{"revision", e.Revision == want.Revision}, {"request_id", e.RequestID == want.RequestID},
		{"trace_id", e.TraceID == want.TraceID}, {"decisions", slices.Equal(e.Decisions, want.Decisions)},
	})
}

// column tells whether a column has the value that follows from the record.
type column struct {
	name string
	same bool
}

func firstDifferent(columns []column) error {
	for _, c := range columns {
		if !c.same {
			return fmt.Errorf("column %s is not what its record says", c.name)
		}
	}
	return nil
}

// collectMasked appends the hashes of masked values in v to into, in the order of the paths
// that the record lists.
func collectMasked(v *structpb.Value, into *[][]byte) {
	for _, e := range v.GetListValue().GetValues() {
		collectMasked(e, into)
	}
	fields := v.GetStructValue().GetFields()
	if hash, err := hex.DecodeString(fields[engine.MaskedKey].GetStringValue()); err == nil && len(fields) == 1 && len(hash) > 0 {
		*into = append(*into, hash)
		return
	}
	for _, name := range slices.Sorted(maps.Keys(fields)) {
		collectMasked(fields[name], into)
	}
}

// sameHashes compares hashes in any order.
func sameHashes(a, b [][]byte) bool {
	return slices.EqualFunc(slices.SortedFunc(slices.Values(a), bytes.Compare), slices.SortedFunc(slices.Values(b), bytes.Compare), bytes.Equal)
}

// decidedFields returns the column by which queries find decisions about a field: "+path"
// for a permitted field and "-path" for a denied one, sorted.
func decidedFields(permitted, denied []string) []string {
	size := len(permitted) + len(denied)
	if size == 0 {
		return nil
	}
	out := make([]string, 0, size)
	for _, list := range [][]string{permitted, denied} {
		for _, path := range list {
			size += len(path)
		}
	}
	var all strings.Builder // one allocation for all paths
	all.Grow(size)
	add := func(sign byte, paths []string) {
		for _, path := range paths {
			start := all.Len()
			all.WriteByte(sign)
			all.WriteString(path)
			out = append(out, all.String()[start:])
		}
	}
	add('+', permitted)
	add('-', denied)
	slices.Sort(out)
	return out
}

// reusedBy returns the column by which queries find uses of a decision: the ids of the
// decisions that were used again, in the order of the record.
func reusedBy(rec *cedarpostv1.EventRecord) (ids []uuid.UUID, err error) {
	for _, r := range rec.GetReuse().GetReuses() {
		id, err := uuid.Parse(r.GetDecisionId())
		if err != nil {
			return nil, fmt.Errorf("record: %w", err)
		}
		ids = append(ids, id)
	}
	return ids, nil
}
