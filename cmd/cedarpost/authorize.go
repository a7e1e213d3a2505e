package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/cedarpost/cedarpost/internal/entityuid"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/entityfile"
)

// uid is an entity's name on the command line: Cedar text, or the same without the
// quotes, which shells take away.
type uid struct{ *cedarpostv1.EntityUid }

// UnmarshalText implements encoding.TextUnmarshaler.
func (u *uid) UnmarshalText(text []byte) error {
	s := string(text)
	if !strings.Contains(s, `"`) {
		i := strings.LastIndex(s, "::")
		if i < 0 || i+2 == len(s) {
			return fmt.Errorf(`%q is not an entity like Shop::User::bob or 'Shop::User::"bob"'`, s)
		}
		s = entityuid.Format(s[:i], s[i+2:])
	}
	typ, id, err := entityuid.Parse(s)
	if err != nil {
		return err
	}
	u.EntityUid = &cedarpostv1.EntityUid{Type: typ, Id: id}
	return nil
}

type authorizeCmd struct {
	outputFlags
	Principal       uid      `required:"" help:"Who acts: Shop::User::bob, or in Cedar text, 'Shop::User::\"bob\"'." placeholder:"UID"`
	Action          uid      `required:"" help:"What it wants to do: Shop::Action::ViewOrder." placeholder:"UID"`
	Resource        uid      `required:"" help:"On what: Shop::Order::42." placeholder:"UID"`
	Context         string   `help:"The context as JSON, or @FILE." placeholder:"JSON"`
	Fields          []string `help:"Fields of the resource that are asked for, or all." placeholder:"PATH"`
	RequireAll      bool     `help:"Deny unless every one of the fields is permitted, as for a write."`
	Entities        string   `help:"File with entities that exist in this request only, in Cedar's JSON." placeholder:"FILE" type:"path"`
	RequestID       string   `name:"request-id" help:"Your id of the request, for the record." placeholder:"ID"`
	AtLeastAsFresh  string   `help:"Decide at this revision or later: the token that a write gave back." placeholder:"TOKEN" xor:"freshness"`
	FullyConsistent bool     `help:"Decide on what is committed now." xor:"freshness"`
	Explain         bool     `help:"Also say of each policy what it came to, and why."`
	apiFlags
}

// Help is the long help of authorize.
func (*authorizeCmd) Help() string {
	return `Example:

  cedarpost authorize --principal Shop::User::bob --action Shop::Action::ViewOrder --resource Shop::Order::42 --context '{"mfa": true}' --fields all

In the shorthand without quotes, what follows the last :: is the id. With -o json, the AuthorizeResponse of the API. Exits with 5 if the decision is DENY; an error is never a decision.`
}

// Run asks and prints.
func (a *authorizeCmd) Run(ctx context.Context, c *console) error {
	req, err := a.request()
	if err != nil {
		return err
	}
	api, err := a.dial()
	if err != nil {
		return err
	}
	res, err := call(ctx, api, api.authorization().Authorize, req)
	if err != nil {
		return err
	}
	if a.json() {
		err = c.message(res)
	} else {
		c.printDecision(res.GetDecision(), res.DeniedAt)
		c.printReasons(res)
		c.pair("revision", fmt.Sprint(res.GetRevision().GetNumber()))
		c.pair("decision", res.GetDecisionId())
		if a.Explain {
			c.printExplanation(res.GetExplanation())
		}
	}
	// Whatever is not plainly an allow is a deny.
	if err == nil && res.GetDecision() != cedarpostv1.Decision_ALLOW {
		return exitWith(codeDenied)
	}
	return err
}

