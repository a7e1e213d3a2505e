package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

type impactCmd struct {
	Output    string  `short:"o" help:"text for people, json for programs, or markdown for a comment on a merge request (default ${default})." env:"CEDARPOST_OUTPUT" enum:"text,json,markdown" default:"text" placeholder:"FORMAT"`
	Dir       string  `arg:"" optional:"" help:"Bundle folder, compared with the live version." type:"path"`
	Change    string  `help:"The id of a change, in place of a folder. Its report is kept for those who approve it." placeholder:"ID"`
	Report    string  `help:"The id of a report to show again, or to go on with." placeholder:"ID"`
	Name      string  `help:"Name of the bundle, if bundle.yaml does not give it (default: the name of the folder)." placeholder:"NAME"`
	Since     moment  `help:"Only decisions from this time on: RFC 3339, or a duration like 90m, 12h or 7d (default: the last 24 hours)." placeholder:"TIME"`
	Until     moment  `help:"Only decisions before this time." placeholder:"TIME"`
	Principal uid     `help:"Only decisions about this principal." placeholder:"UID"`
	Action    uid     `help:"Only decisions about this action." placeholder:"UID"`
	Resource  uid     `help:"Only decisions about this resource." placeholder:"UID"`
	Caller    string  `help:"Only decisions that this caller asked for." placeholder:"NAME"`
	Sample    float64 `help:"Compare only this share of the decisions, drawn at random: 0.1 is a tenth (default: all)." placeholder:"SHARE"`
	Recorded  bool    `name:"recorded-data" help:"Decide with entities as they were at each decision, in place of those of now. That is slower."`
	Who       []uid   `help:"An action for which stored principals and resources are tried, too: who gains, who loses. Can be repeated." placeholder:"ACTION"`
	Context   string  `help:"The context of the questions of --who, as JSON, or @FILE." placeholder:"JSON"`
	Budget    span    `help:"How long it may take, at most 1h (default ${default}). Then --report goes on." default:"5m" placeholder:"DURATION"`
	NoSamples bool    `help:"Leave out the samples and the principals of --who: not everybody who reads a comment may know users and objects."`
	ExitCode  bool    `help:"Exit with 1 if any decision differs or anybody of --who gains or loses, if not all decisions asked for were compared, or none was, and if nothing of --who was tried."`
	adminFlags
}

// Help is the long help of impact.
func (*impactCmd) Help() string {
	return `Decides recorded questions again, by the live policies and by the proposed ones, on the same entities, and says how the outcomes differ: what was allowed and would be denied, what was denied and would be allowed, which fields are gained and lost, and which errors are new. Nothing is published, and no decision is recorded.

A decision is unknown if a value that a policy reads is masked in its record, or if the live schema does not understand its question any more.

With -o json, prints the ImpactReport of the API, with the counts allowToDeny, denyToAllow, fieldsGained, fieldsLost, newErrors, otherChanges, unchanged and unknown, and with samples.

Exits with 3 if the bundle does not compile or validate, or would break another bundle: then -o json prints {"findings": […]}. With --exit-code, exits with 1 as that flag says.`
}

