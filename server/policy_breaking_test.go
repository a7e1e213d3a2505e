package server_test

import (
	"strings"
	"testing"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// breakingSchema is [servertest.DocSchema] without the action Publish, whose Read requires an attribute.
var breakingSchema = strings.Replace(strings.Replace(servertest.DocSchema,
	"resource: [Paper], context: {} }", "resource: [Paper], context: { mfa: Bool } }", 1),
	"action Publish appliesTo { principal: [User], resource: [Draft], context: {} };", "", 1)

const (
	readers     = `@id("readers") permit (principal, action == Doc::Action::"Read", resource) when { principal in resource.readers };`
	readBreaks  = `action Doc::Action::"Read": the context requires the attribute "mfa" now, which is new`
	writeBreaks = `action Doc::Action::"Publish": it is removed`
)

// askedServer is a server with the bundle doc, about which three callers asked: orders three times,
// billing and "crm" once, all about Read.
func askedServer(t *testing.T) *servertest.Server {
	t.Helper()
	s := docServer(t)
	for name, n := range map[string]int{"orders": 3, "billing": 1, "crm": 1} {
		asks := cedarpostv1connect.NewAuthorizationServiceClient(s.Client(s.API, newCaller(t, s, name, grant(access.Enforcer, "doc"))))
		for range n {
			if _, err := asks.Authorize(t.Context(), &cedarpostv1.AuthorizeRequest{
				Principal: servertest.UID(`Doc::User::"ann"`), Action: servertest.UID(`Doc::Action::"Read"`), Resource: servertest.UID(`Doc::Paper::"p"`)}); err != nil {
				t.Fatal(err)
			}
		}
	}
	return s
}

// as returns a server whose calls about policies are those of a new caller.
func as(t *testing.T, s *servertest.Server, name string, grants ...*cedarpostv1.Grant) *servertest.Server {
	t.Helper()
	one := *s
	one.Policies = policiesOf(t, s, name, grants...)
	return &one
}

func texts(list []*cedarpostv1.Finding) string {
	var b strings.Builder
	for _, f := range list {
		b.WriteString(f.Severity.String() + " " + f.File + ": " + f.Message + " | " + f.Hint + "\n")
	}
	return b.String()
}

func wantText(t *testing.T, text string, want ...string) {
	t.Helper()
	for _, w := range want {
		if !strings.Contains(text, w) {
			t.Errorf("no %q in\n%s", w, text)
		}
	}
}

// A publish that breaks callers is refused in each way to publish, names what breaks and who asked, and
// succeeds with the flag. A dry run and CheckChange warn.
func TestBreakingPublish(t *testing.T) {
	t.Parallel()
	s := askedServer(t)
	both := as(t, s, "both", grant(access.PolicyPublisher, "doc"), grant(access.PolicyAuthor, "doc"), grant(access.Auditor, "doc"))
	files := []string{"schema.cedarschema", breakingSchema, "policies.cedar", readers}
	who := []string{
		readBreaks + " | make it optional until all callers send it; asked in the last 7 days by orders (3 times), billing (1 time), crm (1 time)\n",
		writeBreaks + " | keep it until nobody asks about it; nobody asked in the last 7 days\n"}

	dry, err := applyOnce(t.Context(), both, &cedarpostv1.BundleHeader{Name: "doc", DryRun: true}, files...)
	if err != nil {
		t.Fatal(err)
	}
	wantText(t, texts(dry.Warnings), "WARNING schema.cedarschema: breaks callers: "+who[0], "WARNING schema.cedarschema: breaks callers: "+who[1])

	before := revision(t, s)
	_, err = applyOnce(t.Context(), both, &cedarpostv1.BundleHeader{Name: "doc"}, files...)
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "it breaks callers who ask as before (asked in the last 7 days by orders (3 times), billing (1 time), crm (1 time)); allow_breaking (--allow-breaking) publishes it nevertheless: ")
	wantText(t, texts(findings(t, err)), "ERROR schema.cedarschema: "+who[0], "ERROR schema.cedarschema: "+who[1])
	if now := revision(t, s); now != before {
		t.Errorf("a refused publish changed something: revision %d, before %d", now, before)
	}
	reads := 0
	for _, e := range events(t, s, "log_read") {
		if e.Caller == "both" && e.Subject == cedarpostv1connect.PolicyServiceApplyBundleProcedure && e.GetLogRead().GetRows() == 3 && strings.Contains(e.GetLogRead().GetRequest(), "Read") {
			reads++
		}
	}
	if reads != 2 {
		t.Errorf("%d reads of the log are recorded, want 2", reads)
	}

	made, err := both.Policies.CreateChange(t.Context(), &cedarpostv1.CreateChangeRequest{Bundle: "doc", Title: "mfa", Edits: []*cedarpostv1.FileEdit{putFile(files[0], files[1]), putFile(files[2], files[3])}})
	if err != nil {
		t.Fatal(err)
	}
	c := made.Change
	checked, err := both.Policies.CheckChange(t.Context(), &cedarpostv1.CheckChangeRequest{Id: c.Id})
	if err != nil || !checked.Ok {
		t.Fatalf("%v, %v", checked, err)
	}
	wantText(t, texts(checked.Findings), "breaks callers: "+who[0], "breaks callers: "+who[1])
	_, err = both.Policies.PublishChange(t.Context(), &cedarpostv1.PublishChangeRequest{Id: c.Id, Digest: c.Digest})
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "it breaks callers who ask as before (asked")
	done, err := both.Policies.PublishChange(t.Context(), &cedarpostv1.PublishChangeRequest{Id: c.Id, Digest: c.Digest, AllowBreaking: true})
	if err != nil || done.Bundle.Version != 2 {
		t.Fatalf("%v, %v", done, err)
	}
	wantText(t, texts(done.Warnings), "WARNING schema.cedarschema: breaks callers: "+readBreaks)

	// Back: who sends the attribute breaks. The new action breaks nobody.
	_, err = both.Policies.RollbackVersion(t.Context(), &cedarpostv1.RollbackVersionRequest{Bundle: "doc", Version: 1, Reason: "too early"})
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, `action Doc::Action::"Read": the context does not have the attribute "mfa" any more`)
	if n := len(findings(t, err)); n != 1 {
		t.Errorf("%d findings", n)
	}
	back, err := both.Policies.RollbackVersion(t.Context(), &cedarpostv1.RollbackVersionRequest{Bundle: "doc", Version: 1, Reason: "too early", AllowBreaking: true})
	if err != nil || back.Bundle.Version != 3 {
		t.Fatalf("%v, %v", back, err)
	}
	if _, err := applyOnce(t.Context(), s, &cedarpostv1.BundleHeader{Name: "new"}, bundleOf("New")...); err != nil {
		t.Errorf("the first version of a bundle: %v", err)
	}
	_, err = applyOnce(t.Context(), s, &cedarpostv1.BundleHeader{Name: "new"}, bundleOf("Newer")...)
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, `action New::Action::"Open": it is removed`)
	if _, err := applyOnce(t.Context(), s, &cedarpostv1.BundleHeader{Name: "new", AllowBreaking: true}, bundleOf("Newer")...); err != nil {
		t.Error(err)
	}
}

