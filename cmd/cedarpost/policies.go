package main

import (
	"context"
	"fmt"
	"strings"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

type policiesCmd struct {
	List listPoliciesCmd `cmd:"" default:"withargs" help:"List the live policies."`
	Show showPolicyCmd   `cmd:"" help:"Show a live policy."`
}

type listPoliciesCmd struct {
	outputFlags
	Bundle     string `help:"Only policies of this bundle." placeholder:"NAME"`
	Effect     string `help:"Only permit, or only forbid." type:"word" enum:",permit,forbid" default:"" placeholder:"EFFECT"`
	Action     uid    `help:"Only policies that can concern this action, such as Shop::Action::ViewOrder." placeholder:"UID"`
	Principal  uid    `help:"Only policies that can concern this principal, or this group of principals." placeholder:"UID"`
	Resource   uid    `help:"Only policies that can concern this resource, or this group of resources." placeholder:"UID"`
	Annotation string `help:"Only policies with this annotation, or with this value of it." placeholder:"NAME[=VALUE]"`
	Unused     moment `name:"unused-since" help:"Only policies that have determined no decision since this time: 2006-01-02T15:04:05Z, or 12h, 30d ago." placeholder:"TIME"`
	Limit      int    `help:"At most so many (default ${default}; 0: all)." default:"0" placeholder:"N"`
	afterFlag
	adminFlags
}

// Help is the long help of policies list.
func (*listPoliciesCmd) Help() string {
	return `Lists the policies of the live bundles. A policy can concern a principal if its scope names it, its type, or a group that it is in, or if it has no scope. If you may not read the entity, all groups that the schema allows count.

LAST says when a policy last determined a decision, or, as a forbid, denied fields of one. "not since" means that it has not done so since decisions are counted for it. If you may not list decisions, you see the day in UTC. --unused-since leaves out policies that have been counted for a shorter time, and says how many.`
}

// Run lists policies. As JSON, each policy is a line.
func (l *listPoliciesCmd) Run(ctx context.Context, c *console) error {
	if l.Limit < 0 {
		return misuse("--limit must not be negative")
	}
	req := &cedarpostv1.ListPoliciesRequest{Bundle: l.Bundle, Effect: l.Effect, Action: l.Action.EntityUid, Principal: l.Principal.EntityUid, Resource: l.Resource.EntityUid}
	if name, value, ok := strings.Cut(l.Annotation, "="); ok {
		req.Annotation, req.AnnotationValue = name, &value
	} else {
		req.Annotation = l.Annotation
	}
	req.UnusedSince = l.Unused.timestamp()
	admin, err := l.dial()
	if err != nil {
		return err
	}
	rows := [][]string{{"POLICY", "EFFECT", "PRINCIPAL", "ACTION", "RESOURCE", "WHEN", "LAST", "FILE"}}
	tooNew, listed := 0, 0
	req.PageToken = l.After
	for left := l.Limit; ; {
		if l.Limit > 0 {
			req.PageSize = int32(min(left, 1000))
		}
		res, err := call(ctx, admin, admin.policies().ListPolicies, req)
		if err != nil {
			return err
		}
		for _, p := range res.GetPolicies() {
			if l.json() {
				if err := c.message(p); err != nil {
					return err
				}
				continue
			}
			when := ""
			if p.GetConditional() {
				when = "when"
			}
			rows = append(rows, []string{p.GetBundle() + "/" + p.GetId(), p.GetEffect(), scopeText(p.GetPrincipal()), scopeText(p.GetAction()), scopeText(p.GetResource()), when, lastDetermined(p), fmt.Sprintf("%s:%d", p.GetFile(), p.GetLine())})
		}
		listed += len(res.GetPolicies())
		left -= len(res.GetPolicies())
		tooNew += int(res.GetTooNew())
		if req.PageToken = res.GetNextPageToken(); req.PageToken == "" || l.Limit > 0 && left <= 0 {
			break
		}
	}
	if l.Bundle != "" && listed == 0 {
		if err := admin.knows(ctx, l.Bundle); err != nil {
			return err
		}
	}
	if !l.json() {
		c.table(rows)
	}
	if tooNew > 0 {
		fmt.Fprintf(c.err, "not listed: %s that decisions have been counted for since a later time\n", count(tooNew, "policy", "policies"))
	}
	c.more(req.GetPageToken())
	return nil
}

// lastDetermined says when a policy last determined a decision.
func lastDetermined(p *cedarpostv1.Policy) string {
	switch {
	case p.GetCountedSince() == nil:
		return "not counted"
	case p.GetLastDetermined() == nil:
		return "not since " + p.GetCountedSince().AsTime().Format("2006-01-02 15:04Z")
	}
	return p.GetLastDetermined().AsTime().Format("2006-01-02 15:04Z")
}

// scopeText is a scope without the name of its variable; "any" if it has no constraint.
func scopeText(scope string) string {
	if _, constraint, ok := strings.Cut(scope, " "); ok {
		return constraint
	}
	return "any"
}

type showPolicyCmd struct {
	outputFlags
	Policy string `arg:"" help:"The policy, as BUNDLE/ID."`
	adminFlags
}

// Run shows a policy. As JSON, it is one object.
func (s *showPolicyCmd) Run(ctx context.Context, c *console) error {
	bundle, id, ok := strings.Cut(s.Policy, "/")
	if !ok {
		return misuse("%q is not a policy: name it as BUNDLE/ID", s.Policy)
	}
	admin, err := s.dial()
	if err != nil {
		return err
	}
	res, err := call(ctx, admin, admin.policies().GetPolicy, &cedarpostv1.GetPolicyRequest{Bundle: bundle, Id: id})
	if err != nil {
		return err
	}
	p := res.GetPolicy()
	if s.json() {
		return c.message(p)
	}
	fmt.Fprintf(c.out, "%s/%s: %s\n", clean(p.GetBundle()), clean(p.GetId()), p.GetEffect())
	c.pair("file", fmt.Sprintf("%s:%d", p.GetFile(), p.GetLine()))
	c.pair("since", fmt.Sprintf("revision %d", p.GetRevision()))
	c.pair("decided", lastDetermined(p))
	fmt.Fprintln(c.out)
	c.printText(p.GetText())
	return nil
}