// Run makes the report.
func (n *impactCmd) Run(ctx context.Context, c *console) error {
	given := 0
	for _, s := range []string{n.Dir, n.Change, n.Report} {
		if s != "" {
			given++
		}
	}
	if given != 1 {
		return misuse("give one of a bundle folder, --change and --report")
	}
	if n.Sample < 0 || n.Sample > 1 {
		return misuse("--sample must be a share between 0 and 1, such as 0.1")
	}
	if b := time.Duration(n.Budget); b <= 0 || b > time.Hour {
		return misuse("--budget must be more than 0 and at most 1h")
	}
	admin, err := n.dial()
	if err != nil {
		return err
	}
	req := &cedarpostv1.AnalyzeChangeRequest{
		From: n.Since.timestamp(), To: n.Until.timestamp(), Principal: n.Principal.EntityUid, Action: n.Action.EntityUid, Resource: n.Resource.EntityUid,
		Caller: n.Caller, Sample: n.Sample, Budget: durationpb.New(time.Duration(n.Budget)),
	}
	if n.Recorded {
		req.Data = cedarpostv1.ImpactData_IMPACT_DATA_RECORDED
	}
	for _, action := range n.Who {
		req.Who = append(req.Who, action.EntityUid)
	}
	if n.Context != "" {
		if req.WhoContext, err = parseContext(n.Context); err != nil {
			return misuse("--context: %w", err)
		}
	}
	switch {
	case n.Report != "":
		res, err := call(ctx, admin, admin.policies().GetImpactReport, &cedarpostv1.GetImpactReportRequest{Id: n.Report})
		if err != nil {
			return err
		}
		if res.GetReport().GetComplete() || res.GetReport().GetShadow() {
			return n.print(c, res.GetReport())
		}
		req.Candidate = &cedarpostv1.AnalyzeChangeRequest_Report{Report: n.Report}
	case n.Change != "":
		req.Candidate = &cedarpostv1.AnalyzeChangeRequest_Change{Change: n.Change}
	default:
		name, base, edits, err := bundleFolder{n.Dir, n.Name, n.Output == "json"}.edits(c, admin, liveFiles(ctx, admin))
		if err != nil {
			return err
		}
		parts := messages(edits)
		if len(parts) > 1 {
			return fmt.Errorf("the edits are larger than one message may be; make a change of them (cedarpost change create) and give --change")
		}
		req.Candidate = &cedarpostv1.AnalyzeChangeRequest_Edits{Edits: &cedarpostv1.AnalyzeChangeRequest_ProposedEdits{Bundle: name, BaseVersion: base, Edits: parts[0]}}
	}
	report, err := n.analyze(ctx, c, admin, req)
	if err != nil {
		return err
	}
	return n.print(c, report)
}

// analyze makes the report and shows how far it is.
func (n *impactCmd) analyze(ctx context.Context, c *console, admin *peer, req *cedarpostv1.AnalyzeChangeRequest) (report *cedarpostv1.ImpactReport, err error) {
	stream, err := admin.policies().AnalyzeChange(ctx, req)
	if err != nil {
		return nil, c.refusedPublish(admin, err, relative(n.Dir), n.Output == "json")
	}
	defer func() { _ = stream.Close() }()
	for {
		res, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, c.refusedPublish(admin, err, relative(n.Dir), n.Output == "json")
		}
		report = res.GetReport()
		if c.live {
			fmt.Fprintf(c.err, "\r\x1b[K%d decisions compared, back to %s, %d differ", report.GetDecisions(), localTime(report.GetReached()), differing(report))
		}
	}
	if c.live {
		fmt.Fprint(c.err, "\r\x1b[K")
	}
	if report == nil {
		return nil, errors.New("the server sent no report")
	}
	return report, nil
}

func differing(r *cedarpostv1.ImpactReport) int32 {
	return r.GetDecisions() - r.GetUnchanged() - r.GetUnknown()
}

func (n *impactCmd) print(c *console, r *cedarpostv1.ImpactReport) (err error) {
	if n.NoSamples {
		r.Samples, r.Who = nil, nil
	}
	switch n.Output {
	case "json":
		err = c.message(r)
	case "markdown":
		printImpactMarkdown(c.out, r)
	default:
		c.printImpact(r)
	}
	if err == nil && n.ExitCode && (differing(r) > 0 || r.GetWhoChanged() > 0 || !r.GetComplete() || r.GetUnknown() == r.GetDecisions() && r.GetDecisions() > 0 || len(r.GetWarnings()) > 0) {
		return exitWith(codeFailed)
	}
	return err
}

// impactCount is a line of a report.
type impactCount struct {
	name  string
	count int32
}

func impactCounts(r *cedarpostv1.ImpactReport) []impactCount {
	return []impactCount{
		{"allow to deny", r.GetAllowToDeny()}, {"deny to allow", r.GetDenyToAllow()}, {"fields gained", r.GetFieldsGained()}, {"fields lost", r.GetFieldsLost()},
		{"new errors", r.GetNewErrors()}, {"other changes", r.GetOtherChanges()}, {"unchanged", r.GetUnchanged()}, {"unknown", r.GetUnknown()},
	}
}

