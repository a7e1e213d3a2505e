package server

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/cedar-policy/cedar-go"
	"google.golang.org/protobuf/types/known/structpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/store"
)

// The same entity has three forms: on the wire (cedarpostv1), in the engine
// (Cedar values) and in the store (JSON). This file is where they meet.

func cedarUID(u *cedarpostv1.EntityUid) cedar.EntityUID {
	return cedar.NewEntityUID(cedar.EntityType(u.GetType()), cedar.String(u.GetId()))
}

func cedarUIDs(us []*cedarpostv1.EntityUid) []cedar.EntityUID {
	out := make([]cedar.EntityUID, len(us))
	for i, u := range us {
		out[i] = cedarUID(u)
	}
	return out
}

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

func rawEntity(e *cedarpostv1.Entity) engine.RawEntity {
	return engine.RawEntity{
		UID: cedarUID(e.GetUid()), Attrs: e.GetAttrs().AsMap(), Tags: e.GetTags().AsMap(), Parents: cedarUIDs(e.GetParents()),
	}
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

// ParseEntities reads a file in Cedar's entity JSON format: an array of
// {"uid", "attrs", "parents", "tags"}. Numbers that JSON readers commonly round
// become strings of digits, as the wire format wants them.
func ParseEntities(data []byte) ([]*cedarpostv1.Entity, error) {
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	var list []map[string]any
	if err := d.Decode(&list); err != nil {
		return nil, fmt.Errorf("not an array of entities in Cedar's JSON format: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("something follows the array of entities")
	}
	out := make([]*cedarpostv1.Entity, len(list))
	for i, m := range list {
		e, err := parseEntity(m)
		if err != nil {
			return nil, fmt.Errorf("entity %d: %w", i+1, err)
		}
		out[i] = e
	}
	return out, nil
}

func parseEntity(m map[string]any) (*cedarpostv1.Entity, error) {
	e := &cedarpostv1.Entity{}
	for key, v := range m {
		var err error
		switch key {
		case "uid":
			e.Uid, err = parseUID(v)
		case "attrs":
			e.Attrs, err = parseStruct(v)
		case "tags":
			e.Tags, err = parseStruct(v)
		case "parents":
			list, ok := v.([]any)
			if !ok {
				return nil, errors.New("parents: not an array")
			}
			for _, p := range list {
				uid, err := parseUID(p)
				if err != nil {
					return nil, fmt.Errorf("parents: %w", err)
				}
				e.Parents = append(e.Parents, uid)
			}
		default:
			return nil, fmt.Errorf("unknown key %q", key)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", key, err)
		}
	}
	if e.Uid == nil {
		return nil, errors.New("uid is missing")
	}
	return e, nil
}

func parseUID(v any) (*cedarpostv1.EntityUid, error) {
	m, ok := v.(map[string]any)
	if inner, explicit := m["__entity"].(map[string]any); explicit && len(m) == 1 {
		m = inner
	}
	typ, okType := m["type"].(string)
	id, okID := m["id"].(string)
	if !ok || !okType || !okID || len(m) != 2 {
		return nil, errors.New(`not {"type": "…", "id": "…"}`)
	}
	return &cedarpostv1.EntityUid{Type: typ, Id: id}, nil
}

func parseStruct(v any) (*structpb.Struct, error) {
	m, ok := v.(map[string]any)
	if !ok {
		return nil, errors.New("not an object")
	}
	plain, err := exact(m)
	if err != nil {
		return nil, err
	}
	return structpb.NewStruct(plain.(map[string]any))
}

// exact replaces json.Number by float64 where that is exact and by its digits
// where it is not.
func exact(v any) (any, error) {
	switch v := v.(type) {
	case json.Number:
		if i, err := v.Int64(); err == nil && (i > 1<<53-1 || i < -(1<<53-1)) {
			return v.String(), nil
		}
		return v.Float64()
	case []any:
		for i := range v {
			var err error
			if v[i], err = exact(v[i]); err != nil {
				return nil, err
			}
		}
	case map[string]any:
		for k := range v {
			var err error
			if v[k], err = exact(v[k]); err != nil {
				return nil, err
			}
		}
	}
	return v, nil
}
