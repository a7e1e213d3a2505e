package engine

import (
	"cmp"
	"fmt"
	"maps"
	"slices"

	"github.com/cedar-policy/cedar-go/types"
	sast "github.com/cedar-policy/cedar-go/x/exp/schema/ast"
)

// The kinds of declarations that an annotation can stand on.
const (
	atPolicy    = "a policy"
	atEntity    = "an entity type"
	atAction    = "an action"
	atAttribute = "an attribute"
)

// annotated lists the annotations that the service acts on, with the kind of
// declaration each must stand on and whether it needs a value. Cedar gives
// annotations no meaning, so authors may use all others as they like.
var annotated = map[types.AnnotationKey]struct {
	at    string
	value bool
}{
	"id":         {atPolicy, true},
	"obligation": {atPolicy, true},
	"advice":     {atPolicy, true},
	lintIgnore:   {atPolicy, true},
	"source":     {atEntity, true},
	"audit":      {atAction, true},
	"sensitive":  {atAttribute, false},
	// Reserved for rules that no version enforces yet.
	"velocity": {},
	"new":      {},
}

// annotationProblem explains why an annotation that the service knows has no effect on
// this kind of declaration. It returns "" if the annotation has an effect, or if the
// service does not know it.
func annotationProblem(key types.AnnotationKey, value types.String, at string) (msg, hint string) {
	known, ours := annotated[key]
	switch {
	case !ours || known.at == at && (value != "" || !known.value):
		return "", ""
	case known.at == "":
		return fmt.Sprintf("@%s is not enforced by this version", key), "remove it: nothing would be checked"
	case known.at != at:
		return fmt.Sprintf("@%s has no effect at %s", key, at), fmt.Sprintf("it is for %s", known.at)
	}
	return fmt.Sprintf("@%s has no value", key), fmt.Sprintf(`write @%s("…")`, key)
}

// annotationProblems reports each annotation of a schema that has no effect.
func annotationProblems(sc *sast.Schema, report func(msg, hint string)) {
	w := annotationWalk{report}
	w.declarations("", sc.Entities, sc.Enums, sc.Actions, sc.CommonTypes)
	for _, name := range slices.Sorted(maps.Keys(sc.Namespaces)) {
		ns := sc.Namespaces[name]
		w.look("namespace "+string(name), "a namespace", ns.Annotations)
		w.declarations(string(name)+"::", ns.Entities, ns.Enums, ns.Actions, ns.CommonTypes)
	}
}

type annotationWalk struct{ report func(msg, hint string) }

func (w annotationWalk) look(what, at string, found sast.Annotations) {
	for _, key := range slices.Sorted(maps.Keys(found)) {
		if msg, hint := annotationProblem(key, found[key], at); msg != "" {
			w.report(what+": "+msg, hint)
		}
	}
}

func (w annotationWalk) declarations(prefix string, entities sast.Entities, enums sast.Enums, actions sast.Actions, common sast.CommonTypes) {
	for _, name := range sortedKeys(entities) {
		e, what := entities[name], "entity "+prefix+string(name)
		w.look(what, atEntity, e.Annotations)
		w.types(what, e.Shape)
		w.types(what+", tags", e.Tags)
	}
	for _, name := range sortedKeys(enums) {
		w.look("entity "+prefix+string(name), "an enumerated entity type", enums[name].Annotations)
	}
	for _, name := range sortedKeys(actions) {
		a, what := actions[name], fmt.Sprintf("action %s%q", prefix, string(name))
		w.look(what, atAction, a.Annotations)
		if a.AppliesTo != nil {
			w.types(what, a.AppliesTo.Context)
		}
	}
	for _, name := range sortedKeys(common) {
		what := "type " + prefix + string(name)
		w.look(what, "a common type", common[name].Annotations)
		w.types(what, common[name].Type)
	}
}

// types looks at the attributes of records, at any depth.
func (w annotationWalk) types(what string, t sast.IsType) {
	switch t := t.(type) {
	case sast.SetType:
		w.types(what, t.Element)
	case sast.RecordType:
		for _, name := range sortedKeys(t) {
			below := what + ", attribute " + quote(string(name))
			w.look(below, atAttribute, t[name].Annotations)
			w.types(below, t[name].Type)
		}
	}
}

func sortedKeys[K cmp.Ordered, V any](m map[K]V) []K { return slices.Sorted(maps.Keys(m)) }
