package main

import (
	"context"
	"fmt"
	"os"
	"strings"

	"google.golang.org/protobuf/types/known/structpb"

	"github.com/cedarpost/cedarpost/internal/keyfile"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/entityfile"
)

type authorizeCmd struct {
	outputFlags
	Principal       uid      `help:"The entity that acts: Shop::User::bob, or as Cedar text, 'Shop::User::\"bob\"'." placeholder:"UID" xor:"principal" required:""`
	PrincipalToken  string   `name:"principal-token-file" help:"File with the access token of the user who acts, in place of --principal." placeholder:"FILE" type:"path" xor:"principal" required:""`
	Action          uid      `required:"" help:"The action: Shop::Action::ViewOrder." placeholder:"UID"`
	Resource        uid      `required:"" help:"The entity that is acted on: Shop::Order::42." placeholder:"UID"`
	Context         string   `help:"The context as JSON, or @FILE." placeholder:"JSON"`
	Fields          []string `help:"Fields of the resource to ask for, or all." placeholder:"PATH"`
	RequireAll      bool     `help:"Deny unless all of the fields are permitted, as for a write."`
	Entities        string   `help:"File with entities that exist in this request only, in Cedar's JSON." placeholder:"FILE" type:"path"`
	RequestID       string   `name:"request-id" help:"Id of the request, for the record." placeholder:"ID"`
	AtLeastAsFresh  string   `help:"Decide at this revision or later: the token that a write returned." placeholder:"TOKEN" xor:"freshness"`
	FullyConsistent bool     `help:"Decide at the newest committed revision." xor:"freshness"`
	Explain         bool     `help:"Also print the outcome of each policy, and why."`
	apiFlags
}

// Help is the long help of authorize.
func (*authorizeCmd) Help() string {
	return `Example:

  cedarpost authorize --principal Shop::User::bob --action Shop::Action::ViewOrder --resource Shop::Order::42 --context '{"mfa": true}' --fields all

Without quotes, the id is the text after the last ::. With -o json, prints the AuthorizeResponse of the API. Exits with 5 if the decision is DENY. An error is never a decision.`
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
	// Any decision other than ALLOW counts as a denial.
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
	if a.PrincipalToken != "" {
		token, err := keyfile.Read(a.PrincipalToken)
		if err != nil {
			return nil, err
		}
		if req.PrincipalToken = strings.TrimSpace(string(token)); req.PrincipalToken == "" {
			return nil, fmt.Errorf("%s: the file is empty", a.PrincipalToken)
		}
	}
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

// parseContext reads a JSON object, from a file if the text begins with "@".
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
