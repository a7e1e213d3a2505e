package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

type decisionsCmd struct {
	List listDecisionsCmd `cmd:"" default:"withargs" help:"List recorded decisions, newest first."`
	Get  getDecisionCmd   `cmd:"" help:"Read one record whole."`
}

// Help is the long help of decisions.
func (*decisionsCmd) Help() string {
	return `Without a further word this is "decisions list", and takes its flags: see cedarpost decisions list --help.`
}

type listDecisionsCmd struct {
	outputFlags
	Principal *uid   `help:"Only this principal: Shop::User::bob." placeholder:"UID"`
	Action    *uid   `help:"Only this action." placeholder:"UID"`
	Resource  *uid   `help:"Only this resource." placeholder:"UID"`
	Decision  string `help:"Only allow, or only deny." enum:",allow,deny" default:"" placeholder:"WORD"`
	DeniedAt  string `help:"Only denials at function, object or field." enum:",function,object,field" default:"" placeholder:"CHECK"`
	Policy    string `help:"Only decisions that this policy determined." placeholder:"BUNDLE/ID"`
	Caller    string `help:"Only this caller of Cedarpost." placeholder:"NAME"`
	RequestID string `name:"request-id" help:"Only this request id." placeholder:"ID"`
	Since     moment `help:"Not before this time: 2006-01-02T15:04:05Z, or 90m, 12h, 7d ago." placeholder:"TIME"`
	Until     moment `help:"Before this time." placeholder:"TIME"`
	Limit     int    `help:"At most so many; 0 is all (default ${default})." default:"20" placeholder:"N"`
	adminFlags
}

// Help is the long help of list.
func (*listDecisionsCmd) Help() string {
	return `All filters that are given must match. With -o json, a line for each DecisionRecord of the API.`
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
		return fmt.Errorf("%q is neither a time like 2006-01-02T15:04:05Z nor a span like 90m, 12h or 7d", text)
	}
	m.Time = time.Now().Add(-time.Duration(ago))
	return nil
}

// span is a length of time on the command line, in days too.
type span time.Duration

// UnmarshalText implements encoding.TextUnmarshaler.
func (s *span) UnmarshalText(text []byte) error {
	t := string(text)
	var days int
	if n, _ := fmt.Sscanf(t, "%dd", &days); n == 1 && t == fmt.Sprintf("%dd", days) {
		t = fmt.Sprintf("%dh", 24*days)
	}
	d, err := time.ParseDuration(t)
	if err != nil || d < 0 {
		return fmt.Errorf("%q is not a span like 90m, 12h or 7d", text)
	}
	*s = span(d)
	return nil
}

// timestamp is nil for a moment that was not given.
func (m moment) timestamp() *timestamppb.Timestamp {
	if m.IsZero() {
		return nil
	}
	return timestamppb.New(m.Time)
}

// query is the filters on the wire.
func (l *listDecisionsCmd) query() (*cedarpostv1.QueryDecisionsRequest, error) {
	req := &cedarpostv1.QueryDecisionsRequest{
		From: l.Since.timestamp(), To: l.Until.timestamp(), Caller: l.Caller, RequestId: l.RequestID,
		Decision: cedarpostv1.Decision(cedarpostv1.Decision_value[strings.ToUpper(l.Decision)]),
		DeniedAt: cedarpostv1.DeniedAt(cedarpostv1.DeniedAt_value[strings.ToUpper(l.DeniedAt)]),
	}
	for _, f := range []struct {
		given *uid
		into  **cedarpostv1.EntityUid
	}{{l.Principal, &req.Principal}, {l.Action, &req.Action}, {l.Resource, &req.Resource}} {
		if f.given != nil {
			*f.into = f.given.EntityUid
		}
	}
	if l.Policy != "" {
		bundle, id, ok := strings.Cut(l.Policy, "/")
		if !ok {
			return nil, misuse("--policy: %q is not bundle/id", l.Policy)
		}
		req.Policy = &cedarpostv1.PolicyRef{Bundle: bundle, Id: id}
	}
	if l.Limit < 0 {
		return nil, misuse("--limit must not be negative")
	}
	return req, nil
}

// Run lists.
func (l *listDecisionsCmd) Run(ctx context.Context, c *console) error {
	req, err := l.query()
	if err != nil {
		return err
	}
	admin, err := l.dial()
	if err != nil {
		return err
	}
	rows := [][]string{{"TIME", "DECISION", "PRINCIPAL", "ACTION", "RESOURCE", "DENIED AT", "POLICIES", "ID"}}
	for seen := 0; ; {
		req.PageSize = pageOf(l.Limit, seen)
		res, err := call(ctx, admin, admin.audit().QueryDecisions, req)
		if err != nil {
			return err
		}
		for _, d := range res.GetDecisions() {
			if seen++; l.json() {
				if err := c.message(d); err != nil {
					return err
				}
				continue
			}
			rows = append(rows, decisionRow(d))
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
	return nil
}

func decisionRow(d *cedarpostv1.DecisionRecord) []string {
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
func (*getDecisionCmd) Help() string { return `With -o json, the DecisionRecord of the API.` }

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
		return c.message(d)
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
	c.pair("took", fmt.Sprint(d.GetEvaluationTime().AsDuration()))
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
