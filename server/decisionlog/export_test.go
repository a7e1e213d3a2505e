package decisionlog

import (
	"google.golang.org/protobuf/proto"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// Grow adds batches to a tree.
var Grow = grow

// IsDecision and IsEvent tell what the bytes of a record are.
var IsDecision = isDecision

func IsEvent(record []byte) error {
	rec := &cedarpostv1.EventRecord{}
	if err := proto.Unmarshal(record, rec); err != nil {
		return err
	}
	return isEvent(rec)
}
