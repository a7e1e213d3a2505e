package engine

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
)

// Break is a part of what callers send or ask for that an earlier set accepted, and that a later one
// refuses or does not know.
type Break struct {
	// Bundle owns the actions.
	Bundle string
	// Actions are those whose callers break, sorted by type and id.
	Actions []cedar.EntityUID
	// Field says that the catalogue of fields lacks something, and not the schema.
	Field bool
	// File is the schema file of the later set that declares the action, or its namespace if the action is gone;
	// Line and Column are where it does, from 1, or zeros.
	File         string
	Line, Column int
	// Message says what breaks, with the actions; Hint says how it would not.
	Message, Hint string
}

// maxBreaks bounds the list of [Set.Breaks].
const maxBreaks = 1000

// Breaks lists what breaks callers who ask as they did when old was in force, by action. A part that is
// new and need not be used, such as an optional attribute, breaks nobody. Policies are not compared:
// another decision is no break. If there are more than 1000, the last one says so.
func (s *Set) Breaks(old *Set) []Break {
	if s.digest == old.digest {
		return nil
	}
	b := &breaks{old: old, now: s}
	asked := old.Actions()
	for _, uid := range asked {
		b.action(old.actions[uid], s.actions[uid])
	}
	b.catalogues(asked)
	if len(b.list) > maxBreaks {
		last := Break{Bundle: b.list[maxBreaks].Bundle, Actions: b.list[maxBreaks].Actions, Message: "there is more that breaks callers, which is left out"}
		b.list = append(b.list[:maxBreaks], last)
	}
	return b.list
}

// breaks compares two sets.
type breaks struct {
	old, now *Set
	list     []Break
}

func (b *breaks) full() bool { return len(b.list) > maxBreaks }

// add adds what breaks the callers of one action. format is the text after the name of the action.
func (b *breaks) add(a *action, hint, format string, args ...any) {
	if b.full() {
		return
	}
	one := Break{Bundle: a.bundle, Actions: []cedar.EntityUID{a.uid}, Message: fmt.Sprintf("action %s: ", a.uid) + fmt.Sprintf(format, args...), Hint: hint}
	if now := b.now.bundles[a.bundle]; now != nil {
		one.File, one.Line, one.Column = now.schema.declaredAt(a.uid)
	}
	b.list = append(b.list, one)
}

// action compares the two declarations of an action that could be asked about. now is nil if it is gone.
func (b *breaks) action(old, now *action) {
	switch {
	case b.full():
		return
	case now == nil:
		b.add(old, "keep it until nobody asks about it", "it is removed")
		return
	case now.appliesTo == nil:
		b.add(old, "keep its appliesTo until nobody asks about it", "it applies to nothing any more")
		return
	}
	if old.field != nil && now.field == nil {
		b.add(old, "", "its fields cannot be asked for any more: there is no action %q", string(old.uid.ID)+fieldSuffix)
	}
	for _, list := range []struct {
		what     string
		old, now []cedar.EntityType
	}{{"principal", old.appliesTo.Principals, now.appliesTo.Principals}, {"resource", old.appliesTo.Resources, now.appliesTo.Resources}} {
		for _, t := range sortedTypes(list.old) {
			if !slices.Contains(list.now, t) {
				b.add(old, "", "the %s type %s is removed", list.what, t)
				continue
			}
			if id, fewer := b.fewerValues(t); fewer {
				b.add(old, "", "the %s type %s does not have %s any more", list.what, t, id)
			}
			b.inline(old, list.what, t)
		}
	}
	b.record(old, "the context", "", sent(old), sent(now))
}

// sortedTypes returns the types in order, each once.
func sortedTypes(list []cedar.EntityType) []cedar.EntityType {
	return slices.Compact(slices.Sorted(slices.Values(list)))
}

// sent returns the context that callers send: without the attribute that the server fills in.
func sent(a *action) resolved.RecordType {
	if !a.fillsNow {
		return a.appliesTo.Context
	}
	shape := maps.Clone(a.appliesTo.Context)
	delete(shape, "now")
	return shape
}

// fewerValues reports whether requests can contain fewer entities of a type that both sets know, because
// it is enumerated. id says which, or which of them.
func (b *breaks) fewerValues(t cedar.EntityType) (id string, fewer bool) {
	now, enumerated := b.now.schema.Enums[t]
	if !enumerated {
		return "", false
	}
	old, was := b.old.schema.Enums[t]
	if !was {
		return "other ids than those it lists", true
	}
	for _, v := range old.Values {
		if !slices.Contains(now.Values, v) {
			return v.String(), true
		}
	}
	return "", false
}