// A publisher, who may not read decisions, publishes what breaks callers to learn who asks. Neither the
// refusal, nor its findings, nor a dry run, nor the event of the refusal has a name or a number. An auditor
// of another bundle learns no more.
func TestAttackLearnWhoAsksByPublishing(t *testing.T) {
	t.Parallel()
	s := askedServer(t)
	told := 0
	for _, curious := range []*servertest.Server{
		as(t, s, "publisher", grant(access.PolicyPublisher, "doc")),
		as(t, s, "elsewhere", grant(access.PolicyPublisher, "doc"), grant(access.Auditor, "other")),
	} {
		for _, dryRun := range []bool{false, true} {
			res, err := applyOnce(t.Context(), curious, &cedarpostv1.BundleHeader{Name: "doc", DryRun: dryRun}, "schema.cedarschema", breakingSchema, "policies.cedar", readers)
			text := texts(res.GetWarnings())
			if !dryRun {
				servertest.WantCode(t, err, connect.CodeFailedPrecondition, "it breaks callers who ask as before; allow_breaking")
				text = err.Error() + texts(findings(t, err))
			}
			wantText(t, text, readBreaks, writeBreaks, "an auditor of the bundle sees in the log who asks")
			for _, hidden := range []string{"orders", "billing", "crm", "3 time", "nobody asked"} {
				told += strings.Count(text, hidden)
			}
		}
	}
	if n := len(events(t, s, "log_read")); n != 0 || told != 0 {
		t.Errorf("%d names or numbers told, %d reads of the log", told, n)
	}
	t.Logf("attack: callers without a right to read decisions publish what breaks callers, 4 times: %d names told", told)
}

// A publisher of one bundle changes a type that another bundle uses for its context. Callers of that
// one break, too: it is refused, and says so without names to one who may not read that bundle.
func TestAttackBreakCallersOfAnotherBundle(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	base := func(attributes string) []string {
		return []string{"bundle.yaml", "name: base\nexports: [User]\n", "schema.cedarschema", "namespace Base { type Ctx = { " + attributes + " }; entity User; action Own appliesTo { principal: [User], resource: [User] }; }"}
	}
	s.MustApply("base", base("mfa?: Bool")...)
	s.MustApply("secret", "schema.cedarschema", `namespace Secret { action Open appliesTo { principal: [Base::User], resource: [Base::User], context: Base::Ctx }; }`)
	one := as(t, s, "one", grant(access.PolicyPublisher, "base"))
	_, err := applyOnce(t.Context(), one, &cedarpostv1.BundleHeader{Name: "base"}, base("")...)
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "callers of actions of another bundle, which this caller may not read, break")
	told := strings.Count(err.Error()+texts(findings(t, err)), "Secret") + strings.Count(err.Error()+texts(findings(t, err)), "secret")
	_, err = applyOnce(t.Context(), s, &cedarpostv1.BundleHeader{Name: "base"}, base("")...)
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, `action Secret::Action::"Open": the context does not have the attribute "mfa" any more`)
	if told != 0 {
		t.Errorf("%d names told", told)
	}
	t.Logf("attack: a publisher of one bundle breaks callers of another: refused, %d names told", told)
}
