package server

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/cedar-policy/cedar-go"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/snapshot"
	"github.com/cedarpost/cedarpost/store"
)

const (
	askedWithin = 7 * 24 * time.Hour // how far back callers that asked are looked for
	askedBound  = 3 * time.Second    // how long the log is read for that
	maxAskers   = 20                 // callers that are named in one text
	maxNamed    = 200                // names in all findings of one answer
)

// breaksOf lists what a bundle that was checked breaks for those who ask as before. set is nil if it is
// not valid.
func breaksOf(v snapshot.View, set *engine.Set, name string) []engine.Break {
	if set == nil || name == engine.AdminLocal { // admin-local is checked apart from the other bundles, and has no actions
		return nil
	}
	return set.Breaks(v.Set)
}

// refuseBreaking refuses to publish a bundle that breaks callers.
func (s *policyService) refuseBreaking(ctx context.Context, p *publication, v snapshot.View, list []engine.Break) error {
	asked := s.whoAsked(ctx, p, list)
	found := findingsToProto(p.bundle.Name, breakFindings(ctx, p.bundle.Name, list, asked, false))
	return refusal(connect.CodeFailedPrecondition, "it breaks callers who ask as before"+asked.summary()+"; allow_breaking (--allow-breaking) publishes it nevertheless", found)
}

// breakFindings turns breaks into findings. The hint of the first one about an action says who asked, if
// asked is not nil. An action of another bundle that the caller may not read is not named.
func breakFindings(ctx context.Context, name string, list []engine.Break, asked *whoAsked, warning bool) (found []engine.Finding) {
	hidden := false
	for _, b := range list {
		f := engine.Finding{Bundle: b.Bundle, Message: b.Message, Hint: b.Hint, Warning: warning}
		switch {
		case b.Bundle != name && !access.RightsFrom(ctx).May("GetBundle", access.Target{Bundle: b.Bundle}):
			if hidden {
				continue
			}
			hidden = true
			f = engine.Finding{Bundle: hiddenBundle, Message: "callers of actions of another bundle, which this caller may not read, break", Warning: warning}
		case b.Field:
			f.File = bundle.FieldsName
		case b.Bundle == name:
			f.File, f.Line, f.Column = b.File, b.Line, b.Column
		}
		if f.Bundle != hiddenBundle {
			if who := asked.about(b.Actions); f.Hint == "" {
				f.Hint = who
			} else if who != "" {
				f.Hint += "; " + who
			}
		}
		if warning {
			f.Message = "breaks callers: " + f.Message
		}
		found = append(found, f)
	}
	return found
}

// whoAsked says which callers asked about actions lately.
type whoAsked struct {
	may    map[cedar.EntityUID]bool // the actions whose askers the caller of the call may know
	hidden bool                     // there are others
	counts map[cedar.EntityUID]map[string]int64
	since  time.Time // the log was read back to here
	whole  bool      // that is all of askedWithin
	err    error     // why the log was not read
	told   map[cedar.EntityUID]bool
	named  int
}

// whoAsked asks the log which callers asked about actions that break. Only actions of bundles whose
// decisions the caller may read are looked for, and that is recorded as a read of the log.
func (s *policyService) whoAsked(ctx context.Context, p *publication, list []engine.Break) *whoAsked {
	w := &whoAsked{may: map[cedar.EntityUID]bool{}, counts: map[cedar.EntityUID]map[string]int64{}, told: map[cedar.EntityUID]bool{}}
	rights := access.RightsFrom(ctx)
	var actions []store.UID
	var names []any
	for _, b := range list {
		for _, uid := range b.Actions {
			if _, seen := w.may[uid]; seen {
				continue
			}
			w.may[uid] = rights.May("QueryDecisions", access.Target{Bundle: b.Bundle, Action: uid})
			if !w.may[uid] {
				w.hidden = true
				continue
			}
			actions = append(actions, store.UID{Type: string(uid.Type), ID: string(uid.ID)})
			names = append(names, uid.String())
		}
	}
	if len(actions) == 0 {
		return w
	}
	to := time.Now().Add(time.Minute) // another server's clock may be ahead
	from := to.Add(-askedWithin)
	found, err := s.db.Askers(ctx, actions, from, to, askedBound)
	if err == nil {
		callers := map[string]bool{}
		for _, a := range found.List {
			uid := cedar.NewEntityUID(cedar.EntityType(a.Action.Type), cedar.String(a.Action.ID))
			if w.counts[uid] == nil {
				w.counts[uid] = map[string]int64{}
			}
			w.counts[uid][a.Caller] = a.Count
			callers[a.Caller] = true
		}
		w.since, w.whole = found.Since, !found.Since.After(from)
		var asked *structpb.Struct
		if asked, err = structpb.NewStruct(map[string]any{"callersOf": names, "from": found.Since.UTC().Format(time.RFC3339)}); err == nil {
			err = s.recorder.RecordLogRead(ctx, p.procedure, asked, len(callers))
		}
	}
	if err != nil {
		w.err, w.counts = err, nil
	}
	return w
}