func (a *authorizeCmd) request() (*cedarpostv1.AuthorizeRequest, error) {
	req := &cedarpostv1.AuthorizeRequest{
		Principal: a.Principal.EntityUid, Action: a.Action.EntityUid, Resource: a.Resource.EntityUid, RequestId: a.RequestID,
		Explain: a.Explain,
	}
	var err error
	if a.Context != "" {
		if req.Context, err = parseContext(a.Context); err != nil {
			return nil, misuse("--context: %w", err)
		}
	}
	switch {
	case len(a.Fields) == 1 && a.Fields[0] == "all":
		req.Fields = &cedarpostv1.FieldSelection{All: true, RequireAll: a.RequireAll}
	case len(a.Fields) > 0:
		req.Fields = &cedarpostv1.FieldSelection{Paths: a.Fields, RequireAll: a.RequireAll}
	case a.RequireAll:
		return nil, misuse("--require-all needs --fields")
	}
	if a.Entities != "" {
		text, err := os.ReadFile(a.Entities)
		if err != nil {
			return nil, err
		}
		if req.Entities, err = entityfile.Parse(text); err != nil {
			return nil, fmt.Errorf("%s: %w", a.Entities, err)
		}
	}
	switch {
	case a.FullyConsistent:
		req.Consistency = &cedarpostv1.Consistency{Requirement: &cedarpostv1.Consistency_FullyConsistent{FullyConsistent: true}}
	case a.AtLeastAsFresh != "":
		req.Consistency = &cedarpostv1.Consistency{Requirement: &cedarpostv1.Consistency_AtLeastAsFresh{
			AtLeastAsFresh: &cedarpostv1.Revision{Token: a.AtLeastAsFresh},
		}}
	}
	return req, nil
}

// parseContext reads a JSON object, from a file after "@".
func parseContext(s string) (*structpb.Struct, error) {
	text := []byte(s)
	if file, ok := strings.CutPrefix(s, "@"); ok {
		var err error
		if text, err = os.ReadFile(file); err != nil {
			return nil, err
		}
	}
	record, err := entityfile.ParseRecord(text)
	if err != nil {
		return nil, fmt.Errorf(`not a JSON object like {"mfa": true}: %w`, err)
	}
	return record, nil
}

// printDecision prints the first line about a decision.
func (c *console) printDecision(d cedarpostv1.Decision, at *cedarpostv1.DeniedAt) {
	switch {
	case d == cedarpostv1.Decision_ALLOW:
		fmt.Fprintln(c.out, c.paint(green, "ALLOW"))
	case at != nil:
		fmt.Fprintln(c.out, c.paint(red, "DENY at "+at.String()))
	default:
		fmt.Fprintln(c.out, c.paint(red, d.String()))
	}
}

// reasons is what an answer and a record both say.
type reasons interface {
	GetDecision() cedarpostv1.Decision
	GetFields() *cedarpostv1.Fields
	GetDeterminingPolicies() []*cedarpostv1.PolicyRef
	GetErrors() []*cedarpostv1.PolicyError
	GetObligations() []*cedarpostv1.Obligation
	GetAdvice() []*cedarpostv1.Advice
}

func (c *console) printReasons(r reasons) {
	if f := r.GetFields(); f != nil {
		permitted := strings.Join(f.GetPermitted(), ", ")
		if permitted == "" {
			permitted = "(none)"
		}
		c.pair("permitted", permitted)
		c.pair("denied", strings.Join(f.GetDenied(), ", "))
	}
	policies := policyTexts(r.GetDeterminingPolicies())
	if policies == "" && r.GetDecision() == cedarpostv1.Decision_DENY {
		policies = "(none permits it)"
	}
	c.pair("policies", policies)
	for _, o := range r.GetObligations() {
		c.pair("obligation", fmt.Sprintf("%s (%s)", o.GetText(), policyText(o.GetPolicy())))
	}
	for _, a := range r.GetAdvice() {
		text := fmt.Sprintf("%s (%s)", a.GetText(), policyText(a.GetPolicy()))
		if len(a.GetPaths()) > 0 {
			text += " for " + strings.Join(a.GetPaths(), ", ")
		}
		c.pair("advice", text)
	}
	for _, e := range r.GetErrors() {
		c.pair("error", policyText(e.GetPolicy())+": "+e.GetMessage())
	}
}

// printRevision prints the number for people, and the token for
// --at-least-as-fresh and --at.
func (c *console) printRevision(r *cedarpostv1.Revision) {
	c.pair("revision", fmt.Sprint(r.GetNumber()))
	c.pair("token", r.GetToken())
}