// impactTitle says in a line what was compared.
func impactTitle(r *cedarpostv1.ImpactReport) string {
	what := fmt.Sprintf("edits of %s", r.GetBundle())
	if r.GetChange() != "" {
		what = "the change " + r.GetChange()
	}
	against := fmt.Sprintf("version %d", r.GetLiveVersion())
	if r.GetLiveVersion() == 0 {
		against = "no version"
	}
	text := fmt.Sprintf("%s against %s: %s from %s to %s", what, against, count(r.GetDecisions(), "decision", "decisions"), localTime(r.GetFrom()), localTime(r.GetTo()))
	if r.GetSample() < 1 {
		text += fmt.Sprintf(", a share of %g", r.GetSample())
	}
	if r.GetShadow() {
		text += map[bool]string{true: ", in shadow", false: ", in shadow, which goes on"}[r.GetComplete()]
	} else if !r.GetComplete() {
		text += fmt.Sprintf("; stopped at %s", localTime(r.GetReached()))
	}
	return text
}

func (c *console) printImpact(r *cedarpostv1.ImpactReport) {
	fmt.Fprintln(c.out, clean(impactTitle(r)))
	for _, line := range impactCounts(r) {
		text := fmt.Sprintf("%8d", line.count)
		if line.count > 0 && line.name != "unchanged" && line.name != "unknown" {
			text = c.paint(yellow, text)
		}
		fmt.Fprintf(c.out, "  %-14s%s\n", line.name, text)
	}
	for _, u := range r.GetUnknownReasons() {
		fmt.Fprintf(c.out, "  unknown: %d, because %s\n", u.GetDecisions(), clean(u.GetReason()))
	}
	for _, text := range r.GetWarnings() {
		fmt.Fprintf(c.out, "  %s: %s\n", c.paint(yellow, "warning"), clean(text))
	}
	for _, sort := range []struct {
		name   string
		groups []*cedarpostv1.ImpactGroup
	}{{"ACTION", r.GetByAction()}, {"POLICY", r.GetByPolicy()}, {"FIELD", r.GetByField()}, {"CALLER", r.GetByCaller()}} {
		if len(sort.groups) == 0 {
			continue
		}
		fmt.Fprintln(c.out)
		rows := [][]string{{sort.name, "ALLOW TO DENY", "DENY TO ALLOW", "FIELDS GAINED", "FIELDS LOST", "NEW ERRORS"}}
		for _, g := range sort.groups {
			rows = append(rows, []string{g.GetName(), fmt.Sprint(g.GetAllowToDeny()), fmt.Sprint(g.GetDenyToAllow()), fmt.Sprint(g.GetFieldsGained()), fmt.Sprint(g.GetFieldsLost()), fmt.Sprint(g.GetNewErrors())})
		}
		c.table(rows)
	}
	if len(r.GetSamples()) > 0 {
		fmt.Fprintln(c.out)
		rows := [][]string{{"SAMPLE", "DECISION", "PRINCIPAL", "ACTION", "RESOURCE", "WHAT"}}
		for _, s := range r.GetSamples() {
			rows = append(rows, []string{sampleKind(s), s.GetDecisionId(), uidText(s.GetPrincipal()), uidText(s.GetAction()), uidText(s.GetResource()), sampleText(s)})
		}
		c.table(rows)
	}
	c.printWho(r)
	if r.GetHidden() {
		fmt.Fprintln(c.out, "\nsamples and callers are shown to auditors of the bundle only")
	}
	fmt.Fprintln(c.out)
	c.pair("report", r.GetId())
	if !r.GetComplete() && !r.GetShadow() && r.GetChange() != "" {
		fmt.Fprintf(c.out, "  the time was over before all decisions were compared; `cedarpost impact --report %s` goes on\n", clean(r.GetId()))
	}
}

