package cedarpostconnect

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/enforce"
	"github.com/cedarpost/cedarpost/sdk/go/fields"
)

// Route says what has to be allowed before a handler gets a message. It has either an Action
// and a resource, or Public.
type Route struct {
	// Action is what the handler does.
	Action cedarpost.EntityUID

	// Resource is the resource of the action, with values of the message by the names of
	// its fields: Shop::Order::"{order_id}", Shop::Order::"{order.id}". They are strings or
	// whole numbers. See [enforce.Template]. ResourceOf is a function instead. Its error
	// counts as a fault of the program, unless it is an [*enforce.Refusal].
	Resource   string
	ResourceOf func(context.Context, proto.Message) (cedarpost.EntityUID, error)

	// Context is added to the context of the guard. Nil: none.
	Context func(context.Context, proto.Message) (map[string]any, error)

	// Fields are the fields that the handler shows. AllFields stands for all fields of the
	// catalogue. The handler finds the permitted ones in [Result], or the route has Filter.
	Fields    []string
	AllFields bool
	// Filter reduces each message that the handler sends to the permitted fields. It asks for
	// AllFields unless Fields are named. The message itself must be the resource, not only
	// contain it. Filter is for calls with one request.
	Filter bool

	// Mask is for writes: it names the field of the message that is a
	// google.protobuf.FieldMask. All paths of the mask have to be permitted. They must be
	// written as in the field catalogue. An empty mask, or "*", stands for all fields. The
	// handler must change only fields that are in the mask.
	Mask string

	// Hide answers a denial at the object with the error of [NotFound]. The handler must
	// answer the same when there is no such object.
	Hide bool

	// FailOpen is the reason to let a call through when the service cannot be asked. Empty,
	// the default: the call is refused. A call that is let through has no fields, so a route
	// with a Mask cannot have it. See [cedarpost.Check].
	FailOpen string

	// Public is the reason why this procedure needs no check. Its calls are counted.
	Public string
}

type compiled struct {
	Route
	template enforce.Template
}

var errFilter = errors.New("Filter is for calls with one request: with several, no answer can be told to belong to one of them")

func compile(r Route) (*compiled, error) {
	c := &compiled{Route: r}
	if r.Public != "" {
		if r.asks() {
			return nil, errors.New("a route is either Public or has something to check")
		}
		return c, nil
	}
	switch {
	case r.Action.Type == "" || r.Action.ID == "":
		return nil, errors.New("the route has no Action; if it needs no check, say why in Public")
	case (r.Resource == "") == (r.ResourceOf == nil):
		return nil, errors.New("the route has to have one of Resource and ResourceOf")
	case len(r.Fields) > 0 && r.AllFields:
		return nil, errors.New("the route has both Fields and AllFields")
	case r.Mask != "" && (len(r.Fields) > 0 || r.AllFields || r.Filter):
		return nil, errors.New("a route with a Mask asks for what is in it, and cannot ask for other fields or filter")
	case r.Mask != "" && r.FailOpen != "":
		return nil, errors.New("a call that is let through by FailOpen has no fields, and a route with a Mask needs them")
	}
	if r.Filter && len(r.Fields) == 0 {
		c.AllFields = true
	}
	var err error
	if r.Resource != "" {
		c.template, err = enforce.ParseTemplate(r.Resource)
	}
	return c, err
}

// asks says whether any part of a check is set.
func (r *Route) asks() bool {
	return r.Action != (cedarpost.EntityUID{}) || r.Resource != "" || r.ResourceOf != nil || r.Context != nil || len(r.Fields) > 0 ||
		r.AllFields || r.Filter || r.Mask != "" || r.Hide || r.FailOpen != ""
}

// verify checks whether the messages of a procedure have the fields that the route reads.
func (c *compiled) verify(spec connect.Spec) error {
	if c.Filter && spec.StreamType&connect.StreamTypeClient != 0 {
		return errFilter
	}
	names := c.template.Names()
	if len(names) == 0 && c.Mask == "" {
		return nil
	}
	method, ok := spec.Schema.(protoreflect.MethodDescriptor)
	if !ok {
		return errors.New("the server does not say which messages it has; use ResourceOf")
	}
	for _, name := range names {
		fd, err := field(method.Input(), name)
		if err != nil {
			return err
		}
		if !isID(fd) {
			return fmt.Errorf("%s of %s is neither a string nor a whole number", name, method.Input().FullName())
		}
	}
	if c.Mask == "" {
		return nil
	}
	fd, err := field(method.Input(), c.Mask)
	if err == nil && (fd.Message() == nil || fd.Message().FullName() != maskName) {
		err = fmt.Errorf("%s of %s is not a %s", c.Mask, method.Input().FullName(), maskName)
	}
	return err
}

