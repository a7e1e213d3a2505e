package snapshot

import (
	"crypto/sha256"
	"encoding/binary"
	"slices"

	"github.com/google/uuid"

	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/store"
)

// maxHintTags is how many tags a decision may have if its answer may be kept.
const maxHintTags = 256

// tag returns the tag of something that decisions depend on: the first eight bytes of a
// hash. If two things have the same tag, a change of one also drops the answers that depend
// on the other; no answer is kept too long.
//
// The database is part of the hash, so a caller of two services cannot mix up their tags.
func tag(database uuid.UUID, kind, typ, id string) uint64 {
	b := make([]byte, 0, 128)
	b = append(b, database[:]...)
	// Each text has its length before it: otherwise two things could have the same bytes.
	for _, text := range [...]string{kind, typ, id} {
		b = binary.BigEndian.AppendUint32(b, uint32(len(text)))
		b = append(b, text...)
	}
	sum := sha256.Sum256(b)
	return binary.BigEndian.Uint64(sum[:8])
}

// EntityTag returns the tag of an entity: of its attributes, tags and parents.
func EntityTag(database uuid.UUID, typ, id string) uint64 {
	return tag(database, store.KindEntity, typ, id)
}

// BundleTag returns the tag of the policies of a bundle. When anything else of a bundle
// changes, watchers get a reset.
func BundleTag(database uuid.UUID, name string) uint64 {
	return tag(database, store.KindBundle, "", name)
}

// HintTags returns the tags of what a decision depends on, besides the request: every entity
// that was read for it, its bundle, and the guardrails. They are sorted. ok is false if the
// answer must not be kept: an action may forbid it, and there may be too many tags.
//
// Schemas and catalogues have no tags: when one of them changes, watchers get a reset.
func (s *Snapshot) HintTags(e *engine.Evaluation) (tags []uint64, ok bool) {
	if !e.Question.Reusable() {
		return nil, false
	}
	database := s.Position.Database
	tags = append(make([]uint64, 0, 16), BundleTag(database, e.Question.Bundle()), BundleTag(database, engine.Guardrails))
	for uid := range e.Slice.Reads() {
		if len(tags) == maxHintTags {
			return nil, false
		}
		tags = append(tags, EntityTag(database, string(uid.Type), string(uid.ID)))
	}
	slices.Sort(tags)
	return slices.Compact(tags), true
}