// printWho prints for which stored principals the outcome changes.
func (c *console) printWho(r *cedarpostv1.ImpactReport) {
	if r.GetHidden() || r.GetWhoPairs() == 0 && len(r.GetWhoLeftOut()) == 0 {
		return
	}
	fmt.Fprintf(c.out, "\n%s of stored principals and resources tried: %s with another outcome\n", count(r.GetWhoPairs(), "pair", "pairs"), count(r.GetWhoChanged(), "principal and action", "principals and actions"))
	if len(r.GetWho()) > 0 {
		rows := [][]string{{"PRINCIPAL", "ACTION", "GAINS", "LOSES", "OTHER FIELDS", "RESOURCES", "FIELDS GAINED", "FIELDS LOST"}}
		for _, w := range r.GetWho() {
			rows = append(rows, []string{uidText(w.GetPrincipal()), uidText(w.GetAction()), fmt.Sprint(w.GetGained()), fmt.Sprint(w.GetLost()), fmt.Sprint(w.GetFieldsChanged()),
				uidTexts(slices.Concat(w.GetGainedResources(), w.GetLostResources())), strings.Join(w.GetFieldsGained(), ", "), strings.Join(w.GetFieldsLost(), ", ")})
		}
		c.table(rows)
	}
	for _, text := range r.GetWhoLeftOut() {
		fmt.Fprintf(c.out, "  not tried: %s\n", clean(text))
	}
}

func sampleKind(s *cedarpostv1.ImpactSample) string {
	return strings.ReplaceAll(strings.ToLower(s.GetKind().String()), "_", " ")
}

// sampleText says what differs in a sample, and why.
func sampleText(s *cedarpostv1.ImpactSample) string {
	switch s.GetKind() {
	case cedarpostv1.ImpactSample_FIELDS_GAINED:
		return strings.Join(s.GetGained(), ", ")
	case cedarpostv1.ImpactSample_FIELDS_LOST:
		return strings.Join(s.GetLost(), ", ")
	case cedarpostv1.ImpactSample_NEW_ERRORS:
		return s.GetError()
	}
	none := func(list []string) string {
		if len(list) == 0 {
			return "none"
		}
		return strings.Join(list, ", ")
	}
	return "policies: " + none(s.GetLivePolicies()) + " -> " + none(s.GetCandidatePolicies())
}

// printImpactMarkdown writes a report as a comment on a merge request.
func printImpactMarkdown(w io.Writer, r *cedarpostv1.ImpactReport) {
	cell := func(s string) string {
		return "`" + strings.NewReplacer("`", "'", "|", `\|`).Replace(clean(s)) + "`"
	}
	fmt.Fprintf(w, "### Impact on recorded decisions\n\n%s\n\n| | decisions |\n|---|---:|\n", strings.ReplaceAll(clean(impactTitle(r)), "<", "&lt;"))
	for _, line := range impactCounts(r) {
		fmt.Fprintf(w, "| %s | %d |\n", line.name, line.count)
	}
	for _, u := range r.GetUnknownReasons() {
		fmt.Fprintf(w, "\n%d unknown: %s\n", u.GetDecisions(), clean(u.GetReason()))
	}
	if len(r.GetByPolicy()) > 0 {
		fmt.Fprint(w, "\n| policy | allow to deny | deny to allow | fields gained | fields lost | new errors |\n|---|---:|---:|---:|---:|---:|\n")
		for _, g := range r.GetByPolicy() {
			fmt.Fprintf(w, "| %s | %d | %d | %d | %d | %d |\n", cell(g.GetName()), g.GetAllowToDeny(), g.GetDenyToAllow(), g.GetFieldsGained(), g.GetFieldsLost(), g.GetNewErrors())
		}
	}
	if len(r.GetSamples()) > 0 {
		fmt.Fprint(w, "\n<details><summary>Samples</summary>\n\n| | principal | action | resource | what |\n|---|---|---|---|---|\n")
		for _, s := range r.GetSamples() {
			fmt.Fprintf(w, "| %s | %s | %s | %s | %s |\n", sampleKind(s), cell(uidText(s.GetPrincipal())), cell(uidText(s.GetAction())), cell(uidText(s.GetResource())), cell(sampleText(s)))
		}
		fmt.Fprint(w, "\n</details>\n")
	}
	if n := r.GetWhoChanged(); n > 0 {
		fmt.Fprintf(w, "\n%s gain or lose access, of %s tried.\n", count(n, "principal and action", "principals and actions"), count(r.GetWhoPairs(), "pair", "pairs"))
	}
	for _, text := range r.GetWarnings() {
		fmt.Fprintf(w, "\nWarning: %s\n", strings.ReplaceAll(clean(text), "<", "&lt;"))
	}
	if !r.GetComplete() && !r.GetShadow() {
		fmt.Fprintf(w, "\nThe time was over before all decisions were compared.\n")
	}
}
