package main

import (
	"context"
	"fmt"
	"math"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

type decisionsCmd struct {
	List   listDecisionsCmd   `cmd:"" default:"withargs" help:"List recorded decisions, newest first."`
	Get    getDecisionCmd     `cmd:"" help:"Read one record whole."`
	Replay replayDecisionsCmd `cmd:"" help:"Decide again, with policies and data as they were, and compare."`
	Count  countDecisionsCmd  `cmd:"" help:"Count decisions by principal, action, policy or outcome."`
	Export exportDecisionsCmd `cmd:"" help:"Write out the log, decisions and events, as it was recorded."`
}

// Help is the long help of decisions.
func (*decisionsCmd) Help() string {
	return `Without a further word this is "decisions list", and takes its flags: see cedarpost decisions list --help.`
}

// filterFlags choose decisions.
type filterFlags struct {
	Principal   *uid   `help:"Only this principal: Shop::User::bob." placeholder:"UID"`
	Action      *uid   `help:"Only this action." placeholder:"UID"`
	Resource    *uid   `help:"Only this resource." placeholder:"UID"`
	Decision    string `help:"Only allow, or only deny." enum:",allow,deny" default:"" placeholder:"WORD"`
	DeniedAt    string `help:"Only denials at function, object or field." enum:",function,object,field" default:"" placeholder:"CHECK"`
	Policy      string `help:"Only decisions that this policy determined." placeholder:"BUNDLE/ID"`
	Caller      string `help:"Only this caller of Cedarpost." placeholder:"NAME"`
	RequestID   string `name:"request-id" help:"Only this request id." placeholder:"ID"`
	TraceID     string `name:"trace-id" help:"Only this W3C trace id." placeholder:"ID"`
	Revision    int64  `help:"Only decisions at this revision." placeholder:"N"`
	Field       string `help:"Only decisions about this field, permitted or denied: customer.email." placeholder:"PATH"`
	MaskedValue string `name:"masked-value" help:"Only decisions whose record holds this value masked, as JSON or @FILE. Others on the machine can read what is not in a file." placeholder:"JSON"`
	Since       moment `help:"Not before this time: 2006-01-02T15:04:05Z, or 90m, 12h, 7d ago." placeholder:"TIME"`
	Until       moment `help:"Before this time." placeholder:"TIME"`
}

// filterHelp is the part of the long help that filters share.
const filterHelp = `All filters that are given must match. Principal, resource, denials (--decision deny, --denied-at) and request id are indexed. Without one of them, any other filter needs --since, and --until at most a day later.`

// request is the filters on the wire.
func (f *filterFlags) request() (*cedarpostv1.QueryDecisionsRequest, error) {
	req := &cedarpostv1.QueryDecisionsRequest{
		From: f.Since.timestamp(), To: f.Until.timestamp(), Caller: f.Caller, RequestId: f.RequestID,
		TraceId: f.TraceID, Revision: f.Revision, Field: f.Field,
		Decision: cedarpostv1.Decision(cedarpostv1.Decision_value[strings.ToUpper(f.Decision)]),
		DeniedAt: cedarpostv1.DeniedAt(cedarpostv1.DeniedAt_value[strings.ToUpper(f.DeniedAt)]),
	}
	for _, u := range []struct {
		given *uid
		into  **cedarpostv1.EntityUid
	}{{f.Principal, &req.Principal}, {f.Action, &req.Action}, {f.Resource, &req.Resource}} {
		if u.given != nil {
			*u.into = u.given.EntityUid
		}
	}
	if f.Policy != "" {
		bundle, id, ok := strings.Cut(f.Policy, "/")
		if !ok {
			return nil, misuse("--policy: %q is not bundle/id", f.Policy)
		}
		req.Policy = &cedarpostv1.PolicyRef{Bundle: bundle, Id: id}
	}
	req.MaskedValue = f.MaskedValue
	if file, ok := strings.CutPrefix(f.MaskedValue, "@"); ok {
		text, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		req.MaskedValue = strings.TrimSpace(string(text))
	}
	return req, nil
}

// matches reports whether a decision is one that a query of these filters would
// find. A masked value is not looked at: only the server can hash it.
func matches(req *cedarpostv1.QueryDecisionsRequest, d *cedarpostv1.DecisionRecord) bool {
	at := d.GetTime().AsTime()
	fields := append(slices.Clone(d.GetFields().GetPermitted()), d.GetFields().GetDenied()...)
	for _, f := range []struct{ given, holds bool }{
		{req.From != nil, !at.Before(req.GetFrom().AsTime())},
		{req.To != nil, at.Before(req.GetTo().AsTime())},
		{req.Principal != nil, proto.Equal(req.GetPrincipal(), d.GetPrincipal())},
		{req.Action != nil, proto.Equal(req.GetAction(), d.GetAction())},
		{req.Resource != nil, proto.Equal(req.GetResource(), d.GetResource())},
		{req.Decision != 0, req.GetDecision() == d.GetDecision()},
		{req.DeniedAt != 0, d.DeniedAt != nil && req.GetDeniedAt() == d.GetDeniedAt()},
		{req.Policy != nil, slices.ContainsFunc(d.GetDeterminingPolicies(), func(p *cedarpostv1.PolicyRef) bool { return proto.Equal(p, req.GetPolicy()) })},
		{req.Caller != "", req.GetCaller() == d.GetCaller()},
		{req.RequestId != "", req.GetRequestId() == d.GetRequestId()},
		{req.TraceId != "", req.GetTraceId() == d.GetTraceId()},
		{req.Revision != 0, req.GetRevision() == d.GetRevision()},
		{req.Field != "", slices.Contains(fields, req.GetField())},
	} {
		if f.given && !f.holds {
			return false
		}
	}
	return true
}

type listDecisionsCmd struct {
	outputFlags
	filterFlags
	Limit  int  `help:"At most so many; 0 is all (default ${default})." default:"20" placeholder:"N"`
	Follow bool `help:"Show decisions as they are recorded, until interrupted."`
	adminFlags
}

// Help is the long help of list.
func (*listDecisionsCmd) Help() string {
	return filterHelp + ` With -o json, a line for each DecisionRecord of the API, and in it, as uses, the DecisionUses of an answer that was used again from a cache.

A row that is damaged in the database is shown as DAMAGED, with what is wrong with it in place of the policies (in JSON, as damaged), and its filters match by its columns.

With --follow, decisions come in the order of their commits, oldest first, within about a second, from --since on (default: now, by this machine's clock) and without a limit. The whole log is read for it and filtered here, so no filter needs a time, and --masked-value cannot be given.`
}

// moment is a point in time on the command line, absolute or so long ago.
type moment struct{ time.Time }

// UnmarshalText implements encoding.TextUnmarshaler.
func (m *moment) UnmarshalText(text []byte) (err error) {
	s := string(text)
	if m.Time, err = time.Parse(time.RFC3339, s); err == nil {
		return nil
	}
	var ago span
	if err := ago.UnmarshalText(text); err != nil {
		return fmt.Errorf("%q is neither a time like 2006-01-02T15:04:05Z nor a duration like 90m, 12h or 7d", text)
	}
	m.Time = time.Now().Add(-time.Duration(ago))
	return nil
}

// span is a duration in flags, the environment and the YAML file: as Go writes them, and
// with days before the rest.
type span time.Duration

// day is what a span means by d.
const day = 24 * time.Hour

// durations are what can be given as a span, however large.
var durations = regexp.MustCompile(`^([0-9]+d)?([0-9]+(ns|us|µs|ms|s|m|h))*$`)

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *span) UnmarshalText(text []byte) error {
	days, rest, found := strings.Cut(string(text), "d")
	if !found {
		days, rest = "0", string(text)
	} else if rest == "" {
		rest = "0"
	}
	n, err := strconv.ParseUint(days, 10, 64)
	d, err2 := time.ParseDuration(rest)
	signed := strings.ContainsAny(string(text), "+-")
	if durations.Match(text) && (err != nil || err2 != nil || n > uint64((math.MaxInt64-d)/day)) {
		return fmt.Errorf("%q is too large: a duration is at most 106751 days", text)
	}
	if err != nil || err2 != nil || signed || n > uint64((math.MaxInt64-d)/day) {
		return fmt.Errorf("%q is not a duration like 500ms, 90m, 12h, 7d or 1d12h", text)
	}
	*s = span(time.Duration(n)*day + d)
	return nil
}

