package server

import (
	"crypto/sha256"
	"encoding/binary"
	"slices"

	"github.com/google/uuid"
	"google.golang.org/protobuf/types/known/durationpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/store"
)

// maxHintTags is how many things a decision may depend on, if its answer is to be
// kept.
const maxHintTags = 256

// tag stands for a thing that changes: the first eight bytes of a hash. Two things
// that share one are taken for the same, which drops an answer too many, and never
// keeps one.
//
// The database is part of it, so that who asks two services cannot mix them up.
func tag(database uuid.UUID, kind, typ, id string) uint64 {
	b := make([]byte, 0, 128)
	b = append(b, database[:]...)
	// Each text with its length: otherwise two things could be the same bytes.
	for _, text := range [...]string{kind, typ, id} {
		b = binary.BigEndian.AppendUint32(b, uint32(len(text)))
		b = append(b, text...)
	}
	sum := sha256.Sum256(b)
	return binary.BigEndian.Uint64(sum[:8])
}

// bundleTag stands for the policies of a bundle. Whatever else of it changes makes
// all watchers begin anew.
func bundleTag(database uuid.UUID, name string) uint64 {
	return tag(database, store.KindBundle, "", name)
}

// hintTags are what a decision depends on, besides the request: every entity that
// was read for it, and the bundles whose policies decided. A bundle that is not there
// counts too, though watchers begin anew when it comes. ok is false if the answer
// must not be kept.
//
// The schemas and catalogues of all bundles are not among them: a change of those
// drops everything.
func hintTags(database uuid.UUID, q *engine.Question, sl *engine.Slice) (tags []uint64, ok bool) {
	if !q.Reusable() {
		return nil, false
	}
	tags = append(make([]uint64, 0, 16), bundleTag(database, q.Bundle()), bundleTag(database, engine.Guardrails))
	for uid := range sl.Reads() {
		if len(tags) == maxHintTags {
			return nil, false
		}
		tags = append(tags, tag(database, store.KindEntity, string(uid.Type), string(uid.ID)))
	}
	slices.Sort(tags)
	return slices.Compact(tags), true
}

// hint says how the answer to a check may be kept, nil if it may not.
func (s *authorizationService) hint(snap *snapshot, req *cedarpostv1.AuthorizeRequest, e *engine.Evaluation) *cedarpostv1.CacheHint {
	if !req.WantCacheHint || req.Explain || s.maxReuse <= 0 {
		return nil
	}
	tags, ok := hintTags(snap.position.Database, e.Question, e.Slice)
	if !ok {
		return nil
	}
	return &cedarpostv1.CacheHint{MaxAge: durationpb.New(s.maxReuse), Tags: tags}
}
