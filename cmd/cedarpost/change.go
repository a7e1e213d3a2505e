package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/cedarpost/cedarpost/bundle"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

type changeCmd struct {
	Create  createChangeCmd  `cmd:"" help:"Propose a bundle folder as the next version."`
	List    listChangesCmd   `cmd:"" help:"List changes."`
	Show    showChangeCmd    `cmd:"" help:"Show a change, and what keeps it from being published."`
	Check   checkChangeCmd   `cmd:"" help:"Check the bundle of a change and run its tests, on the server."`
	Edit    editChangeCmd    `cmd:"" help:"Edit a change."`
	Shadow  shadowChangeCmd  `cmd:"" help:"Evaluate a change beside the live bundle for some time."`
	Approve approveChangeCmd `cmd:"" help:"Agree with a change."`
	Decline declineChangeCmd `cmd:"" help:"Disagree with a change: it is not published before its next edit."`
	Publish publishChangeCmd `cmd:"" help:"Publish a change."`
	Discard discardChangeCmd `cmd:"" help:"End a change that is not to be published."`
}

// editBytes is how many bytes of files are sent in one message, which may have 4 MiB.
const editBytes = 3 << 20

// bundleFolder is a bundle folder whose files are the new state of a bundle.
type bundleFolder struct {
	dir, name string
	json      bool // print findings as JSON, too
}

// edits returns the edits that make the folder of a version, and that version: 0 if there is none. live
// reads it.
func (f bundleFolder) edits(c *console, admin *peer, live func(name string) (int64, []bundle.File, error)) (name string, version int64, edits []bundle.Edit, err error) {
	b, err := readBundle(f.dir, f.name)
	if err != nil {
		return "", 0, nil, c.refusedFolder(f.dir, err, f.json)
	}
	version, files, err := live(b.Name)
	if err != nil {
		return "", 0, nil, admin.explain(err)
	}
	return b.Name, version, bundle.Edits(files, b.Files), nil
}

// liveFiles returns the live version of a bundle and its files; 0 if the bundle is not published.
func liveFiles(ctx context.Context, admin *peer) func(name string) (int64, []bundle.File, error) {
	return func(name string) (int64, []bundle.File, error) {
		about, files, err := liveBundle(ctx, admin, name)
		if connect.CodeOf(err) == connect.CodeNotFound {
			err = nil
		}
		return about.GetVersion(), files, err
	}
}

// messages cuts edits into the parts of several calls.
func messages(edits []bundle.Edit) (parts [][]*cedarpostv1.FileEdit) {
	parts = [][]*cedarpostv1.FileEdit{nil}
	size := 0
	add := func(e *cedarpostv1.FileEdit, n int) {
		if n += len(e.GetPath()) + 16; size > 0 && size+n > editBytes {
			parts, size = append(parts, nil), 0
		}
		size += n
		parts[len(parts)-1] = append(parts[len(parts)-1], e)
	}
	for _, e := range edits {
		if e.Removed {
			add(&cedarpostv1.FileEdit{Path: e.Path, Edit: &cedarpostv1.FileEdit_Removed{Removed: true}}, 0)
			continue
		}
		first := e.Content[:min(len(e.Content), editBytes)]
		add(&cedarpostv1.FileEdit{Path: e.Path, Edit: &cedarpostv1.FileEdit_Content{Content: first}}, len(first))
		for rest := e.Content[len(first):]; len(rest) > 0; {
			more := rest[:min(len(rest), editBytes)]
			add(&cedarpostv1.FileEdit{Path: e.Path, Edit: &cedarpostv1.FileEdit_Append{Append: more}}, len(more))
			rest = rest[len(more):]
		}
	}
	return parts
}

// send sends the parts of edits after the first one to a change.
func send(ctx context.Context, admin *peer, change *cedarpostv1.BundleChange, parts [][]*cedarpostv1.FileEdit) (*cedarpostv1.BundleChange, error) {
	for i, part := range parts {
		res, err := admin.policies().UpdateChange(ctx, &cedarpostv1.UpdateChangeRequest{Id: change.GetId(), IfDigest: change.GetDigest(), Edits: part})
		if err != nil {
			return nil, fmt.Errorf("the change %s has only some of the edits, %d of %d parts of the rest are missing; discard it: %w", change.GetId(), len(parts)-i, len(parts), admin.explain(err))
		}
		change = res.GetChange()
	}
	return change, nil
}

