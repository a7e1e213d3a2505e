package server

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectproto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cedarpost/cedarpost/bundle"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/store"
)

// The rules that can keep a bundle from being published, as PublishBlock names them.
const (
	ruleFrozen    = "frozen"
	ruleWindow    = "freeze_window"
	ruleUnread    = "unread"
	ruleApprovals = "approvals"
	ruleImpact    = "impact"
	ruleDeclined  = "declined"
	ruleBase      = "base"
	ruleUnchanged = "unchanged"
)

// block is a rule that keeps a bundle from being published or deleted, in words.
type block struct {
	rule, message string
	firm          bool // it is about a deletion
}

// glass reports whether break-glass publishes past the rule. It does not override base and unchanged: past the
// first, it would undo a version that somebody published meanwhile; past the second, it would publish no new
// version. It deletes nothing.
func (b block) glass() bool { return !b.firm && b.rule != ruleBase && b.rule != ruleUnchanged }

// proposal is what is about to be published or deleted, as the rules look at it.
type proposal struct {
	bundle, digest string
	rules          bundle.Rules        // of its bundle.yaml
	change         *store.BundleChange // that it is published from; nil: none
	rollbackOf     int64               // the version that it restores; 0: it is no rollback
	deletion       bool                // the bundle is to be deleted
}

// blocks lists what keeps a proposal from being published, or a bundle from being deleted, at a moment, apart
// from what its check finds. Every way to publish asks it, and nothing else has rules for that.
func (s *policyService) blocks(p proposal, live store.Bundle, now store.PolicyState, at time.Time) (list []block) {
	add := func(rule, format string, args ...any) {
		list = append(list, block{rule: rule, message: fmt.Sprintf(format, args...)})
	}
	if p.rollbackOf > 0 { // a rollback is exempt from the rules below
		if live.Digest == p.digest {
			add(ruleUnchanged, "the live version %d of the bundle %s has the same files as version %d; FreezeBundle (cedarpost freeze) keeps it as it is", live.Version, p.bundle, p.rollbackOf)
		}
		return list
	}
	if frozen, ok := errors.AsType[*connect.Error](refuseFrozen(p.bundle, now)); ok {
		add(ruleFrozen, "%s", frozen.Message())
	}
	c, rules := p.change, s.rulesOf(live, p.rules)
	if c == nil && live.Version > 0 && live.Digest == p.digest { // nothing is published
		return list
	}
	if rules.Unread != "" {
		add(ruleUnread, "version %d of the bundle %s has rules for publishing that this server cannot read: %s; upgrade the server", live.Version, p.bundle, rules.Unread)
	}
	list = append(list, windows(p.bundle, rules, at)...)
	if p.deletion {
		if rules.Impact {
			add(ruleImpact, "changes of the bundle %s need a report of their impact, so it cannot be deleted; first publish a change whose bundle.yaml does not say impact: required", p.bundle)
		}
		if rules.Approvals > 0 {
			add(ruleApprovals, "changes of the bundle %s need %s, so it cannot be deleted; first publish a change, with these approvals, whose bundle.yaml says approvals: 0", p.bundle, countOf(rules.Approvals, "approval"))
		}
		for i := range list {
			list[i].firm = true
		}
		return list
	}
	if c == nil {
		if rules.Approvals > 0 {
			add(ruleApprovals, "changes of the bundle %s need %s, so it is published from a change: `cedarpost change create DIR --title TEXT` makes one, others approve it (`cedarpost change approve ID`), and `cedarpost change publish ID` publishes it", p.bundle, countOf(rules.Approvals, "approval"))
		}
		if rules.Impact {
			add(ruleImpact, "changes of the bundle %s need a report of their impact, so it is published from a change (`cedarpost change create DIR --title TEXT`)", p.bundle)
		}
		return list
	}
	switch {
	case c.BaseVersion != live.Version:
		add(ruleBase, "the change %s is of version %d of the bundle %s, and version %d is live; `cedarpost change edit %s --rebase` makes that its base", c.ID, c.BaseVersion, c.Bundle, live.Version, c.ID)
	case live.Version > 0 && live.Digest == c.Digest:
		add(ruleUnchanged, "the change %s changes nothing", c.ID)
	}
	for _, v := range declinesOf(*c) {
		reason := ""
		if v.Reason != "" {
			reason = ": " + v.Reason
		}
		add(ruleDeclined, "the change %s was declined by %s%s; it can be published after its next edit", c.ID, v.Caller, reason)
	}
	if rules.Impact && len(sufficientReports(*c, rules, at)) == 0 {
		add(ruleImpact, "the change %s needs a report of its impact: of its present state, against version %d, of the decisions of the last %d hours or more, without filters, of all or of %d, and with at most %d %% unknown; `cedarpost impact --change %s` makes one", c.ID, c.BaseVersion, int(minImpactWindow.Hours()), minSampled, maxUnknownPercent, c.ID)
	}
	if counts, expired := countedApprovals(*c, rules, at); len(counts) < rules.Approvals {
		also := ""
		if blind := len(approvalsOf(*c)) - len(counts) - len(expired); blind > 0 {
			also = ", and " + countOf(blind, "approval") + " that names no sufficient report of the impact (`cedarpost change approve --report ID`)"
		}
		if len(expired) > 0 {
			also += ", and " + countOf(len(expired), "approval") + " that expired after " + bundle.DurationText(rules.Expire())
		}
		add(ruleApprovals, "the change %s needs %s and has %d%s; callers who did not edit it approve it with `cedarpost change approve %s`", c.ID, countOf(rules.Approvals, "approval"), len(counts), also, c.ID)
	}
	return list
}

