package main

import (
	"context"
	"fmt"
	"strings"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

type getDecisionCmd struct {
	outputFlags
	ID      string `arg:"" help:"Id of the decision."`
	Explain bool   `help:"Decide again at the revision of the decision, and print how each policy came out, and why."`
	adminFlags
}

// Help is the long help of get.
func (*getDecisionCmd) Help() string {
	return `With -o json, prints the DecisionRecord of the API. If a client used the answer again from its cache, the record has the DecisionUses as uses. With --explain and -o json, prints the ReplayDecisionResponse.`
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
	var again *cedarpostv1.ReplayDecisionResponse
	if g.Explain {
		again, err = call(ctx, admin, admin.audit().ReplayDecision, &cedarpostv1.ReplayDecisionRequest{DecisionId: g.ID, Explain: true})
		if err != nil {
			return err
		}
	}
	if g.json() && g.Explain {
		return c.message(again)
	}
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
	c.pair("time", d.GetTime().AsTime().Local().Format("2006-01-02T15:04:05.000Z07:00"))
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
	c.printPast(again, g.Explain)
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
