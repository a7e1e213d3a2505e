package cedarpost

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// request makes the message of a check, without its consistency. It shares no memory with
// the check that the caller could change: with Coalesce, the message may be sent after a
// caller gave up and reuses its slices and maps.
func request(c *Check) (*cedarpostv1.AuthorizeRequest, error) {
	req := &cedarpostv1.AuthorizeRequest{
		Principal: protoUID(c.Principal), Action: protoUID(c.Action), Resource: protoUID(c.Resource),
		RequestId: c.RequestID,
	}
	if !c.PrincipalToken.IsZero() {
		req.Principal, req.PrincipalToken = nil, c.PrincipalToken.text()
	}
	if len(c.Fields) > 0 || c.AllFields || c.RequireAllFields {
		req.Fields = &cedarpostv1.FieldSelection{Paths: slices.Clone(c.Fields), All: c.AllFields, RequireAll: c.RequireAllFields}
	}
	var err error
	if req.Context, err = toStruct(c.Context); err != nil {
		return nil, fmt.Errorf("context%w", err)
	}
	for i, e := range c.Entities {
		pe, err := e.Proto()
		if err != nil {
			return nil, fmt.Errorf("entities[%d].%w", i, err)
		}
		req.Entities = append(req.Entities, pe)
	}
	return req, sendable(c, req)
}

// Limits of the service (cedarpost/v1/*.proto) for values that may come from a user: the
// bytes of an id, the bytes of a field's path, and the number of paths in one question.
const (
	MaxIDBytes    = 1024
	MaxFieldBytes = 256
	MaxFields     = 1000
)

// Other limits of the service.
const (
	maxRequest   = 63 << 10 // below the limit (server/wire): sending adds some bytes
	maxType      = 512
	maxRequestID = 128
	maxEntities  = 100
	maxParents   = 1000
)

// sendable refuses a question that cannot be sent or that the service always refuses. Sent,
// it could fail in the same way as a question to a service that is away. A check with
// FailOpen would then be let through, and a user who chooses an id or a path could cause
// that. In a batch or a report, the service would refuse all items that are sent with it.
func sendable(c *Check, req *cedarpostv1.AuthorizeRequest) error {
	uids := []EntityUID{c.Action, c.Resource}
	if c.PrincipalToken.IsZero() {
		uids = append(uids, c.Principal)
	}
	for _, e := range c.Entities {
		uids = append(append(uids, e.UID), e.Parents...)
		if len(e.Parents) > maxParents {
			return fmt.Errorf("an entity has %d parents, more than %d", len(e.Parents), maxParents)
		}
	}
	err := cmp.Or(c.PrincipalToken.check(c), sendableText(c.RequestID, 0, maxRequestID))
	for _, u := range uids {
		err = cmp.Or(err, sendableText(u.Type, 1, maxType), sendableText(u.ID, 0, MaxIDBytes))
	}
	for _, path := range c.Fields {
		err = cmp.Or(err, sendableText(path, 1, MaxFieldBytes))
	}
	switch {
	case err != nil:
		return err
	case c.AtLeastAsFresh != "" && !isToken(c.AtLeastAsFresh):
		return errors.New("AtLeastAsFresh is not the token of a revision")
	case c.AllFields && len(c.Fields) > 0 || c.RequireAllFields && !c.AllFields && len(c.Fields) == 0:
		return errors.New("give Fields or AllFields, one of the two")
	case len(c.Fields) > MaxFields || len(c.Entities) > maxEntities:
		return fmt.Errorf("%d fields, of at most %d, and %d entities, of at most %d", len(c.Fields), MaxFields, len(c.Entities), maxEntities)
	}
	if n := proto.Size(req); n > maxRequest {
		return fmt.Errorf("the question has %d bytes, more than %d", n, maxRequest)
	}
	return nil
}

func sendableText(s string, least, most int) error {
	switch {
	case !utf8.ValidString(s):
		return fmt.Errorf("%.60q is not Unicode", s)
	case len(s) < least || len(s) > most || strings.Contains(s, "\x00"):
		return fmt.Errorf("%.60q has %d bytes, of %d to %d, or one of them is 0", s, len(s), least, most)
	}
	return nil
}

