package server

import (
	"time"

	"github.com/google/uuid"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/store"
)

// LogCare sets how soon a server looks after the log.
func LogCare(d time.Duration) func(*Config) { return func(c *Config) { c.logCare = d } }

// StateRootEvent makes the record of a state root.
var StateRootEvent = stateRootEvent

// EntityTag and BundleTag are what watchers are told.
func EntityTag(database uuid.UUID, typ, id string) uint64 {
	return tag(database, store.KindEntity, typ, id)
}

func BundleTag(database uuid.UUID, name string) uint64 { return bundleTag(database, name) }

// TokenAt is a token of the same history, of another revision.
func TokenAt(r *cedarpostv1.Revision, number int64) *cedarpostv1.Revision {
	p, err := parseToken(r.GetToken())
	if err != nil {
		panic(err)
	}
	return encodeRevision(p, number)
}

// Grow adds batches to a tree.
var Grow = grow