// windows lists the freeze windows of a bundle that are open at a moment.
func windows(name string, rules bundle.Rules, at time.Time) (list []block) {
	for _, w := range rules.Freeze {
		text := w.Text()
		if w.KeptOf > 0 {
			text += fmt.Sprintf(" of version %d, which was taken back (the next publish that is no rollback ends that)", w.KeptOf)
		}
		switch in, end, open, err := w.Holds(at); {
		case err != nil:
			list = append(list, block{rule: ruleUnread, message: fmt.Sprintf("a freeze window of the bundle %s cannot be understood: %s: %v", name, text, err)})
		case open:
			list = append(list, block{rule: ruleWindow, message: fmt.Sprintf("the bundle %s is not published in its freeze window %s; the window does not end before %s", name, text, end.Format(time.RFC3339))})
		case in:
			list = append(list, block{rule: ruleWindow, message: fmt.Sprintf("the bundle %s is not published in its freeze window %s; the window ends at %s", name, text, end.Format(time.RFC3339))})
		}
	}
	return list
}

// refuse returns the error of a publish that rules keep from happening: its text has each of them, and so
// has a detail of type PublishBlocked. It is nil if there are none.
func refuse(list []block) error {
	if len(list) == 0 {
		return nil
	}
	err := connect.NewError(connect.CodeFailedPrecondition, strings.Join(messagesOf(list), "; also: "))
	details := &cedarpostv1.PublishBlocked{}
	for _, b := range list {
		details.Blocks = append(details.Blocks, &cedarpostv1.PublishBlock{Rule: b.rule, Message: b.message, BreakGlass: b.glass()})
	}
	if d, derr := connectproto.NewErrorDetail(details); derr == nil {
		err = err.WithDetail(d)
	}
	return err
}

func messagesOf(list []block) (texts []string) {
	for _, b := range list {
		texts = append(texts, b.message)
	}
	return texts
}

// warnings returns the findings of a dry run that rules would keep from being published.
func warnings(name string, list []block) (found []engine.Finding) {
	for _, b := range list {
		found = append(found, engine.Finding{Bundle: name, Message: "it cannot be published now: " + b.message, Warning: true})
	}
	return found
}

// ask asks the rules of a publication, with what is stored now, and returns what else is written. blocked
// are the rules in the way of a dry run; otherwise they are an error, unless break-glass publishes past
// them.
func (p *publication) ask(live store.Bundle, now store.PolicyState) (w store.PolicyWrite, blocked []block, err error) {
	w, blocked, err = p.rules(live, now)
	if err != nil || p.dryRun || len(blocked) == 0 {
		return w, blocked, err
	}
	if p.breakGlass == "" {
		return w, nil, refuse(blocked)
	}
	if firm := slices.DeleteFunc(slices.Clone(blocked), block.glass); len(firm) > 0 {
		return w, nil, refuse(firm)
	}
	w.BreakGlass = &store.BreakGlass{Reason: p.breakGlass, Rules: messagesOf(blocked)}
	return w, nil, nil
}

// rulesOf returns the rules for publishing something over a live version: the stricter ones of both. A name
// keeps the rules of its last version after its bundle was deleted; see departed.
func (s *policyService) rulesOf(live store.Bundle, candidate bundle.Rules) bundle.Rules {
	var over *bundle.Rules
	if live.Name != "" {
		r := liveRules(live)
		over = &r
	}
	return s.stricter(over, candidate)
}

// stricter is rulesOf for the rules of a live version; nil: there is none.
func (s *policyService) stricter(live *bundle.Rules, candidate bundle.Rules) bundle.Rules {
	if live != nil {
		candidate = live.Stricter(candidate)
	}
	if s.noApprovals {
		candidate.Approvals, candidate.Impact = 0, false
	}
	return candidate
}