type createChangeCmd struct {
	outputFlags
	Dir    string `arg:"" help:"Bundle folder." type:"path"`
	Title  string `required:"" help:"What the change is for, in one line." placeholder:"TEXT"`
	Reason string `help:"Why." placeholder:"TEXT"`
	Name   string `help:"Name of the bundle, if bundle.yaml does not give it (default: the name of the folder)." placeholder:"NAME"`
	adminFlags
}

// Help is the long help of change create.
func (*createChangeCmd) Help() string {
	return `Makes a change: the edits between the live version of the bundle and the folder. Nothing is published. "cedarpost change publish" publishes it, as soon as it has the approvals that bundle.yaml asks for, that of the live version or that of the folder, whichever is more.`
}

// Run makes the change.
func (n *createChangeCmd) Run(ctx context.Context, c *console) error {
	if strings.TrimSpace(n.Title) == "" {
		return misuse("--title must say what the change is for")
	}
	admin, err := n.dial()
	if err != nil {
		return err
	}
	name, base, edits, err := bundleFolder{n.Dir, n.Name, n.json()}.edits(c, admin, liveFiles(ctx, admin))
	if err != nil {
		return err
	}
	if len(edits) == 0 {
		return fmt.Errorf("the folder has the same files as version %d of %s; there is nothing to change", base, name)
	}
	parts := messages(edits)
	res, err := admin.policies().CreateChange(ctx, &cedarpostv1.CreateChangeRequest{Bundle: name, Title: n.Title, Reason: n.Reason, BaseVersion: &base, Edits: parts[0]})
	if err != nil {
		return admin.explain(err)
	}
	change, err := send(ctx, admin, res.GetChange(), parts[1:])
	if err != nil {
		return err
	}
	return c.printChange(change, n.json())
}

func (c *console) printChange(change *cedarpostv1.BundleChange, asJSON bool) error {
	if asJSON {
		return c.message(change)
	}
	fmt.Fprintf(c.out, "%s: %s, %s\n", clean(change.GetId()), strings.ToLower(change.GetState().String()), clean(change.GetTitle()))
	c.pair("base", fmt.Sprintf("version %d", change.GetBaseVersion()))
	if change.GetVersion() > 0 {
		c.pair("published", fmt.Sprintf("version %d", change.GetVersion()))
	}
	c.pair("authors", strings.Join(change.GetAuthors(), ", "))
	c.pair("reason", change.GetReason())
	c.printVerdicts("approved", change.GetApprovals())
	c.printVerdicts("declined", change.GetDeclines())
	for _, r := range change.GetReports() {
		if r.GetDigest() == change.GetDigest() {
			c.pair("impact", fmt.Sprintf("%s, %s by %s: %s, %d unknown", r.GetId(), localTime(r.GetAt()), r.GetCaller(), count(r.GetDecisions(), "decision", "decisions"), r.GetUnknown()))
		}
	}
	if s := change.GetShadow(); s != nil && s.GetDigest() == change.GetDigest() {
		c.pair("shadow", fmt.Sprintf("%s, until %s by %s", s.GetReport(), localTime(s.GetUntil()), s.GetCaller()))
	}
	c.pair("digest", change.GetDigest())
	return nil
}

func (c *console) printVerdicts(label string, list []*cedarpostv1.Verdict) {
	for _, v := range list {
		text := v.GetCaller() + ", " + localTime(v.GetAt())
		if v.GetExpired() {
			text += ", expired " + localTime(v.GetExpiresAt())
		}
		if v.GetReport() != "" {
			text += ", has seen " + v.GetReport()
		}
		if v.GetReason() != "" {
			text += ": " + v.GetReason()
		}
		c.pair(label, text)
	}
}

type listChangesCmd struct {
	outputFlags
	Bundle string `help:"Only changes of this bundle." placeholder:"NAME"`
	State  string `help:"Only changes in this state: open, published, discarded, or all (default ${default})." type:"word" enum:"open,published,discarded,all" default:"open"`
	Limit  int    `help:"At most so many (default ${default}; 0: all)." default:"100" placeholder:"N"`
	afterFlag
	adminFlags
}

