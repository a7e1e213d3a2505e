package engine

import (
	"math"
	"slices"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/types"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
)

// Ask is a question as it was received: decoded JSON that is not checked against the
// schemas yet.
type Ask struct {
	Principal, Action, Resource cedar.EntityUID
	Context                     map[string]any
	// FieldsAsked says whether fields are asked for at all. Paths lists them; All asks
	// for every leaf of the catalogue.
	FieldsAsked bool
	Paths       []string
	All         bool
	RequireAll  bool
	Inline      []RawEntity
	// NowMillis is the server's time in milliseconds since 1970, for actions
	// whose context declares "now: datetime".
	NowMillis int64
	// Recorded says that the question comes from a record: Context already has the
	// attributes that the server fills in. Values in it that are masked are left out: if a policy that
	// could apply reads one, the question has no decision, and the error is [ErrMasked].
	Recorded bool
	// NothingMasked says that no value of the record is masked, so that an object that looks like a masked value is
	// what the caller sent.
	NothingMasked bool
}

// RawEntity is an entity as decoded JSON.
type RawEntity struct {
	UID         cedar.EntityUID
	Attrs, Tags map[string]any
	Parents     []cedar.EntityUID
}

// Question is a question that was checked against the schemas. Only the Set that read
// it can decide it.
type Question struct {
	request      cedar.Request
	action       *action
	inapplicable bool
	inline       map[cedar.EntityUID]*Entity
	usesNow      bool
	masked       *masked // nil: nothing is masked

	fieldsAsked  bool
	requireAll   bool
	leaves       []leaf
	unknownPaths []string
}

// Context returns the context as it is evaluated, with the attributes that the server
// filled in.
func (q *Question) Context() cedar.Record { return q.request.Context }

// Bundle names the bundle that owns the action. Its policies and those of guardrails
// decide.
func (q *Question) Bundle() string { return q.action.bundle }

// Reusable reports whether the answer stays right until an entity of [Slice.Reads] or a
// bundle changes. It does not if the answer depends on the server's time. It must also
// not be reused if the schema marks the action, or the ".field" action of the fields
// asked for, @audit("always").
func (q *Question) Reusable() bool { return !q.usesNow && !q.alwaysAudited() }

func (q *Question) alwaysAudited() bool {
	return q.action.auditAlways || q.fieldsAsked && q.action.field.auditAlways
}

// read reads a question. Errors are of type *RequestError.
func (s *Set) read(a Ask) (*Question, error) {
	act, ok := s.actions[a.Action]
	if !ok {
		return nil, undeclared(a.Action)
	}
	if act.fieldOf != nil {
		return nil, badf("action %s is asked by asking for fields of %s", a.Action, act.fieldOf.uid)
	}
	for _, p := range []struct {
		what string
		uid  cedar.EntityUID
	}{{"principal", a.Principal}, {"resource", a.Resource}} {
		if !s.knowsType(p.uid.Type) {
			return nil, badf("%s: type %s is not declared by any schema", p.what, quote(string(p.uid.Type)))
		}
		if err := s.checkEnum(p.uid, p.what); err != nil {
			return nil, err
		}
	}
	if act.appliesTo == nil {
		return nil, badf("action %s is a group of actions: it applies to nothing itself", a.Action)
	}
	q := &Question{
		request: cedar.Request{Principal: a.Principal, Action: a.Action, Resource: a.Resource},
		action:  act,
		inapplicable: !slices.Contains(act.appliesTo.Principals, a.Principal.Type) ||
			!slices.Contains(act.appliesTo.Resources, a.Resource.Type),
	}
	r := s.newReading()
	if a.Recorded {
		r.pairs = math.MaxInt // it was accepted once
		if !a.NothingMasked {
			a, q.masked = withoutMasked(a)
		}
		r.masked = q.masked
	}
	if err := r.readContext(q, a); err != nil {
		return nil, err
	}
	if err := r.readInline(q, a.Inline); err != nil {
		return nil, err
	}
	if a.FieldsAsked {
		if act.field == nil {
			return nil, badf("action %s has no fields: the schema declares no action %s", a.Action, quote(string(a.Action.ID)+fieldSuffix))
		}
		q.fieldsAsked, q.requireAll = true, a.RequireAll
		s.readPaths(q, a)
	}
	return q, nil
}

func undeclared(uid cedar.EntityUID) error {
	return badf("action %s is not declared by any schema", uid)
}