const maskName = "google.protobuf.FieldMask"

// field finds a field by a path of names through nested messages.
func field(md protoreflect.MessageDescriptor, path string) (protoreflect.FieldDescriptor, error) {
	var fd protoreflect.FieldDescriptor
	for name := range strings.SplitSeq(path, ".") {
		if md == nil {
			return nil, fmt.Errorf("%s: the part before %s is not a message", path, name)
		}
		fd = md.Fields().ByName(protoreflect.Name(name))
		if fd == nil || fd.Cardinality() == protoreflect.Repeated {
			return nil, fmt.Errorf("%s has no field %s, or it is repeated", md.FullName(), name)
		}
		md = fd.Message()
	}
	return fd, nil
}

func isID(fd protoreflect.FieldDescriptor) bool {
	switch fd.Kind() {
	case protoreflect.StringKind, protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind,
		protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind,
		protoreflect.Uint32Kind, protoreflect.Fixed32Kind, protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return true
	}
	return false
}

// value reads a field by a path of names. A nested message that is not set has its default
// values, as for the handler.
func value(m protoreflect.Message, path string) (protoreflect.FieldDescriptor, protoreflect.Value, error) {
	fd, err := field(m.Descriptor(), path)
	if err != nil {
		return nil, protoreflect.Value{}, err
	}
	names := strings.Split(path, ".")
	for _, name := range names[:len(names)-1] {
		m = m.Get(m.Descriptor().Fields().ByName(protoreflect.Name(name))).Message()
	}
	return fd, m.Get(fd), nil
}

func id(v protoreflect.Value) string {
	switch n := v.Interface().(type) {
	case string:
		return n
	case int32:
		return strconv.FormatInt(int64(n), 10)
	case int64:
		return strconv.FormatInt(n, 10)
	case uint32:
		return strconv.FormatUint(uint64(n), 10)
	case uint64:
		return strconv.FormatUint(n, 10)
	}
	return ""
}

// check makes the check of a message, without its principal.
func (c *compiled) check(ctx context.Context, m proto.Message) (check cedarpost.Check, err error) {
	check = cedarpost.Check{Action: c.Action, Fields: c.Fields, AllFields: c.AllFields, FailOpen: c.FailOpen}
	if c.ResourceOf != nil {
		check.Resource, err = c.ResourceOf(ctx, m)
	} else {
		check.Resource, err = c.resource(m)
	}
	if err != nil {
		return check, err
	}
	if c.Context != nil {
		if check.Context, err = c.Context(ctx, m); err != nil {
			return check, err
		}
	}
	if c.Mask == "" {
		return check, nil
	}
	check.RequireAllFields = true
	check.Fields, check.AllFields, err = c.masked(m)
	return check, err
}

func (c *compiled) resource(m proto.Message) (cedarpost.EntityUID, error) {
	var missing error
	uid, err := c.template.Fill(func(name string) string {
		fd, v, err := value(m.ProtoReflect(), name)
		if err != nil || !isID(fd) {
			missing = errors.Join(missing, fmt.Errorf("%s of %s cannot be an id: %w", name, m.ProtoReflect().Descriptor().FullName(), err))
			return ""
		}
		return id(v)
	})
	if missing != nil {
		return cedarpost.EntityUID{}, missing
	}
	return uid, err
}

// masked returns the paths of the mask. all says that the mask stands for all fields.
func (c *compiled) masked(m proto.Message) (paths []string, all bool, err error) {
	fd, v, err := value(m.ProtoReflect(), c.Mask)
	if err != nil {
		return nil, false, err
	}
	if fd.Message() == nil || fd.Message().FullName() != maskName {
		return nil, false, fmt.Errorf("%s is not a field mask", c.Mask)
	}
	list := v.Message().Get(fd.Message().Fields().ByName("paths")).List()
	mask := &fieldmaskpb.FieldMask{}
	for i := range list.Len() {
		mask.Paths = append(mask.Paths, list.Get(i).String())
	}
	if len(mask.Paths) == 0 || slices.Contains(mask.Paths, "*") {
		return nil, true, nil
	}
	paths, err = fields.Mask(mask)
	if err != nil {
		return nil, false, &enforce.Refusal{Kind: enforce.Malformed, Err: err}
	}
	return paths, false, nil
}