// Proto returns the entity as a message, to write it with EntityService. The error names a
// value that cannot be sent.
func (e Entity) Proto() (_ *cedarpostv1.Entity, err error) {
	out := &cedarpostv1.Entity{Uid: protoUID(e.UID)}
	if out.Attrs, err = toStruct(e.Attrs); err != nil {
		return nil, fmt.Errorf("attrs%w", err)
	}
	if out.Tags, err = toStruct(e.Tags); err != nil {
		return nil, fmt.Errorf("tags%w", err)
	}
	for _, p := range e.Parents {
		out.Parents = append(out.Parents, protoUID(p))
	}
	return out, nil
}

func protoUID(u EntityUID) *cedarpostv1.EntityUid {
	return &cedarpostv1.EntityUid{Type: u.Type, Id: u.ID}
}

func toStruct(m map[string]any) (*structpb.Struct, error) {
	if len(m) == 0 {
		return nil, nil
	}
	v, err := plainMap(m, 0)
	if err != nil {
		return nil, err
	}
	s, err := structpb.NewStruct(v)
	if err != nil {
		return nil, valueError(err.Error())
	}
	return s, nil
}

func plainMap[V any](m map[string]V, depth int) (map[string]any, error) {
	out := make(map[string]any, len(m))
	for name, v := range m {
		var err error
		if out[name], err = toPlain(v, depth+1); err != nil {
			return nil, fmt.Errorf(".%s%w", name, err)
		}
	}
	return out, nil
}

func plainList[V any](list []V, depth int) ([]any, error) {
	out := make([]any, len(list))
	for i, v := range list {
		var err error
		if out[i], err = toPlain(v, depth+1); err != nil {
			return nil, fmt.Errorf("[%d]%w", i, err)
		}
	}
	return out, nil
}

// toPlain turns a value into the types of JSON, in the forms of Cedar's entity format
// (https://docs.cedarpolicy.com/auth/entities-syntax.html). It has the same cases as
// [appendValue].
func toPlain(v any, depth int) (any, error) {
	if depth > maxNesting {
		return nil, valueError("nested too deep")
	}
	switch v := v.(type) {
	case bool, string:
		return v, nil
	case int:
		return plainLong(int64(v)), nil
	case int64:
		return plainLong(v), nil
	case float64:
		if math.IsNaN(v) || math.IsInf(v, 0) {
			return nil, valueError("not a number")
		}
		return v, nil
	case EntityUID:
		return map[string]any{"__entity": map[string]any{"type": v.Type, "id": v.ID}}, nil
	case time.Time:
		if err := inCalendar(v); err != nil {
			return nil, err
		}
		return extension("datetime", v.UTC().Format("2006-01-02T15:04:05.000Z")), nil
	case time.Duration:
		return extension("duration", strconv.FormatInt(v.Milliseconds(), 10)+"ms"), nil
	case netip.Addr:
		text, err := addrText(v)
		return extension("ip", text), err
	case netip.Prefix:
		text, err := prefixText(v)
		return extension("ip", text), err
	case map[string]any:
		return plainMap(v, depth)
	case map[string]string:
		return plainMap(v, depth)
	case []any:
		return plainList(v, depth)
	case []string:
		return plainList(v, depth)
	case []EntityUID:
		return plainList(v, depth)
	}
	simple, err := simplify(v)
	if err != nil {
		return nil, err
	}
	return toPlain(simple, depth)
}

func plainLong(n int64) any {
	if n > maxExact || n < -maxExact {
		return strconv.FormatInt(n, 10)
	}
	return float64(n)
}

func extension(fn, arg string) any {
	return map[string]any{"__extn": map[string]any{"fn": fn, "arg": arg}}
}

// isToken says whether a text has the form of a revision's token. A longer text could make
// the question too large, and the service's refusal looks like overload.
func isToken(text string) bool {
	_, ok := readToken(text)
	return ok
}
