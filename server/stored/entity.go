// Package stored converts between the forms of entities and bundles: on the wire
// (protobuf messages), in the engine (Cedar values) and in the store (rows with JSON).
package stored

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"

	"github.com/cedar-policy/cedar-go"
	"google.golang.org/protobuf/types/known/structpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/store"
)

// UID returns the UID of an entity in the form of the store.
func UID(u cedar.EntityUID) store.UID {
	return store.UID{Type: string(u.Type), ID: string(u.ID)}
}

// UIDs returns the UIDs of entities in the form of the store.
func UIDs(us []cedar.EntityUID) []store.UID {
	out := make([]store.UID, len(us))
	for i, u := range us {
		out[i] = UID(u)
	}
	return out
}

// FromProto returns a UID on the wire in the form of the store.
func FromProto(u *cedarpostv1.EntityUid) store.UID {
	return store.UID{Type: u.GetType(), ID: u.GetId()}
}

// ToProto returns the UID of a stored entity in its form on the wire.
func ToProto(u store.UID) *cedarpostv1.EntityUid {
	return &cedarpostv1.EntityUid{Type: u.Type, Id: u.ID}
}

// Entity returns an entity that the schema has accepted in the form of the store.
func Entity(e *engine.Entity) (store.Entity, error) {
	attrs, err := RecordJSON(e.Attrs)
	if err != nil {
		return store.Entity{}, err
	}
	tags, err := RecordJSON(e.Tags)
	if err != nil {
		return store.Entity{}, err
	}
	return store.Entity{UID: UID(e.UID), Attrs: attrs, Tags: tags, Parents: UIDs(e.Parents)}, nil
}

// RecordJSON returns a record in the form of the store. Equal records have equal JSON, so a
// put of an equal record makes no new version, and queries find a record by its value.
func RecordJSON(r cedar.Record) ([]byte, error) { return CanonicalJSON(engine.PlainRecord(r)) }

// CanonicalJSON returns a value as JSON. Equal values have equal JSON: arrays are sorted,
// because each one is a Cedar set, whose elements have no order.
func CanonicalJSON(v any) (json.RawMessage, error) {
	switch v := v.(type) {
	case map[string]any:
		members := make(map[string]json.RawMessage, len(v))
		for k, e := range v {
			var err error
			if members[k], err = CanonicalJSON(e); err != nil {
				return nil, err
			}
		}
		return json.Marshal(members)
	case []any:
		elements := make([]json.RawMessage, len(v))
		for i, e := range v {
			var err error
			if elements[i], err = CanonicalJSON(e); err != nil {
				return nil, err
			}
		}
		slices.SortFunc(elements, func(a, b json.RawMessage) int { return bytes.Compare(a, b) })
		return json.Marshal(elements)
	}
	return json.Marshal(v)
}

// rawFromStore decodes a stored entity. The engine reads the result by a schema.
func rawFromStore(row store.Entity) (engine.RawEntity, error) {
	raw := engine.RawEntity{UID: cedar.NewEntityUID(cedar.EntityType(row.Type), cedar.String(row.ID))}
	for _, part := range []struct {
		text []byte
		into *map[string]any
	}{{row.Attrs, &raw.Attrs}, {row.Tags, &raw.Tags}} {
		d := json.NewDecoder(bytes.NewReader(part.text))
		d.UseNumber()
		if err := d.Decode(part.into); err != nil {
			return raw, fmt.Errorf("stored entity %s: %w", row.UID, err)
		}
	}
	for _, p := range row.Parents {
		raw.Parents = append(raw.Parents, cedar.NewEntityUID(cedar.EntityType(p.Type), cedar.String(p.ID)))
	}
	return raw, nil
}

// UnfitError is the error of a stored entity that does not fit the schema. It is not an
// [engine.RequestError], because the caller did nothing wrong.
type UnfitError struct{ msg string }

// Error says why the entity does not fit.
func (e *UnfitError) Error() string { return "stored: " + e.msg }

// ReadEntity reads a stored entity by the schema of a set. The error is an [UnfitError] if
// the entity does not fit the schema.
func ReadEntity(set *engine.Set, row store.Entity) (*engine.Entity, error) {
	raw, err := rawFromStore(row)
	if err != nil {
		return nil, err
	}
	e, err := set.ReadStored(raw)
	if err != nil {
		return nil, &UnfitError{err.Error()}
	}
	e.Weight = row.Weight()
	return e, nil
}

// EntityToProto returns a stored entity in its form on the wire.
func EntityToProto(row store.Entity) (*cedarpostv1.Entity, error) {
	e := &cedarpostv1.Entity{Uid: ToProto(row.UID)}
	for _, p := range row.Parents {
		e.Parents = append(e.Parents, ToProto(p))
	}
	for _, part := range []struct {
		text []byte
		into **structpb.Struct
	}{{row.Attrs, &e.Attrs}, {row.Tags, &e.Tags}} {
		s := &structpb.Struct{}
		if err := s.UnmarshalJSON(part.text); err != nil {
			return nil, fmt.Errorf("stored entity %s: %w", row.UID, err)
		}
		if len(s.Fields) > 0 {
			*part.into = s
		}
	}
	return e, nil
}