// Run lists changes. As JSON, each change is a line.
func (l *listChangesCmd) Run(ctx context.Context, c *console) error {
	if l.Limit < 0 {
		return misuse("--limit must not be negative")
	}
	admin, err := l.dial()
	if err != nil {
		return err
	}
	rows := [][]string{{"CHANGE", "STATE", "BASE", "CHANGED", "AUTHORS", "APPROVED BY", "TITLE"}}
	req := &cedarpostv1.ListChangesRequest{Bundle: l.Bundle, State: cedarpostv1.BundleChange_State(cedarpostv1.BundleChange_State_value[strings.ToUpper(l.State)])}
	req.PageToken = l.After
	listed := 0
	for left := l.Limit; ; {
		if l.Limit > 0 {
			req.PageSize = int32(min(left, 1000))
		}
		res, err := call(ctx, admin, admin.policies().ListChanges, req)
		if err != nil {
			return err
		}
		for _, one := range res.GetChanges() {
			if l.json() {
				if err := c.message(one); err != nil {
					return err
				}
				continue
			}
			state := strings.ToLower(one.GetState().String())
			if len(one.GetDeclines()) > 0 {
				state += ", declined"
			}
			rows = append(rows, []string{one.GetId(), state, fmt.Sprint(one.GetBaseVersion()), localTime(one.GetUpdatedAt()), strings.Join(one.GetAuthors(), ", "), approvedBy(one), one.GetTitle()})
		}
		listed += len(res.GetChanges())
		left -= len(res.GetChanges())
		if req.PageToken = res.GetNextPageToken(); req.PageToken == "" || l.Limit > 0 && left <= 0 {
			break
		}
	}
	if l.Bundle != "" && listed == 0 {
		res, err := call(ctx, admin, admin.policies().ListChanges, &cedarpostv1.ListChangesRequest{Bundle: l.Bundle, PageSize: 1})
		if err == nil && len(res.GetChanges()) == 0 {
			err = admin.knows(ctx, l.Bundle)
		}
		if err != nil {
			return err
		}
	}
	if !l.json() {
		c.table(rows)
	}
	c.more(req.GetPageToken())
	return nil
}

// approvedBy lists who approved a change, and how many must.
func approvedBy(one *cedarpostv1.BundleChange) string {
	counts := slices.DeleteFunc(slices.Clone(one.GetApprovals()), (*cedarpostv1.Verdict).GetExpired)
	names := callersOf(counts)
	if n := one.GetApprovalsNeeded(); n > 0 {
		names = strings.TrimSpace(fmt.Sprintf("%d of %d %s", len(counts), n, names))
	}
	return names
}

// changeArgs name a change.
type changeArgs struct {
	outputFlags
	ID string `arg:"" name:"id" help:"Id of the change, such as shop-12."`
	adminFlags
}

type showChangeCmd struct{ changeArgs }

// Run shows the change. As JSON, it is one object.
func (s *showChangeCmd) Run(ctx context.Context, c *console) error {
	admin, err := s.dial()
	if err != nil {
		return err
	}
	res, err := call(ctx, admin, admin.policies().GetChange, &cedarpostv1.GetChangeRequest{Id: s.ID})
	if err != nil || s.json() {
		return orMessage(c, res, err)
	}
	if err := c.printChange(res.GetChange(), false); err != nil {
		return err
	}
	c.printApplied(res.GetServers())
	if n := res.GetApprovalsNeeded(); n > 0 {
		c.pair("needs", count(n, "approval", "approvals"))
	}
	for _, b := range res.GetBlockedBy() {
		c.pair("blocked", b)
	}
	return c.printDiff(res.GetFiles(), false)
}

type checkChangeCmd struct{ changeArgs }

// Help is the long help of change check.
func (*checkChangeCmd) Help() string {
	return `Checks the bundle of a change as a publish would: schema, policies, catalogue, tests, other bundles, stored entities.

Exits with 3 if the bundle does not compile or validate, would break another bundle, or does not fit the stored entities, and with 4 if only tests failed.`
}