// String implements fmt.Stringer.
func (s span) String() string { return time.Duration(s).String() }

// timestamp is nil for a moment that was not given.
func (m moment) timestamp() *timestamppb.Timestamp {
	if m.IsZero() {
		return nil
	}
	return timestamppb.New(m.Time)
}

// Run lists.
func (l *listDecisionsCmd) Run(ctx context.Context, c *console) error {
	req, err := l.request()
	if err != nil {
		return err
	}
	if l.Limit < 0 {
		return misuse("--limit must not be negative")
	}
	admin, err := l.dial()
	if err != nil {
		return err
	}
	if l.Follow {
		return l.follow(ctx, c, admin, req)
	}
	rows := [][]string{slices.Insert(slices.Clone(listColumns), len(listColumns)-1, "REUSED")}
	damaged := 0
	for seen := 0; ; {
		req.PageSize = pageOf(l.Limit, seen)
		res, err := call(ctx, admin, admin.audit().QueryDecisions, req)
		if err != nil {
			return err
		}
		for _, d := range res.GetDecisions() {
			uses := res.GetUses()[d.GetDecisionId()]
			if d.GetDamaged() != "" {
				damaged++
			}
			if seen++; l.json() {
				if err := c.decision(d, uses); err != nil {
					return err
				}
				continue
			}
			row := decisionRow(d)
			rows = append(rows, slices.Insert(row, len(row)-1, hitsText(uses)))
		}
		req.PageToken = res.GetNextPageToken()
		if req.GetPageToken() == "" || seen == l.Limit {
			break
		}
	}
	switch {
	case l.json():
	case len(rows) == 1:
		fmt.Fprintln(c.out, "no decisions")
	default:
		c.table(rows)
	}
	c.warnDamaged(damaged)
	return nil
}

