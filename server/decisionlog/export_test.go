package decisionlog

import (
	"time"

	"google.golang.org/protobuf/proto"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// Grow adds batches to a tree.
var Grow = grow

// SignOften returns s for a signer that pauses only a short time between two looks for new
// batches, and after a contradiction.
func SignOften(s Signing) Signing {
	s.interval, s.retry = 50*time.Millisecond, 200*time.Millisecond
	return s
}

// IsDecision and IsEvent check the kind of a record.
func IsDecision(record []byte) error {
	rec := &cedarpostv1.DecisionRecord{}
	if err := proto.Unmarshal(record, rec); err != nil {
		return err
	}
	return isDecision(record, rec)
}

// IsEvent is IsDecision for an event.
func IsEvent(record []byte) error {
	rec := &cedarpostv1.EventRecord{}
	if err := proto.Unmarshal(record, rec); err != nil {
		return err
	}
	return isEvent(record, rec)
}