// Run checks the change. As JSON, the result is one object.
func (k *checkChangeCmd) Run(ctx context.Context, c *console) error {
	admin, err := k.dial()
	if err != nil {
		return err
	}
	res, err := admin.policies().CheckChange(ctx, &cedarpostv1.CheckChangeRequest{Id: k.ID})
	if err != nil {
		return admin.explain(err)
	}
	found := findingsFromProto(res.GetFindings())
	if k.json() {
		err = c.message(res)
	} else {
		c.printFindings(c.out, k.ID, found)
		c.printMeaning(res)
	}
	if err == nil && !res.GetOk() {
		err = exitWith(max(severe(found), codeInvalid))
	}
	return err
}

func (c *console) printMeaning(res *cedarpostv1.CheckChangeResponse) {
	outcome := c.paint(green, "valid")
	if !res.GetOk() {
		outcome = c.paint(red, "not valid")
		if severe(findingsFromProto(res.GetFindings())) == codeTests {
			outcome = c.paint(red, "valid, but tests fail")
		}
	}
	fmt.Fprintf(c.out, "%s: %s\n", clean(res.GetChange().GetId()), outcome)
	failed := 0
	for _, t := range res.GetTests() {
		if len(t.GetFailures()) > 0 {
			failed++
		}
	}
	c.pair("tests", fmt.Sprintf("%d, %d failed", len(res.GetTests()), failed))
	for _, p := range res.GetPolicies() {
		text := p.GetId() + " (" + p.GetEffect() + ")"
		switch {
		case len(p.GetParts()) > 0:
			text += ": " + strings.Join(p.GetParts(), ", ")
		case p.GetKind() == cedarpostv1.PolicyDiff_CHANGED:
			text += ": only its place or its form"
		}
		c.pair(strings.ToLower(p.GetKind().String()), text)
	}
	for _, f := range res.GetFieldsAdded() {
		c.pair("field added", f)
	}
	for _, f := range res.GetFieldsRemoved() {
		c.pair("field gone", f)
	}
	for _, b := range res.GetBlockedBy() {
		c.pair("blocked", b)
	}
}

// seen returns the digest of a change that the caller has seen: the one given, or the one of now, which is
// printed.
func seen(ctx context.Context, admin *peer, id, digest string) (string, error) {
	if digest != "" {
		return digest, nil
	}
	res, err := call(ctx, admin, admin.policies().GetChange, &cedarpostv1.GetChangeRequest{Id: id})
	return res.GetChange().GetDigest(), err
}

// digestFlag is the state of a change that a call is about.
type digestFlag struct {
	Digest string `help:"The digest of the change that you have seen (default: the one that it has now). If it was edited since, nothing happens." placeholder:"SHA256"`
}

type shadowChangeCmd struct {
	changeArgs
	digestFlag
	For span `help:"For how long, at most 31d (default ${default})." default:"24h" placeholder:"DURATION"`
	End bool `help:"End it now."`
}

// Help is the long help of change shadow.
func (*shadowChangeCmd) Help() string {
	return `New questions are decided by the change, too, some seconds after they were answered, and the differences are counted. Answers stay as they are. "cedarpost impact --report ID" shows the report, whose id is printed. It ends when the change is edited or published, or another version is published.`
}

// Run begins or ends a shadow.
func (s *shadowChangeCmd) Run(ctx context.Context, c *console) error {
	admin, err := s.dial()
	if err != nil {
		return err
	}
	digest, err := seen(ctx, admin, s.ID, s.Digest)
	if err != nil {
		return err
	}
	req := &cedarpostv1.ShadowChangeRequest{Id: s.ID, Digest: digest}
	if !s.End {
		if s.For <= 0 {
			return misuse("--for must be more than 0; --end ends a shadow")
		}
		req.Duration = durationpb.New(time.Duration(s.For))
	}
	res, err := call(ctx, admin, admin.policies().ShadowChange, req)
	if err != nil {
		return err
	}
	return c.printChange(res.GetChange(), s.json())
}

type approveChangeCmd struct {
	changeArgs
	digestFlag
	Report string `help:"The report of the impact that you have seen: \"change show\" prints its id. A bundle with impact: required counts only approvals that name one." placeholder:"ID"`
	Reason string `help:"What you say about it." placeholder:"TEXT"`
}

