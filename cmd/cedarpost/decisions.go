package main

import (
	"os"
	"regexp"
	"slices"
	"strings"

	"google.golang.org/protobuf/proto"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

type decisionsCmd struct {
	List   listDecisionsCmd   `cmd:"" default:"withargs" help:"List recorded decisions, newest first."`
	Get    getDecisionCmd     `cmd:"" help:"Print one record in full."`
	Replay replayDecisionsCmd `cmd:"" help:"Decide again with the policies and data of that time, and compare."`
	Count  countDecisionsCmd  `cmd:"" help:"Count decisions by principal, action, policy or outcome."`
	Export exportDecisionsCmd `cmd:"" help:"Export the log, decisions and events, in the order in which it was recorded."`
}

// Help is the long help of decisions.
func (*decisionsCmd) Help() string {
	return `"cedarpost decisions" alone means "cedarpost decisions list", and takes its flags: see cedarpost decisions list --help.`
}

// filterFlags select decisions.
type filterFlags struct {
	Principal   *uid   `help:"Only this principal: Shop::User::bob." placeholder:"UID"`
	Action      *uid   `help:"Only this action." placeholder:"UID"`
	Resource    *uid   `help:"Only this resource." placeholder:"UID"`
	Decision    string `help:"Only allow, or only deny." type:"word" enum:",allow,deny" default:"" placeholder:"WORD"`
	DeniedAt    string `help:"Only denials at function, object or field." type:"word" enum:",function,object,field" default:"" placeholder:"CHECK"`
	Policy      string `help:"Only decisions that this policy determined." placeholder:"BUNDLE/ID"`
	Caller      string `help:"Only this caller of Cedarpost." placeholder:"NAME"`
	RequestID   string `name:"request-id" help:"Only this request id." placeholder:"ID"`
	TraceID     string `name:"trace-id" help:"Only this W3C trace id." placeholder:"ID"`
	Revision    int64  `help:"Only decisions at this revision." placeholder:"N"`
	Field       string `help:"Only decisions about this field, permitted or denied: customer.email." placeholder:"PATH"`
	Permitted   string `name:"permitted-field" help:"Only decisions that permitted this field: who saw it." placeholder:"PATH"`
	Denied      string `name:"denied-field" help:"Only decisions that denied this field, of allowed actions too." placeholder:"PATH"`
	MaskedValue string `name:"masked-value" help:"Only decisions whose record has this value in masked form, as JSON or @FILE. Other users of this machine can read the arguments of a process, so rather use a file." placeholder:"JSON"`
	Since       moment `help:"Not before this time: 2006-01-02T15:04:05Z, 2006-01-02, 15:04 today, or 90m, 12h, 7d, 2w ago." placeholder:"TIME"`
	Until       moment `help:"Before this time." placeholder:"TIME"`
}

// filterHelp is the part of the long help that commands with these filters share.
const filterHelp = `Only decisions that match all given filters are selected. Principal, resource, denials (--decision deny, --denied-at) and request id have an index. Without one of them, the other filters need --since, and --until at most a day later.`

// request returns the filters as a message of the API.
func (f *filterFlags) request() (*cedarpostv1.QueryDecisionsRequest, error) {
	req := &cedarpostv1.QueryDecisionsRequest{
		From: f.Since.timestamp(), To: f.Until.timestamp(), Caller: f.Caller, RequestId: f.RequestID,
		TraceId: f.TraceID, Revision: f.Revision, Field: f.Field, PermittedField: f.Permitted, DeniedField: f.Denied,
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

// needsTime matches the server's error about a filter without an index and without a time.
var needsTime = regexp.MustCompile(`^invalid_argument: ([a-z_]+|a caller with a right to some bundles only): has to read all decisions of a time: .* at most (\d+) hours later`)

// inFlags turns the server's error about a filter that needs a time, as call explains it, into the
// words of the command line. Other errors it returns as they are.
func inFlags(err error) error {
	m := needsTime.FindStringSubmatch(err.Error())
	if m == nil {
		return err
	}
	what := "--" + strings.ReplaceAll(m[1], "_", "-")
	switch {
	case m[1] == "filter":
		what = "this command"
	case strings.Contains(m[1], " "): // what the caller may read is a filter, too
		what = m[1]
	}
	return misuse("%s has to read all decisions of a time: give --since, and --until (default: now) at most %s hours later; or one of --principal, --resource, --request-id, --denied-at and --decision deny, which have an index", what, m[2])
}

// matches reports whether a query with these filters would find a decision. It ignores a masked
// value, because only the server can compute its hash.
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
		{req.PermittedField != "", slices.Contains(d.GetFields().GetPermitted(), req.GetPermittedField())},
		{req.DeniedField != "", slices.Contains(d.GetFields().GetDenied(), req.GetDeniedField())},
	} {
		if f.given && !f.holds {
			return false
		}
	}
	return true
}