// inline compares the attributes of a type whose entities come with requests about an action.
func (b *breaks) inline(a *action, what string, t cedar.EntityType) {
	switch {
	case !b.old.requestTypes[t]:
	case !b.now.requestTypes[t]:
		b.add(a, "", `entities of the %s type %s cannot come with a request any more: it is not marked @source("request")`, what, t)
	default:
		b.record(a, fmt.Sprintf("the %s type %s", what, t), "", b.old.schema.Entities[t].Shape, b.now.schema.Entities[t].Shape)
	}
}

// record compares two shapes of a record that callers send. place names it, and path is where it is in
// that: empty, or with a dot at its end.
func (b *breaks) record(a *action, place, path string, old, now resolved.RecordType) {
	for _, name := range sortedKeys(old) {
		was, full := old[name], path+string(name)
		is, ok := now[name]
		if !ok {
			b.add(a, "keep it, as an optional attribute, until no caller sends it", "%s does not have the attribute %s any more", place, quote(full))
			continue
		}
		if was.Optional && !is.Optional {
			b.add(a, "leave it optional until all callers send it", "%s requires the attribute %s now, which was optional", place, quote(full))
		}
		b.value(a, place, full, was.Type, is.Type)
	}
	for _, name := range sortedKeys(now) {
		if _, ok := old[name]; !ok && !now[name].Optional {
			b.add(a, "make it optional until all callers send it", "%s requires the attribute %s now, which is new", place, quote(path+string(name)))
		}
	}
}

// value compares two types of a value that callers send.
func (b *breaks) value(a *action, place, path string, old, now resolved.IsType) {
	switch o := old.(type) {
	case resolved.RecordType:
		if n, ok := now.(resolved.RecordType); ok {
			b.record(a, place, path+".", o, n)
			return
		}
	case resolved.SetType:
		if n, ok := now.(resolved.SetType); ok {
			b.value(a, place, path+"[]", o.Element, n.Element)
			return
		}
	case resolved.EntityType:
		if n, ok := now.(resolved.EntityType); ok && n == o {
			if id, fewer := b.fewerValues(cedar.EntityType(o)); fewer {
				b.add(a, "", "in the attribute %s of %s, the type %s does not have %s any more", quote(path), place, o, id)
			}
			return
		}
	default:
		if sameType(old, now) {
			return
		}
	}
	b.add(a, "add an attribute with another name, and keep this one until no caller sends it", "the attribute %s of %s is %s now, and was %s", quote(path), place, typeText(now), typeText(old))
}

// typeText names a type in words.
func typeText(t resolved.IsType) string {
	switch t := t.(type) {
	case resolved.BoolType:
		return "a Bool"
	case resolved.LongType:
		return "a Long"
	case resolved.StringType:
		return "a String"
	case resolved.SetType:
		return "a Set"
	case resolved.RecordType:
		return "a record"
	case resolved.EntityType:
		return "an entity of type " + string(t)
	case resolved.ExtensionType:
		return "a value of type " + string(t)
	}
	return fmt.Sprintf("%T", t)
}

// catalogues compares the fields that can be asked for by some actions.
func (b *breaks) catalogues(actions []cedar.EntityUID) {
	// asked has the actions by which the fields of a type could be asked for, and still can, by the bundle of the
	// actions: who may know who asked depends on it.
	asked := map[cedar.EntityType]map[string][]cedar.EntityUID{}
	for _, uid := range actions {
		old, now := b.old.actions[uid], b.now.actions[uid]
		if old.field == nil || now == nil || now.field == nil {
			continue
		}
		for _, t := range sortedTypes(old.appliesTo.Resources) {
			if slices.Contains(now.appliesTo.Resources, t) {
				if asked[t] == nil {
					asked[t] = map[string][]cedar.EntityUID{}
				}
				asked[t][old.bundle] = append(asked[t][old.bundle], uid)
			}
		}
	}
	for _, t := range sortedKeys(b.old.catalogues) {
		known := map[string][]int{}
		if now := b.now.catalogues[t]; now != nil {
			known = now.below
		}
		for _, of := range slices.Sorted(maps.Keys(asked[t])) {
			by := asked[t][of]
			names := make([]string, len(by))
			for i, uid := range by {
				names[i] = uid.String()
			}
			for _, l := range b.old.catalogues[t].leaves {
				if _, ok := known[l.path]; !ok && !b.full() {
					b.list = append(b.list, Break{Bundle: of, Actions: by, Field: true,
						Message: fmt.Sprintf("the field %s of %s is not in the catalogue any more, for %s", quote(l.path), t, shortList(names)),
						Hint:    "keep it until no caller asks for it"})
				}
			}
		}
	}
}

// shortList joins some names, and counts the others.
func shortList(names []string) string {
	const most = 10
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
}
