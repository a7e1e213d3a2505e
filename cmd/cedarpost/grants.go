package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/alecthomas/kong"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/access"
)

type grantsCmd struct {
	List   listGrantsCmd  `cmd:"" default:"withargs" help:"List the grants."`
	Put    putGrantCmd    `cmd:"" help:"Give a role to a caller, or change how."`
	Delete deleteGrantCmd `cmd:"" help:"Take a role from a caller."`
}

type listGrantsCmd struct {
	Caller string `arg:"" optional:"" help:"Only the grants of this caller."`
	outputFlags
	adminFlags
}

// Run lists the grants. As JSON, each grant is a line.
func (l *listGrantsCmd) Run(ctx context.Context, k *kong.Context, c *console) error {
	admin, err := l.dial()
	if err != nil {
		return err
	}
	list, err := admin.grantsOf(ctx, l.Caller)
	if err != nil {
		return err
	}
	if len(list) == 0 && l.Caller != "" && isGuess(k, l.Caller) {
		return misuse("no caller %q has grants, and there is no such command; the commands of grants are list, put and delete", l.Caller)
	}
	if l.Caller != "" && len(list) == 0 && !l.json() {
		fmt.Fprintf(c.out, "no grants of the caller %s\n", clean(l.Caller))
		return nil
	}
	return c.grants(l.outputFlags, list)
}

// grantsOf reads the grants of a caller, or all.
func (p *peer) grantsOf(ctx context.Context, caller string) (list []*cedarpostv1.Grant, err error) {
	req := &cedarpostv1.ListGrantsRequest{Caller: caller, PageSize: 1000}
	for {
		res, err := call(ctx, p, p.access().ListGrants, req)
		if err != nil {
			return nil, err
		}
		list = append(list, res.GetGrants()...)
		if req.PageToken = res.GetNextPageToken(); req.PageToken == "" {
			return list, nil
		}
	}
}

// grants prints grants.
func (c *console) grants(o outputFlags, list []*cedarpostv1.Grant) error {
	rows := [][]string{{"CALLER", "ROLE", "BUNDLE", "ONLY", "RATE", "ENDS", "BY"}}
	for _, g := range list {
		if o.json() {
			if err := c.message(g); err != nil {
				return err
			}
			continue
		}
		only := short(append(g.GetActions(), g.GetEntityTypes()...), "")
		rows = append(rows, []string{g.GetCaller(), g.GetRole(), g.GetBundle(), only, rateText(g), ends(g.GetExpiresAt(), hasEnded(g.GetExpiresAt())), g.GetGrantedBy()})
	}
	switch {
	case o.json():
	case len(list) == 0:
		fmt.Fprintln(c.out, "no grants")
	default:
		c.table(rows)
	}
	return nil
}

// rateText returns the rate of a grant, or "" if it has none.
func rateText(g *cedarpostv1.Grant) string {
	if g.GetChecksPerSecond() == 0 {
		return ""
	}
	return fmt.Sprintf("%d/s", g.GetChecksPerSecond())
}

// hasEnded reports whether an end is past, by the clock of this machine.
func hasEnded(t *timestamppb.Timestamp) bool { return t != nil && !t.AsTime().After(time.Now()) }

// extent says what a grant is for, its rate and its end, also where it has none.
func extent(g *cedarpostv1.Grant) string {
	text := ""
	switch only := short(append(g.GetActions(), g.GetEntityTypes()...), ""); {
	case only != "":
		text = "only " + only + ", "
	case g.GetRole() == access.Enforcer:
		text = "all actions, "
	case g.GetRole() == access.DataWriter:
		text = "all entity types, "
	}
	if rate := rateText(g); rate != "" {
		text += rate + ", "
	} else if g.GetRole() == access.Enforcer {
		text += "no rate of its own, "
	}
	if g.GetExpiresAt() == nil {
		return text + "no end"
	}
	return text + "until " + ends(g.GetExpiresAt(), hasEnded(g.GetExpiresAt()))
}

// grantArgs identify a grant.
type grantArgs struct {
	Caller string `arg:"" help:"The caller: the name of an API key's caller, or the name of another kind as cedarpost whoami prints it."`
	Role   string `arg:"" help:"enforcer, data-writer, policy-author, policy-approver, policy-publisher, auditor, operator or break-glass."`
	Bundle string `required:"" help:"A bundle, or '*' for all bundles and the service itself." placeholder:"BUNDLE"`
}

type putGrantCmd struct {
	grantArgs
	Actions []uid    `name:"action" sep:"none" help:"Only for this action, like Shop::Action::ViewOrder or 'Shop::Action::\"ViewOrder\"'. For the role enforcer. Can be given several times." placeholder:"ACTION"`
	Types   []string `name:"entity-type" help:"Only for entities of this type, like Shop::Order. For the role data-writer. Can be given several times." placeholder:"TYPE"`
	Rate    *int32   `help:"Checks that the caller may ask each server in a second, in place of --rate-limit of the server. For the role enforcer; the largest of a caller's grants counts." placeholder:"N"`
	expiryFlag
	outputFlags
	adminFlags
}