func (s *reading) readContext(q *Question, a Ask) error {
	ctx := a.Context
	if ctx == nil {
		ctx = map[string]any{}
	}
	shape := q.action.appliesTo.Context
	q.usesNow = q.action.fillsNow
	fill := q.usesNow && !a.Recorded
	if fill {
		if _, given := ctx["now"]; given {
			return badf(`context.now is filled by the server and cannot be sent`)
		}
		rest := make(resolved.RecordType, len(shape))
		for k, v := range shape {
			if k != "now" {
				rest[k] = v
			}
		}
		shape = rest
	}
	rec, err := s.projectRecord(shape, ctx, "context")
	if err != nil {
		return err
	}
	if fill {
		m := rec.Map()
		if m == nil {
			m = cedar.RecordMap{}
		}
		m["now"] = types.NewDatetimeFromMillis(a.NowMillis)
		rec = cedar.NewRecord(m)
	}
	q.request.Context = rec
	return nil
}

func (s *reading) readInline(q *Question, raw []RawEntity) error {
	if len(raw) == 0 {
		return nil
	}
	q.inline = make(map[cedar.EntityUID]*Entity, len(raw))
	for _, r := range raw {
		if !s.knowsType(r.UID.Type) {
			return badf("entity %s: type %s is not declared by any schema", r.UID, quote(string(r.UID.Type)))
		}
		if !s.requestOnly(r.UID.Type) {
			return badf(`entity %s: only types that the schema marks @source("request") may come with a request`, r.UID)
		}
		if _, twice := q.inline[r.UID]; twice {
			return badf("entity %s came twice", r.UID)
		}
		e, err := s.readEntity(r)
		if err != nil {
			return err
		}
		q.inline[r.UID] = e
	}
	return nil
}

// readPaths turns the paths asked for into leaves. A path with other paths below it
// stands for all leaves below it. A write of such a path, which requires all fields,
// replaces the value as a whole, also what is in it and in no catalogue. So it needs
// "path.*" too, which no catalogue has.
func (s *Set) readPaths(q *Question, a Ask) {
	cat := s.catalogues[q.request.Resource.Type]
	if a.All {
		if cat != nil {
			q.leaves = cat.leaves
		}
		return
	}
	var picked []bool // of the leaves
	if cat != nil {
		picked = make([]bool, len(cat.leaves))
		q.leaves = make([]leaf, 0, len(a.Paths))
	}
	for _, path := range a.Paths {
		var below []int
		if cat != nil {
			below = cat.below[path]
		}
		for _, i := range below {
			if !picked[i] {
				picked[i] = true
				q.leaves = append(q.leaves, cat.leaves[i])
			}
		}
		if a.RequireAll && len(below) > 0 && cat.leaves[below[0]].path != path {
			below, path = nil, path+".*"
		}
		if len(below) == 0 {
			q.unknownPaths = append(q.unknownPaths, path)
		}
	}
	slices.SortFunc(q.leaves, func(a, b leaf) int { return a.index - b.index })
	q.unknownPaths = firstOfEach(q.unknownPaths)
}

// firstOfEach drops the texts that were there before. It changes the list.
func firstOfEach(list []string) []string {
	if len(list) < 2 {
		return list
	}
	seen := make(map[string]bool, len(list))
	return slices.DeleteFunc(list, func(s string) bool {
		was := seen[s]
		seen[s] = true
		return was
	})
}

// allPaths returns every leaf and unknown path asked for.
func (q *Question) allPaths() []string {
	out := make([]string, 0, len(q.leaves)+len(q.unknownPaths))
	for _, l := range q.leaves {
		out = append(out, l.path)
	}
	return append(out, q.unknownPaths...)
}

// ReadEntity reads an entity that is to be stored. Errors are of type
// *RequestError and name the entity and the attribute.
func (s *Set) ReadEntity(r RawEntity) (*Entity, error) {
	if err := s.checkStorable(r.UID); err != nil {
		return nil, err
	}
	return s.newReading().readEntity(r)
}

// ReadStored reads an entity that is stored. It accepts what [Set.ReadEntity] accepted
// before there was a limit of [MaxPairs].
func (s *Set) ReadStored(r RawEntity) (*Entity, error) {
	if err := s.checkStorable(r.UID); err != nil {
		return nil, err
	}
	return (&reading{Set: s, pairs: math.MaxInt}).readEntity(r)
}

