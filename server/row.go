package server

import (
	"fmt"
	"slices"

	"github.com/google/uuid"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/store"
)

// decisionRow is the row of a record: its columns are what the record says, when it
// is written and when it is verified. record are the bytes of rec.
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
	for _, path := range rec.Fields.GetPermitted() {
		row.Fields = append(row.Fields, "+"+path)
	}
	for _, path := range rec.Fields.GetDenied() {
		row.Fields = append(row.Fields, "-"+path)
	}
	slices.Sort(row.Fields)
	return row, nil
}
