// Package logformat writes the entries of an exported log as lines of NDJSON, CSV and OCSF.
// It reads messages of the API and returns text: flags, files and connections belong to the
// command line. docs/audit.md describes the three formats.
package logformat

import (
	"bytes"
	"encoding/json"
	"fmt"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cedarpost/cedarpost/internal/entityuid"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// NDJSON returns a row of a batch as a line of JSON: its leaf, its place in the batch, and
// the record in the JSON form of the API.
func NDJSON(b *cedarpostv1.ExportDecisionsResponse, row int) (string, error) {
	text, err := JSON(b.GetEntries()[row])
	if err != nil {
		return "", err
	}
	return fmt.Sprintf(`{"leaf":%d,"row":%d,%s`, b.GetLeaf(), row, text[1:]) + "\n", nil
}

// JSON returns a message in the JSON form of the API, without spaces between tokens.
// protojson adds such spaces at random, and programs compare lines.
func JSON(m proto.Message) (string, error) {
	text, err := protojson.MarshalOptions{EmitDefaultValues: true}.Marshal(m)
	if err != nil {
		return "", err
	}
	var line bytes.Buffer
	err = json.Compact(&line, text)
	return line.String(), err
}

// Damage describes a row of the log that the server could not return whole.
type Damage struct {
	// Kind is "damaged" if the record was altered, and "missing" if the row is gone.
	Kind string
	// Of is "decision" or "event"; empty for a missing row.
	Of string
	// ID is the id of the record; empty for a missing row.
	ID string
	// Time is the time of the record; nil for a missing row.
	Time *timestamppb.Timestamp
	// Reason says what is wrong with the row.
	Reason string
}

// DamageOf returns the damage of an entry; nil if the entry is whole.
func DamageOf(e *cedarpostv1.LogEntry) *Damage {
	switch {
	case e.GetDecision().GetDamaged() != "":
		d := e.GetDecision()
		return &Damage{"damaged", "decision", d.GetDecisionId(), d.GetTime(), d.GetDamaged()}
	case e.GetEvent().GetDamaged() != "":
		v := e.GetEvent()
		return &Damage{"damaged", "event", v.GetEventId(), v.GetTime(), v.GetDamaged()}
	case e.GetMissing() != "":
		return &Damage{Kind: "missing", Reason: e.GetMissing()}
	}
	return nil
}

// uidText returns an entity's name as Cedar text.
func uidText(u *cedarpostv1.EntityUid) string {
	return entityuid.Format(u.GetType(), u.GetId())
}

func policyText(p *cedarpostv1.PolicyRef) string { return p.GetBundle() + "/" + p.GetId() }
