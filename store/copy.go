package store

import (
	"encoding/binary"
	"hash/crc32"
	"strings"
	"time"

	"github.com/google/uuid"
)

// The columns of the two tables of the log, in the order in which they are written.
const (
	decisionColumns = `decision_id, at, revision, caller, server,
		principal_type, principal_id, action_type, action_id, resource_type, resource_id,
		allowed, denied_at, policies, request_id, trace_id, fields, masked, record, batch, pos, crc`
	eventColumns = `event_id, at, kind, caller, server, subject, revision, request_id, trace_id, decisions,
		record, batch, pos, crc`
)

const (
	copyDecisions = `copy decisions (` + decisionColumns + `) from stdin (format binary)`
	copyEvents    = `copy events (` + eventColumns + `) from stdin (format binary)`
)

var decisionWidth, eventWidth = countColumns(decisionColumns), countColumns(eventColumns)

func countColumns(list string) uint16 { return uint16(strings.Count(list, ",") + 1) }

const copyHead = "PGCOPY\n\xff\r\n\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// appendDecisions encodes the rows of copyDecisions in the binary format of COPY.
func appendDecisions(b []byte, batch uuid.UUID, decisions []Decision) []byte {
	b = append(b, copyHead...)
	for i := range decisions {
		d := &decisions[i]
		b = binary.BigEndian.AppendUint16(b, decisionWidth)
		b = appendField(b, d.ID[:])
		b = appendInt64(b, idTime(d.ID).UnixMicro()-postgresEpoch)
		b = appendInt64(b, d.Revision)
		for _, s := range [...]string{
			d.Caller, d.Server,
			d.Principal.Type, d.Principal.ID, d.Action.Type, d.Action.ID, d.Resource.Type, d.Resource.ID,
		} {
			b = appendField(b, s)
		}
		b = appendLen(b, 1)
		if d.Allowed {
			b = append(b, 1)
		} else {
			b = append(b, 0)
		}
		if d.DeniedAt == 0 {
			b = appendLen(b, null)
		} else {
			b = appendLen(b, 2)
			b = binary.BigEndian.AppendUint16(b, uint16(d.DeniedAt))
		}
		b = appendArray(b, textOID, d.Policies)
		b = appendOptional(b, d.RequestID)
		b = appendOptional(b, d.TraceID)
		b = appendArray(b, textOID, d.Fields)
		b = appendArray(b, byteaOID, d.Masked)
		b = appendField(b, d.Record)
		b = appendField(b, batch[:])
		b = appendInt32(b, i)
		b = appendInt32(b, int(Checksum(d.Record)))
	}
	return binary.BigEndian.AppendUint16(b, 0xffff)
}

// appendEvents encodes the rows of copyEvents. pos is the place of the first in its
// batch.
func appendEvents(b []byte, batch uuid.UUID, events []Event, pos int) []byte {
	b = append(b, copyHead...)
	for i := range events {
		e := &events[i]
		b = binary.BigEndian.AppendUint16(b, eventWidth)
		b = appendField(b, e.ID[:])
		b = appendInt64(b, idTime(e.ID).UnixMicro()-postgresEpoch)
		for _, s := range [...]string{e.Kind, e.Caller, e.Server, e.Subject} {
			b = appendField(b, s)
		}
		if e.Revision == 0 {
			b = appendLen(b, null)
		} else {
			b = appendInt64(b, e.Revision)
		}
		b = appendOptional(b, e.RequestID)
		b = appendOptional(b, e.TraceID)
		b = appendArray(b, uuidOID, uuidBytes(e.Decisions))
		b = appendField(b, e.Record)
		b = appendField(b, batch[:])
		b = appendInt32(b, pos+i)
		b = appendInt32(b, int(Checksum(e.Record)))
	}
	return binary.BigEndian.AppendUint16(b, 0xffff)
}

const (
	null          = -1
	byteaOID      = 17
	textOID       = 25
	uuidOID       = 2950
	postgresEpoch = 946684800_000000 // 2000-01-01 in microseconds since 1970
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// Checksum is the CRC-32C of a record, which is stored in the row of the record.
func Checksum(record []byte) int32 { return int32(crc32.Checksum(record, castagnoli)) }

func appendLen(b []byte, n int) []byte { return binary.BigEndian.AppendUint32(b, uint32(int32(n))) }

func appendField[T string | []byte](b []byte, value T) []byte {
	return append(appendLen(b, len(value)), value...)
}

func appendOptional(b []byte, s string) []byte {
	if s == "" {
		return appendLen(b, null)
	}
	return appendField(b, s)
}

// uuidBytes is a list of UUIDs as Postgres sends them.
func uuidBytes(ids []uuid.UUID) [][]byte {
	out := make([][]byte, len(ids))
	for i := range ids {
		out[i] = ids[i][:]
	}
	return out
}

func binaryInt32(n int) []byte { return binary.BigEndian.AppendUint32(nil, uint32(n)) }

func binaryInt64(n int64) []byte { return binary.BigEndian.AppendUint64(nil, uint64(n)) }

// binaryTime and binaryDate are a time and its UTC day as Postgres sends them.
func binaryTime(t time.Time) []byte { return binaryInt64(t.UnixMicro() - postgresEpoch) }

func binaryDate(t time.Time) []byte {
	const microsPerDay = 24 * 3600 * 1_000_000
	return binaryInt32(int(t.Unix()/(24*3600) - postgresEpoch/microsPerDay))
}

func appendInt32(b []byte, n int) []byte { return appendLen(appendLen(b, 4), n) }

func appendInt64(b []byte, n int64) []byte {
	return binary.BigEndian.AppendUint64(appendLen(b, 8), uint64(n))
}

func appendArray[T string | []byte](b []byte, oid int, list []T) []byte {
	if len(list) == 0 {
		b = appendLen(b, 12)
		b = appendLen(b, 0) // dimensions
		b = appendLen(b, 0) // no nulls
		return appendLen(b, oid)
	}
	size := 20
	for _, s := range list {
		size += 4 + len(s)
	}
	b = appendLen(b, size)
	b = appendLen(b, 1) // dimension
	b = appendLen(b, 0) // no nulls
	b = appendLen(b, oid)
	b = appendLen(b, len(list))
	b = appendLen(b, 1) // the first index
	for _, s := range list {
		b = appendField(b, s)
	}
	return b
}