// Help is the long help of grants put.
func (*putGrantCmd) Help() string {
	return `It replaces the grant of the same caller, role and bundle, with its narrowing, its rate and its end, and prints both: what is not given again is dropped. Every server applies it within a second. A change of the bundles guardrails and admin-local needs a grant that names them.`
}

// Validate refuses a rate that would mean no rate.
func (g *putGrantCmd) Validate() error {
	if g.Rate != nil && *g.Rate < 1 {
		return errors.New("--rate must be at least 1; leave it out for no rate of its own")
	}
	return nil
}

// Run stores the grant.
func (g *putGrantCmd) Run(ctx context.Context, c *console) error {
	admin, err := g.dial()
	if err != nil {
		return err
	}
	grant := &cedarpostv1.Grant{
		Caller: g.Caller, Role: g.Role, Bundle: g.Bundle, Actions: actionTexts(g.Actions), EntityTypes: g.Types, ExpiresAt: g.Expires.timestamp(),
	}
	if g.Rate != nil {
		grant.ChecksPerSecond = *g.Rate
	}
	res, err := call(ctx, admin, admin.access().PutGrant, &cedarpostv1.PutGrantRequest{Grant: grant})
	if err != nil {
		return err
	}
	if !g.json() {
		c.warnings(res.GetWarnings())
	}
	switch {
	case g.json():
		return c.message(res)
	case !res.GetChanged():
		fmt.Fprintf(c.out, "nothing changed: %s has the role %s for %s: %s\n", clean(g.Caller), clean(g.Role), clean(g.Bundle), clean(extent(grant)))
		return nil
	}
	fmt.Fprintf(c.out, "%s has the role %s for %s: %s; since revision %d\n", clean(g.Caller), clean(g.Role), clean(g.Bundle), clean(extent(grant)), res.GetRevision().GetNumber())
	if old := res.GetReplaced(); old != nil {
		fmt.Fprintf(c.out, "it replaces: %s\n", clean(extent(old)))
	}
	return nil
}

// actionTexts returns actions as Cedar text.
func actionTexts(list []uid) []string {
	texts := make([]string, len(list))
	for i, a := range list {
		texts[i] = uidText(a.EntityUid)
	}
	return texts
}

// warnings prints warnings of the server.
func (c *console) warnings(list []string) {
	for _, text := range list {
		fmt.Fprintf(c.err, "%s: %s\n", c.paint(yellow, "warning"), clean(text))
	}
}

type deleteGrantCmd struct {
	grantArgs
	outputFlags
	adminFlags
}

// Run deletes the grant.
func (g *deleteGrantCmd) Run(ctx context.Context, c *console) error {
	admin, err := g.dial()
	if err != nil {
		return err
	}
	return g.delete(ctx, c, admin)
}

func (g *deleteGrantCmd) delete(ctx context.Context, c *console, admin *peer) error {
	res, err := call(ctx, admin, admin.access().DeleteGrant, &cedarpostv1.DeleteGrantRequest{Caller: g.Caller, Role: g.Role, Bundle: g.Bundle})
	if err != nil {
		return err
	}
	if g.json() {
		return c.message(res)
	}
	fmt.Fprintf(c.out, "%s has the role %s for %s no more, since revision %d\n", clean(g.Caller), clean(g.Role), clean(g.Bundle), res.GetRevision().GetNumber())
	return nil
}

type whoamiCmd struct {
	outputFlags
	adminFlags
}

// Run prints who calls, and what it may do.
func (w *whoamiCmd) Run(ctx context.Context, c *console) error {
	admin, err := w.dial()
	if err != nil {
		return err
	}
	res, err := call(ctx, admin, admin.access().WhoAmI, &cedarpostv1.WhoAmIRequest{})
	if err != nil {
		return err
	}
	if w.json() {
		return c.message(res)
	}
	fmt.Fprintf(c.out, "%s\n", clean(res.GetCaller()))
	c.pair("by", strings.TrimSpace(strings.ReplaceAll(res.GetKind(), "_", " ")+" "+res.GetKeyId()))
	c.pair("ends", dateTime(res.GetExpiresAt(), ""))
	for _, g := range res.GetGrants() {
		text := g.GetRole() + " for " + g.GetBundle()
		if only := short(append(g.GetActions(), g.GetEntityTypes()...), ""); only != "" {
			text += ", only " + only
		}
		if rate := rateText(g); rate != "" {
			text += ", " + rate
		}
		if g.GetExpiresAt() != nil {
			text += ", until " + dateTime(g.GetExpiresAt(), "")
		}
		c.pair("role", text)
	}
	for _, p := range res.GetPermitted() {
		c.pair("may, for "+p.GetBundle(), strings.Join(p.GetActions(), ", "))
	}
	return nil
}