// names lists the callers that asked about some actions, those that asked most first, and counts those
// that are left out.
func (w *whoAsked) names(actions []cedar.EntityUID) (list []string, more int) {
	counts := map[string]int64{}
	for _, uid := range actions {
		for caller, n := range w.counts[uid] {
			counts[caller] += n
		}
	}
	for caller := range counts {
		list = append(list, caller)
	}
	slices.SortFunc(list, func(a, b string) int { return cmp.Or(cmp.Compare(counts[b], counts[a]), cmp.Compare(a, b)) })
	if len(list) > maxAskers {
		list, more = list[:maxAskers], len(list)-maxAskers
	}
	for i, caller := range list {
		list[i] = fmt.Sprintf("%s (%s)", caller, countOf(int(counts[caller]), "time"))
	}
	return list, more
}

// window names the time that the log was read for.
func (w *whoAsked) window() string {
	if w.whole {
		return "in the last 7 days"
	}
	return "since " + w.since.UTC().Format(time.RFC3339)
}

// about says who asked about some actions; "" if it was said already for one of them, or if w is nil.
func (w *whoAsked) about(actions []cedar.EntityUID) string {
	if w == nil || len(actions) == 0 || w.told[actions[0]] {
		return ""
	}
	for _, uid := range actions {
		w.told[uid] = true
	}
	if slices.ContainsFunc(actions, func(uid cedar.EntityUID) bool { return !w.may[uid] }) {
		return fmt.Sprintf("an auditor of the bundle sees in the log who asks: `cedarpost decisions --action '%s' --since 24h`", actions[0])
	}
	list, more := w.names(actions)
	switch {
	case w.err != nil:
		return "who asked in the last 7 days is not known: the log cannot be read now"
	case len(list) == 0 && w.whole:
		return "nobody asked in the last 7 days"
	case len(list) == 0:
		return fmt.Sprintf("who asked in the last 7 days is not known: the log is too large to read it all, and nobody asked %s", w.window())
	}
	if w.named += len(list); w.named > maxNamed {
		return fmt.Sprintf("%s asked %s", countOf(len(list)+more, "caller"), w.window())
	}
	text := fmt.Sprintf("asked %s by %s", w.window(), strings.Join(list, ", "))
	if more > 0 {
		text += " and " + countOf(more, "other caller")
	}
	if !w.whole {
		text += "; who asked before is not known, because the log is too large to read it all"
	}
	return text
}

// summary is the part of a refusal that says who asked about any of the actions.
func (w *whoAsked) summary() string {
	var all []cedar.EntityUID
	for uid := range w.may {
		all = append(all, uid)
	}
	list, more := w.names(all)
	switch {
	case len(list) > 0 && more > 0:
		return fmt.Sprintf(" (asked %s by %s and %s)", w.window(), strings.Join(list, ", "), countOf(more, "other caller"))
	case len(list) > 0:
		return fmt.Sprintf(" (asked %s by %s)", w.window(), strings.Join(list, ", "))
	case w.whole && !w.hidden && w.err == nil:
		return " (nobody asked in the last 7 days)"
	}
	return ""
}
