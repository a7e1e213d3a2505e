package decisionlog

import (
	"cmp"
	"errors"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/store"
)

// A row of the log is damaged if its record cannot be read, or does not match its checksum
// or its columns. Reads return, in place of the record, one that has only the id and the
// time of the row and says what is wrong.

// errSaysDamaged is the fault of a stored record whose field damaged is set. Only reads set
// it.
var errSaysDamaged = errors.New("its record says by itself that it is damaged")

// ReadDecision returns the record of a row. If the row is damaged, the record has only its
// id, its time and, in Damaged, what is wrong.
func ReadDecision(row store.Decision) *cedarpostv1.DecisionRecord {
	rec, err := checkDecision(row)
	damage := cmp.Or(checkBytes(row.Record, row.CRC), err)
	if damage == nil && rec.Damaged != "" {
		damage = errSaysDamaged
	}
	if damage != nil {
		return &cedarpostv1.DecisionRecord{DecisionId: row.ID.String(), Time: timestamppb.New(row.At), Damaged: damage.Error()}
	}
	return rec
}

// ReadEvent returns the record of a row. If the row is damaged, the record has only its id,
// its time and, in Damaged, what is wrong.
func ReadEvent(row store.Event) *cedarpostv1.EventRecord {
	rec, err := checkEvent(row)
	damage := cmp.Or(checkBytes(row.Record, row.CRC), err)
	if damage == nil && rec.Damaged != "" {
		damage = errSaysDamaged
	}
	if damage != nil {
		return &cedarpostv1.EventRecord{EventId: row.ID.String(), Time: timestamppb.New(row.At), Damaged: damage.Error()}
	}
	return rec
}

// ReadEntry returns the record of a row of an export, as [ReadDecision] and [ReadEvent] do.
// The row has no columns, so it compares only the checksum and the id.
func ReadEntry(e store.Entry) *cedarpostv1.LogEntry {
	damage := checkBytes(e.Record, e.CRC)
	if e.Event {
		rec := &cedarpostv1.EventRecord{}
		damage = cmp.Or(damage, unmarshal(e, rec, rec.GetEventId, rec.GetDamaged))
		if damage != nil {
			rec = &cedarpostv1.EventRecord{EventId: e.ID.String(), Time: timestamppb.New(e.At), Damaged: damage.Error()}
		}
		return &cedarpostv1.LogEntry{Entry: &cedarpostv1.LogEntry_Event{Event: rec}}
	}
	rec := &cedarpostv1.DecisionRecord{}
	damage = cmp.Or(damage, unmarshal(e, rec, rec.GetDecisionId, rec.GetDamaged))
	if damage != nil {
		rec = &cedarpostv1.DecisionRecord{DecisionId: e.ID.String(), Time: timestamppb.New(e.At), Damaged: damage.Error()}
	}
	return &cedarpostv1.LogEntry{Entry: &cedarpostv1.LogEntry_Decision{Decision: rec}}
}

// unmarshal reads the record of a row into rec. The record must have the id of the row.
func unmarshal(e store.Entry, rec proto.Message, id, damaged func() string) error {
	switch {
	case proto.Unmarshal(e.Record, rec) != nil:
		return errUnreadable
	case id() != e.ID.String():
		return errors.New("its record is of another row")
	case damaged() != "":
		return errSaysDamaged
	}
	return nil
}