// liveRules returns the rules of a live version: those of its bundle.yaml, and stricter ones that a
// rollback kept.
func liveRules(live store.Bundle) bundle.Rules {
	r := bundle.ReadRules(live.Manifest)
	if live.Rules != "" {
		r = r.Stricter(decodeRules([]byte(live.Rules)))
	}
	r.Approvals = max(r.Approvals, int(live.Approvals))
	return r
}

// approvalsNeeded returns how many approvals a live version asks for. A rollback keeps a number that is
// larger than that of bundle.yaml.
func approvalsNeeded(live store.Bundle) int { return liveRules(live).Approvals }

// keptRules returns the rules that a rollback keeps besides those of the files that it publishes, as they
// are stored. They must not be shed by a rollback to a time before them.
func keptRules(live store.Bundle, restored bundle.Rules) string {
	kept := liveRules(live)
	kept.Freeze = takenBack(live)
	kept.Approvals, restored.Approvals = 0, 0 // it has a column of its own
	bare := kept
	bare.Freeze = nil
	for _, w := range kept.Freeze {
		w.KeptOf = 0
		bare.Freeze = append(bare.Freeze, w)
	}
	if reflect.DeepEqual(bare, restored) {
		return ""
	}
	kept.ApprovalsExpire = kept.Expire()
	return string(encodeRules(kept))
}

// takenBack returns the freeze windows that a rollback keeps. If the live version is a rollback itself, they are those
// that it keeps, so that a chain of rollbacks keeps what one rollback of all would, and neither adds to that nor sheds
// it.
func takenBack(live store.Bundle) (list []bundle.FreezeWindow) {
	if live.RollbackOf > 0 && live.Rules != "" {
		return decodeRules([]byte(live.Rules)).Freeze
	}
	for _, w := range bundle.ReadRules(live.Manifest).Freeze {
		w.KeptOf = live.Version
		list = append(list, w)
	}
	return list
}

// keptAfterGlass returns what a publish past rules keeps of the live ones besides the number of approvals: that
// the impact is required, and how long approvals count.
func keptAfterGlass(live store.Bundle, published bundle.Rules) string {
	r := liveRules(live)
	if !r.Impact || published.Impact {
		return ""
	}
	return string(encodeRules(bundle.Rules{Impact: true, ApprovalsExpire: r.Expire()}))
}

// storedRules are rules as they are stored. The names of the members must not be changed.
type storedRules struct {
	Approvals     int            `json:"approvals,omitempty"`
	ExpireSeconds int64          `json:"approvals_expire_seconds,omitempty"`
	Impact        bool           `json:"impact,omitempty"`
	Freeze        []storedWindow `json:"freeze,omitempty"`
	Unread        string         `json:"unread,omitempty"`
}

type storedWindow struct {
	At      string `json:"at"`
	Seconds int64  `json:"seconds"`
	Zone    string `json:"zone,omitempty"`
	Reason  string `json:"reason,omitempty"`
	KeptOf  int64  `json:"kept_of,omitempty"`
}

// encodeRules returns nil for rules that ask for nothing.
func encodeRules(r bundle.Rules) json.RawMessage {
	if reflect.DeepEqual(r, bundle.Rules{}) {
		return nil
	}
	out := storedRules{Approvals: r.Approvals, ExpireSeconds: int64(r.ApprovalsExpire / time.Second), Impact: r.Impact, Unread: r.Unread}
	for _, w := range r.Freeze {
		out.Freeze = append(out.Freeze, storedWindow{w.At, int64(w.For / time.Second), w.Zone, w.Reason, w.KeptOf})
	}
	text, err := json.Marshal(out)
	if err != nil {
		panic(err) // it has texts and numbers only
	}
	return text
}

// decodeRules reads what encodeRules made. What cannot be read is a rule that nobody can meet.
func decodeRules(text []byte) (r bundle.Rules) {
	if len(text) == 0 {
		return r
	}
	var in storedRules
	if err := json.Unmarshal(text, &in); err != nil {
		return bundle.Rules{Unread: "the stored rules are damaged"}
	}
	r.Approvals, r.ApprovalsExpire, r.Impact, r.Unread = in.Approvals, time.Duration(in.ExpireSeconds)*time.Second, in.Impact, in.Unread
	for _, w := range in.Freeze {
		r.Freeze = append(r.Freeze, bundle.FreezeWindow{At: w.At, For: time.Duration(w.Seconds) * time.Second, Zone: w.Zone, Reason: w.Reason, KeptOf: w.KeptOf})
	}
	return r
}