// Help is the long help of change approve.
func (*approveChangeCmd) Help() string {
	return `Says that you have seen the change, and agree. An author of the change cannot approve it. What still keeps the change from being published is printed, also that an approval does not count because it names no report. In a script, give --digest: it is the one that "change show" printed.`
}

// Run approves.
func (a *approveChangeCmd) Run(ctx context.Context, c *console) error {
	admin, err := a.dial()
	if err != nil {
		return err
	}
	digest, err := seen(ctx, admin, a.ID, a.Digest)
	if err != nil {
		return err
	}
	res, err := call(ctx, admin, admin.policies().ApproveChange, &cedarpostv1.ApproveChangeRequest{Id: a.ID, Digest: digest, Reason: a.Reason, Report: a.Report})
	if err != nil {
		return err
	}
	if err := c.printChange(res.GetChange(), a.json()); err != nil || a.json() {
		return err
	}
	// An approval can be without effect, for example if the bundle requires a report and it names none.
	now, err := call(ctx, admin, admin.policies().GetChange, &cedarpostv1.GetChangeRequest{Id: a.ID})
	for _, b := range now.GetBlockedBy() {
		c.pair("blocked", b)
	}
	return err
}

type declineChangeCmd struct {
	changeArgs
	digestFlag
	Reason string `help:"Why." placeholder:"TEXT"`
}

// Run declines.
func (d *declineChangeCmd) Run(ctx context.Context, c *console) error {
	admin, err := d.dial()
	if err != nil {
		return err
	}
	digest, err := seen(ctx, admin, d.ID, d.Digest)
	if err != nil {
		return err
	}
	res, err := call(ctx, admin, admin.policies().DeclineChange, &cedarpostv1.DeclineChangeRequest{Id: d.ID, Digest: digest, Reason: d.Reason})
	if err != nil {
		return err
	}
	return c.printChange(res.GetChange(), d.json())
}

type publishChangeCmd struct {
	changeArgs
	digestFlag
	breakGlassFlag
	AllowBreaking bool `help:"Publish also if callers who ask as before would break."`
	waitFlags
}

// Help is the long help of change publish.
func (*publishChangeCmd) Help() string {
	return `Publishes the bundle of a change as one revision. If a check fails, nothing is published, and the findings are on stderr. Exit codes as for apply.`
}

// Run publishes.
func (p *publishChangeCmd) Run(ctx context.Context, c *console) error {
	admin, err := p.dial()
	if err != nil {
		return err
	}
	if err := p.check(); err != nil {
		return err
	}
	digest, err := seen(ctx, admin, p.ID, p.Digest)
	if err != nil {
		return err
	}
	res, err := admin.policies().PublishChange(ctx, &cedarpostv1.PublishChangeRequest{Id: p.ID, Digest: digest, BreakGlass: p.BreakGlass, AllowBreaking: p.AllowBreaking})
	if err != nil {
		return c.refusedPublish(admin, err, p.ID, p.json())
	}
	wait := func() error {
		return p.forServers(ctx, c, admin, res.GetBundle().GetName(), res.GetBundle().GetVersion())
	}
	if p.json() {
		if err := c.message(res); err != nil {
			return err
		}
		return wait()
	}
	c.printFindings(c.out, p.ID, findingsFromProto(res.GetWarnings()))
	fmt.Fprintf(c.out, "%s: %s\n", clean(res.GetBundle().GetName()), c.paint(green, "published"))
	c.pair("version", fmt.Sprint(res.GetBundle().GetVersion()))
	c.pair("break-glass", res.GetBundle().GetBreakGlass())
	c.pair("policies", fmt.Sprint(res.GetBundle().GetPolicies()))
	c.pair("digest", res.GetBundle().GetDigest())
	c.printRevision(res.GetRevision())
	return wait()
}

type discardChangeCmd struct {
	changeArgs
	Reason string `help:"Why, for the log." placeholder:"TEXT"`
}

// Run discards.
func (d *discardChangeCmd) Run(ctx context.Context, c *console) error {
	admin, err := d.dial()
	if err != nil {
		return err
	}
	res, err := call(ctx, admin, admin.policies().DiscardChange, &cedarpostv1.DiscardChangeRequest{Id: d.ID, Reason: d.Reason})
	if err != nil {
		return err
	}
	return c.printChange(res.GetChange(), d.json())
}