// follow shows what the export brings, as far as it matches.
func (l *listDecisionsCmd) follow(ctx context.Context, c *console, admin *peer, req *cedarpostv1.QueryDecisionsRequest) error {
	if req.GetMaskedValue() != "" {
		return misuse("--masked-value cannot be given with --follow")
	}
	if req.From == nil {
		req.From = timestamppb.Now()
	}
	err := admin.export(ctx, &cedarpostv1.ExportDecisionsRequest{From: req.From, To: req.To, Follow: true}, func(b *cedarpostv1.ExportDecisionsResponse) error {
		for _, e := range b.GetEntries() {
			d, bad := e.GetDecision(), damageOf(e)
			// Whether a row that is damaged would match cannot be told, so all are shown.
			if bad == nil && (d == nil || !matches(req, d)) {
				continue
			}
			if l.json() {
				var m proto.Message = e // of an event, and of a row that is missing
				if d != nil {
					m = d
				}
				if err := c.message(m); err != nil {
					return err
				}
				continue
			}
			var row []string
			if bad != nil {
				row = bad.cells(len(listColumns))
			} else {
				row = decisionRow(d)
			}
			for i := range row {
				row[i] = clean(row[i])
			}
			fmt.Fprintln(c.out, strings.Join(row, "  "))
		}
		return nil
	})
	select {
	case <-ctx.Done():
		return nil // that is how it ends
	default:
		return err
	}
}

// listColumns are those of the list; the follower leaves REUSED out.
var listColumns = []string{"TIME", "DECISION", "PRINCIPAL", "ACTION", "RESOURCE", "DENIED AT", "POLICIES", "ID"}

func decisionRow(d *cedarpostv1.DecisionRecord) []string {
	if bad := damageOf(&cedarpostv1.LogEntry{Entry: &cedarpostv1.LogEntry_Decision{Decision: d}}); bad != nil {
		return bad.cells(len(listColumns))
	}
	at, policies := "", policyTexts(d.GetDeterminingPolicies())
	if d.DeniedAt != nil {
		at = d.GetDeniedAt().String()
	}
	if policies == "" {
		policies = "-"
	}
	return []string{
		d.GetTime().AsTime().Local().Format(time.DateTime), d.GetDecision().String(),
		uidText(d.GetPrincipal()), uidText(d.GetAction()), uidText(d.GetResource()), at, policies, d.GetDecisionId(),
	}
}

type getDecisionCmd struct {
	outputFlags
	ID string `arg:"" help:"Id of the decision."`
	adminFlags
}

// Help is the long help of get.
func (*getDecisionCmd) Help() string {
	return `With -o json, the DecisionRecord of the API, and in it, as uses, the DecisionUses if the answer was used again from a cache.`
}

// Run reads one record.
func (g *getDecisionCmd) Run(ctx context.Context, c *console) error {
	admin, err := g.dial()
	if err != nil {
		return err
	}
	res, err := call(ctx, admin, admin.audit().GetDecision, &cedarpostv1.GetDecisionRequest{DecisionId: g.ID})
	if err != nil {
		return err
	}
	d := res.GetDecision()
	if g.json() {
		return c.decision(d, res.GetUses())
	}
	c.printDecision(d.GetDecision(), d.DeniedAt)
	c.pair("principal", uidText(d.GetPrincipal()))
	c.pair("action", uidText(d.GetAction()))
	c.pair("resource", uidText(d.GetResource()))
	c.pair("context", structText(d.GetContext()))
	for _, e := range d.GetEntities() {
		c.pair("entity", fmt.Sprintf("%s in [%s] %s", uidText(e.GetUid()), uidTexts(e.GetParents()), structText(e.GetAttrs())))
	}
	c.pair("fields asked", askedText(d.GetFieldsAsked()))
	c.printReasons(d)
	c.pair("time", d.GetTime().AsTime().Local().Format("2006-01-02 15:04:05.000 -07:00"))
	c.pair("masked", strings.Join(d.GetMasked(), ", "))
	c.pair("took", fmt.Sprintf("%v, of which loading %v", d.GetEvaluationTime().AsDuration(), d.GetLoadTime().AsDuration()))
	c.pair("mode", d.GetMode())
	if d.GetMayBeKept() != nil {
		c.pair("may be kept", d.GetMayBeKept().AsDuration().String())
	}
	c.pair("used again", usesText(res.GetUses()))
	c.pair("revision", fmt.Sprint(d.GetRevision()))
	c.pair("caller", d.GetCaller())
	c.pair("server", d.GetServer())
	c.pair("request id", d.GetRequestId())
	c.pair("trace id", d.GetTraceId())
	c.pair("engine", d.GetEngine())
	c.pair("decision", d.GetDecisionId())
	return nil
}

func askedText(f *cedarpostv1.FieldSelection) string {
	text := strings.Join(f.GetPaths(), ", ")
	if f.GetAll() {
		text = "all"
	}
	if f.GetRequireAll() {
		text += " (each one required)"
	}
	return text
}