// candidateRules reads the rules of bundle.yaml among the files of a change. What cannot be read in it is a
// finding of its check.
func candidateRules(files []bundle.File) bundle.Rules {
	for _, f := range files {
		if f.Path == bundle.ManifestName {
			r := bundle.ReadRules(f.Content)
			r.Unread = ""
			return r
		}
	}
	return bundle.Rules{}
}

// proposalOf returns a change as a proposal.
func proposalOf(c *store.BundleChange) proposal {
	return proposal{bundle: c.Bundle, digest: c.Digest, rules: decodeRules(c.Rules), change: c}
}

// approvalsOf returns the approvals of the change as it is. That of an author does not count.
func approvalsOf(c store.BundleChange) (list []store.Verdict) {
	for _, v := range c.Approvals {
		if v.Digest == c.Digest && !slices.Contains(c.Authors, v.Caller) {
			list = append(list, v)
		}
	}
	return list
}

// declinesOf returns the declines of the change as it is.
func declinesOf(c store.BundleChange) (list []store.Verdict) {
	for _, v := range c.Declines {
		if v.Digest == c.Digest {
			list = append(list, v)
		}
	}
	return list
}

// countedApprovals returns the approvals of a change that count at a moment, and those that have expired. Where
// the impact is required, an approval counts only if it names a sufficient report.
func countedApprovals(c store.BundleChange, rules bundle.Rules, at time.Time) (counts, expired []store.Verdict) {
	reports := sufficientReports(c, rules, at)
	for _, v := range approvalsOf(c) {
		switch {
		case !at.Before(v.At.Add(rules.Expire())):
			expired = append(expired, v)
		case !rules.Impact || slices.Contains(reports, v.Report):
			counts = append(counts, v)
		}
	}
	return counts, expired
}

const (
	// minImpactWindow is the time whose decisions a report must have, at least.
	minImpactWindow = 24 * time.Hour
	// maxImpactAge is how long before a report the last of its decisions may have been made: the author must
	// not choose a time in which nobody asked.
	maxImpactAge = 24 * time.Hour
	// minSampled is how many decisions a report of a share of them must have, at least.
	minSampled = 1000
	// maxUnknownPercent is how many of the decisions of a report may be unknown.
	maxUnknownPercent = 5
)

// sufficientReports returns the ids of the reports of a change that count where its impact is required. A
// report counts as long as an approval.
func sufficientReports(c store.BundleChange, rules bundle.Rules, at time.Time) (ids []string) {
	for _, r := range c.Reports {
		fits := r.Digest == c.Digest && r.LiveVersion == c.BaseVersion && at.Before(r.At.Add(rules.Expire()))
		broad := !r.Narrowed && r.To.Sub(r.From) >= minImpactWindow && !r.To.After(r.At) && r.At.Sub(r.To) <= maxImpactAge && (r.Sample == 1 || r.Decisions >= minSampled)
		if fits && broad && int64(r.Unknown)*100 <= int64(r.Decisions)*maxUnknownPercent {
			ids = append(ids, r.ID)
		}
	}
	return ids
}

// changeToProto converts a change, with the approvals and declines of the state in which it is, at a moment.
// rules are those of [policyService.rulesOf].
func changeToProto(c store.BundleChange, rules bundle.Rules, at time.Time) *cedarpostv1.BundleChange {
	out := &cedarpostv1.BundleChange{
		Id: c.ID, Bundle: c.Bundle, Title: c.Title, Reason: c.Reason, State: changeStates[c.State], BaseVersion: c.BaseVersion, Digest: c.Digest,
		Authors: c.Authors, CreatedAt: timestamppb.New(c.CreatedAt), UpdatedAt: timestamppb.New(c.UpdatedAt), Version: c.Version,
		Approvals: verdictsToProto(approvalsOf(c)), Declines: verdictsToProto(declinesOf(c)), Source: c.Source,
		Reports: reportsToProto(c.Reports), Shadow: shadowToProto(c.Shadow),
	}
	if c.State != store.ChangeOpen {
		return out
	}
	out.ApprovalsNeeded = int32(rules.Approvals)
	for _, v := range out.Approvals {
		end := v.GetAt().AsTime().Add(rules.Expire())
		v.ExpiresAt, v.Expired = timestamppb.New(end), !at.Before(end)
	}
	return out
}

// shown converts a change, by the rules of the live version in the snapshot of this server.
func (s *policyService) shown(c store.BundleChange) *cedarpostv1.BundleChange {
	return changeToProto(c, s.rulesNow(c), time.Now())
}

// rulesNow returns the rules for a change, by the live version in the snapshot of this server.
func (s *policyService) rulesNow(c store.BundleChange) bundle.Rules {
	live, _ := s.follower.Latest().Bundle(c.Bundle)
	return s.rulesOf(live, decodeRules(c.Rules))
}
