package server

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

// The same entity has three forms: on the wire (cedarpostv1), in the engine
// (Cedar values) and in the store (JSON). This file is where they meet.

func storeUID(u cedar.EntityUID) store.UID {
	return store.UID{Type: string(u.Type), ID: string(u.ID)}
}

func storeUIDs(us []cedar.EntityUID) []store.UID {
	out := make([]store.UID, len(us))
	for i, u := range us {
		out[i] = storeUID(u)
	}
	return out
}

func protoToStore(u *cedarpostv1.EntityUid) store.UID {
	return store.UID{Type: u.GetType(), ID: u.GetId()}
}

func protoUID(u store.UID) *cedarpostv1.EntityUid {
	return &cedarpostv1.EntityUid{Type: u.Type, Id: u.ID}
}

// entityToStore writes a checked entity as the store keeps it.
func entityToStore(e *engine.Entity) (store.Entity, error) {
	attrs, err := recordJSON(e.Attrs)
	if err != nil {
		return store.Entity{}, err
	}
	tags, err := recordJSON(e.Tags)
	if err != nil {
		return store.Entity{}, err
	}
	return store.Entity{UID: storeUID(e.UID), Attrs: attrs, Tags: tags, Parents: storeUIDs(e.Parents)}, nil
}

// recordJSON writes a record as the store keeps it. Equal records are equal JSON:
// otherwise one that is put again would be another version, and could not be found
// by its value.
func recordJSON(r cedar.Record) ([]byte, error) { return canonicalJSON(engine.PlainRecord(r)) }

// canonicalJSON writes the elements of arrays, all of which are sets and come in
// any order, in that of their JSON.
func canonicalJSON(v any) (json.RawMessage, error) {
	switch v := v.(type) {
	case map[string]any:
		members := make(map[string]json.RawMessage, len(v))
		for k, e := range v {
			var err error
			if members[k], err = canonicalJSON(e); err != nil {
				return nil, err
			}
		}
		return json.Marshal(members)
	case []any:
		elements := make([]json.RawMessage, len(v))
		for i, e := range v {
			var err error
			if elements[i], err = canonicalJSON(e); err != nil {
				return nil, err
			}
		}
		slices.SortFunc(elements, func(a, b json.RawMessage) int { return bytes.Compare(a, b) })
		return json.Marshal(elements)
	}
	return json.Marshal(v)
}

// rawFromStore decodes a stored entity.
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

// storedError is a stored entity that its own schema refuses. It is deliberately
// no engine.RequestError: the caller did nothing wrong.
type storedError struct{ msg string }

func (e *storedError) Error() string { return "stored: " + e.msg }

// readStored reads a stored entity by the schema of a set.
func readStored(set *engine.Set, row store.Entity) (*engine.Entity, error) {
	raw, err := rawFromStore(row)
	if err != nil {
		return nil, err
	}
	e, err := set.ReadEntity(raw)
	if err != nil {
		// Not the caller's mistake: publishing makes sure stored entities fit.
		return nil, &storedError{err.Error()}
	}
	return e, nil
}

// entityToProto puts a stored entity on the wire.
func entityToProto(row store.Entity) (*cedarpostv1.Entity, error) {
	e := &cedarpostv1.Entity{Uid: protoUID(row.UID)}
	for _, p := range row.Parents {
		e.Parents = append(e.Parents, protoUID(p))
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