// ReadAttributes reads single attributes that are to be set on a stored entity,
// and checks that those to be removed are optional.
func (s *Set) ReadAttributes(uid cedar.EntityUID, attrs map[string]any, remove []string) (cedar.Record, error) {
	if err := s.checkStorable(uid); err != nil {
		return cedar.Record{}, err
	}
	decl := s.schema.Entities[uid.Type].Shape
	reading := s.newReading()
	out := cedar.RecordMap{}
	for name, v := range attrs {
		attr, ok := decl[cedar.String(name)]
		if !ok {
			return cedar.Record{}, badf("entity %s: attribute %s is not declared in the schema", uid, quote(name))
		}
		val, err := reading.project(attr.Type, v, "entity "+uid.String()+": "+name)
		if err != nil {
			return cedar.Record{}, err
		}
		out[cedar.String(name)] = val
	}
	for _, name := range remove {
		attr, ok := decl[cedar.String(name)]
		if !ok {
			return cedar.Record{}, badf("entity %s: attribute %s is not declared in the schema", uid, quote(name))
		}
		if !attr.Optional {
			return cedar.Record{}, badf("entity %s: attribute %s is required and cannot be removed", uid, quote(name))
		}
		if _, both := attrs[name]; both {
			return cedar.Record{}, badf("entity %s: attribute %s is both set and removed", uid, quote(name))
		}
	}
	return cedar.NewRecord(out), nil
}

// CheckParents checks that an entity that is stored may have these parents.
func (s *Set) CheckParents(uid cedar.EntityUID, parents []cedar.EntityUID) error {
	if err := s.checkStorable(uid); err != nil {
		return err
	}
	return s.checkParents(uid, parents)
}

// CheckStorable refuses entities that may not be stored: unknown types, actions,
// the Field and FieldGroup types of a bundle, and types marked
// @source("request").
func (s *Set) CheckStorable(uid cedar.EntityUID) error { return s.checkStorable(uid) }

func (s *Set) checkStorable(uid cedar.EntityUID) error {
	if isActionType(uid.Type) {
		return badf("entity %s: actions come from the schema and cannot be written", uid)
	}
	if !s.knowsType(uid.Type) {
		return badf("entity %s: type %s is not declared by any schema", uid, quote(string(uid.Type)))
	}
	if s.fieldTypes[uid.Type] {
		return badf("entity %s: fields and field groups come from a bundle's fields.yaml and cannot be written", uid)
	}
	if s.requestOnly(uid.Type) {
		return badf(`entity %s: the schema marks its type @source("request"): it comes with requests and is never stored`, uid)
	}
	return checkText(string(uid.ID), "entity "+uid.String()+": id")
}

func (s *reading) readEntity(r RawEntity) (*Entity, error) {
	at := "entity " + r.UID.String()
	if err := s.checkEnum(r.UID, at); err != nil {
		return nil, err
	}
	decl := s.schema.Entities[r.UID.Type] // the zero value for an enumerated type, which has no attributes
	attrs, err := s.projectRecord(decl.Shape, r.Attrs, at)
	if err != nil {
		return nil, err
	}
	e := &Entity{UID: r.UID, Attrs: attrs, Parents: r.Parents}
	if len(r.Tags) > 0 {
		if decl.Tags == nil {
			return nil, badf("%s: its type declares no tags", at)
		}
		tags := cedar.RecordMap{}
		for name, v := range r.Tags {
			if err := checkText(name, at+": tag"); err != nil {
				return nil, err
			}
			if tags[cedar.String(name)], err = s.project(decl.Tags, v, at+": tag "+name); err != nil {
				return nil, err
			}
		}
		e.Tags = cedar.NewRecord(tags)
	}
	return e, s.checkParents(r.UID, r.Parents)
}

func (s *Set) checkParents(uid cedar.EntityUID, parents []cedar.EntityUID) error {
	allowed := s.schema.Entities[uid.Type].ParentTypes
	for _, p := range parents {
		if !slices.Contains(allowed, p.Type) {
			return badf("entity %s: the schema does not allow a parent of type %s", uid, quote(string(p.Type)))
		}
		if err := s.checkEnum(p, "entity "+uid.String()+": parent"); err != nil {
			return err
		}
		if err := checkText(string(p.ID), "entity "+uid.String()+": parent"); err != nil {
			return err
		}
	}
	return nil
}
