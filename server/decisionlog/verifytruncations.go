package decisionlog

import (
	"cmp"
	"context"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/cedarpost/cedarpost/auditlog"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// stated has the statements of truncation of one log.
type stated struct {
	auditlog.Statements
	kept, inLog int64                                    // the largest epoch in Against, and in the log
	found       map[auditlog.Truncation]*TruncationFound // signed with a given key
}

func (v *verification) truncationsOf(origin string) *stated {
	if v.stated[origin] == nil {
		v.stated[origin] = &stated{found: map[auditlog.Truncation]*TruncationFound{}}
	}
	return v.stated[origin]
}

// statement adds a statement of truncation that was kept elsewhere or is in the log. One that
// is not signed with a given key excuses nothing, and is not a fault by itself. bad is the
// format of the fault of a statement that cannot be used.
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

// olderStatements reads the statements of truncation in events before Verification.Since. Their
// signatures prove them, so their events need not be verified.
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

// sawEpoch notes the epoch of a checkpoint in the database that a given key signed.
func (v *verification) sawEpoch(c auditlog.Checkpoint) {
	s := v.truncationsOf(c.Origin)
	s.inLog = max(s.inLog, c.Epoch)
}

// truncations lists the statements that were found. A statement that was kept elsewhere must
// also be in the log, unless a later truncation lost it or its day was dropped.
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
		dropped := !v.droppedDay.IsZero() && !DayOf(f.Time).After(v.droppedDay)
		if f.Kept && !f.InLog && !again && !dropped && v.v.Since.IsZero() {
			v.fault(-1, -1, "the statement of %s that %d batches were lost is not in the log: it is recorded when a server signs again", f.Time.Format(time.RFC3339), f.Lost())
		}
	}
}
