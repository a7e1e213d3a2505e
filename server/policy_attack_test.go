package server_test

import (
	"fmt"
	"strings"
	"testing"

	"connectrpc.com/connect/v2"

	"github.com/cedarpost/cedarpost/bundle"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// publisher returns the clients of another caller with a key.
func publisher(t *testing.T, s *servertest.Server, name string) (cedarpostv1connect.PolicyServiceClient, cedarpostv1connect.AuthorizationServiceClient) {
	t.Helper()
	token := "the key of " + name
	servertest.AddCaller(t, s.DB, name, token)
	auth := cedarpostv1connect.NewAuthorizationServiceClient(s.Client(s.API, token))
	servertest.Eventually(t, "the key", func() bool {
		_, err := auth.GetRevision(t.Context(), &cedarpostv1.GetRevisionRequest{})
		return err == nil
	})
	return cedarpostv1connect.NewPolicyServiceClient(s.Client(s.Admin, token)), auth
}

// beginUpload begins an upload and sends no more than the header.
func beginUpload(t *testing.T, c cedarpostv1connect.PolicyServiceClient, dryRun bool) {
	t.Helper()
	stream, err := c.ApplyBundle(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&cedarpostv1.ApplyBundleRequest{Part: &cedarpostv1.ApplyBundleRequest_Header{
		Header: &cedarpostv1.BundleHeader{Name: "idle", DryRun: dryRun}}}); err != nil {
		t.Fatal(err)
	}
}

// One caller that begins as many uploads as it can, or many callers that begin dry runs, do not keep
// others from publishing.
func TestAttackIdleUploads(t *testing.T) {
	s := servertest.New(t)
	attacker, _ := publisher(t, s, "attacker")
	for range 20 {
		beginUpload(t, attacker, false)
	}
	for i := range 6 {
		c, _ := publisher(t, s, fmt.Sprint("dry-", i))
		beginUpload(t, c, true)
		beginUpload(t, c, true)
	}
	s.MustApply("doc", "schema.cedarschema", servertest.DocSchema, "p.cedar", servertest.DocPolicies)
	t.Log("20 idle uploads of one caller and 12 idle dry runs of 6 callers: another caller publishes")
}

// Bundles that would keep a CPU busy for minutes or for ever are refused before they are checked,
// and decisions go on.
func TestAttackCostlyBundles(t *testing.T) {
	s := servertest.New(t)
	s.MustLoadShop()
	seen := honest(t, func() error {
		_, err := s.Authorization.Authorize(t.Context(), servertest.AskShop("bob", "ViewOrder", "42", false))
		return err
	})
	var attributes strings.Builder
	guards := []string{"true"}
	for i := range 2000 {
		fmt.Fprintf(&attributes, "a%d?: Long, ", i)
		guards = append(guards, fmt.Sprintf("principal has a%d", i))
	}
	for name, files := range map[string][]bundle.File{
		"2000 guards": servertest.Files("schema.cedarschema", "namespace X { entity U { "+attributes.String()+" }; action A appliesTo { principal: U, resource: U }; }",
			"p.cedar", `@id("p") permit (principal, action, resource) when { `+strings.Join(guards, "&&")+` };`),
		"40 optional records": servertest.Files("schema.cedarschema", "namespace X { entity U; action A appliesTo { principal: U, resource: U, context: "+strings.Repeat("{ a?: ", 40)+"Long"+strings.Repeat("}", 40)+" }; }",
			"p.cedar", `@id("p") permit (principal, action, resource) when { context`+strings.Repeat(".a", 40)+` == 1 };`),
	} {
		size := 0
		for _, f := range files {
			size += len(f.Content)
		}
		_, err := s.Apply("x", files)
		servertest.WantCode(t, err, connect.CodeInvalidArgument, "million steps to check, the limit is 20 million")
		t.Logf("%s, %d bytes: %.150v", name, size, err)
	}
	t.Log(seen())
}

// Refused bundles are recorded: the first of each caller and bundle at once, with what was wrong,
// and later ones together.
func TestAttackRefusedBundles(t *testing.T) {
	s := servertest.New(t)
	const refused = 100
	bad := servertest.Files("schema.cedarschema", servertest.DocSchema, "p.cedar", `@id("a") permit (principal, action, resource) when { principal.typo };`)
	_, err := s.Apply("doc", bad)
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "typo")
	servertest.Eventually(t, "an event", func() bool { return len(events(t, s, "publish_refused")) == 1 })
	first := events(t, s, "publish_refused")[0]
	if p := first.GetPublishRefused(); first.GetCaller() != "bootstrap" || first.GetSubject() != "doc" || p.GetBundle() != "doc" || p.GetDryRun() || p.GetCount() != 1 ||
		p.GetFindingCount() != 1 || len(p.GetFindings()) != 1 || !strings.Contains(p.GetFindings()[0], "typo") || !strings.Contains(p.GetReason(), "is not valid") {
		t.Errorf("%v", first)
	}
	for i := range refused - 1 {
		name := "doc"
		if i%3 == 0 {
			name = fmt.Sprint("doc", i)
		}
		_, err := s.Apply(name, servertest.Files("p.cedar", strings.Repeat("x", 1000)))
		servertest.WantCode(t, err, connect.CodeInvalidArgument, "")
	}
	s.Stop()
	list := events(t, s, "publish_refused")
	total, bytes := int64(0), 0
	for _, e := range list {
		total += e.GetPublishRefused().GetCount()
		bytes += len(e.GetPublishRefused().String())
	}
	if total != refused || len(list) > 60 {
		t.Errorf("%d events about %d uploads", len(list), total)
	}
	t.Logf("%d refused uploads of 34 bundles: %d events, about %d bytes", refused, len(list), bytes)
}

// Questions that try out what is allowed leave events: explained and invalid ones, and those over
// the rate.
func TestAttackProbingIsRecorded(t *testing.T) {
	s := servertest.New(t, func(c *server.Config) { c.RateLimit = 0.01 }) // no more than 100 at once, however slow the machine is
	s.MustLoadShop()
	_, auth := publisher(t, s, "attacker")
	want := map[string]int64{}
	for i := range 120 {
		req := servertest.AskShop("bob", "ViewOrder", "42", false)
		reason := "explained"
		if req.Explain = i%2 == 0; !req.Explain {
			reason, req.Resource.Type = "invalid_question", "Shop::Typo"
		}
		switch _, err := auth.Authorize(t.Context(), req); {
		case connect.CodeOf(err) == connect.CodeResourceExhausted && err != nil:
			want["rate_limited"]++
		case connect.CodeOf(err) == connect.CodeInvalidArgument && err != nil, err == nil:
			want[reason]++
		default:
			t.Fatal(err)
		}
	}
	s.Stop()
	got := map[string]int64{}
	list := events(t, s, "probing")
	for _, e := range list {
		p := e.GetProbing()
		got[p.GetReason()] += p.GetCount()
		if e.GetCaller() != "attacker" || p.GetReason() != "rate_limited" && (p.GetPrincipal() != `Shop::User::"bob"` || !strings.HasPrefix(p.GetExample(), `Shop::Action::"ViewOrder" on Shop::`)) {
			t.Errorf("%v", e)
		}
	}
	if fmt.Sprint(got) != fmt.Sprint(want) || len(want) != 3 || len(list) > 12 {
		t.Errorf("%v in %d events, want %v", got, len(list), want)
	}
	t.Logf("120 calls: %v in %d events", got, len(list))
}

// A policy author does not learn by dry runs which entities of another bundle are stored. With the
// right to read them it does, and so about the entities of its own bundle.
func TestAttackDryRunAsksForEntities(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	s.MustApply("base", "bundle.yaml", "exports: [User]", "schema.cedarschema", `namespace Base { entity User; entity Doc; action Read appliesTo { principal: [User], resource: [Doc] }; }`)
	s.MustPut(servertest.Entity(t, `{"uid":{"type":"Base::User","id":"stored"}}`))
	question := []string{"schema.cedarschema", `namespace Mine { entity Doc; action Read appliesTo { principal: [Base::User], resource: [Doc] }; }`,
		"policies.cedar", `
			@id("a") permit (principal == Base::User::"stored", action, resource == Mine::Doc::"mine");
			@id("b") permit (principal == Base::User::"absent", action, resource == Mine::Doc::"mine");`}
	warned := func(grants ...*cedarpostv1.Grant) (text string) {
		one := *s
		name := fmt.Sprint("author", len(grants))
		one.Policies = cedarpostv1connect.NewPolicyServiceClient(s.Client(s.Admin, newCaller(t, s, name, grants...)))
		res, err := applyOnce(t.Context(), &one, &cedarpostv1.BundleHeader{Name: "mine", DryRun: true}, question...)
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range res.Warnings {
			text += f.Message + "\n"
		}
		return text
	}
	author := warned(grant(access.PolicyAuthor, "mine"))
	if strings.Contains(author, "Base::User") || !strings.Contains(author, `Mine::Doc::"mine" is not stored`) {
		t.Errorf("an author of one bundle: %s", author)
	}
	reader := warned(grant(access.PolicyAuthor, "mine"), grant(access.Auditor, "base"))
	if strings.Contains(reader, `"stored"`) || !strings.Contains(reader, `Base::User::"absent" is not stored`) || !strings.Contains(reader, `Mine::Doc::"mine" is not stored`) {
		t.Errorf("one that may read entities of the other: %s", reader)
	}
	t.Logf("attack: a dry run asks for 2 entities of another bundle: %d of 2 are told", strings.Count(author, "Base::User"))
}

// A caller that may check one bundle does not learn by its findings what is in others. One that may
// read them does.
func TestAttackFindingsOfOtherBundles(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	s.MustApply("base", "bundle.yaml", "exports: [User]", "schema.cedarschema", `namespace Base { entity User { secretName: String }; entity Doc; action Read appliesTo { principal: [User], resource: [Doc] }; }`)
	s.MustApply("other", "schema.cedarschema", `namespace Other { entity Doc; action Read appliesTo { principal: [Base::User], resource: [Doc] }; }`,
		"policies.cedar", `@id("secret-policy") permit (principal, action == Other::Action::"Read", resource) when { principal.secretName == "x" };`)
	change := servertest.Files("bundle.yaml", "exports: [User]", "schema.cedarschema", `namespace Base { entity User { name: String }; entity Doc; action Read appliesTo { principal: [User], resource: [Doc] }; }`)
	_, err := s.Apply("base", change)
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "it would break bundle other")
	one := *s
	one.Policies = cedarpostv1connect.NewPolicyServiceClient(s.Client(s.Admin, newCaller(t, s, "one", grant(access.PolicyPublisher, "base"))))
	_, err = one.Apply("base", change)
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "it would break another bundle: there are findings about another bundle")
	told := 0
	for _, f := range findings(t, err) {
		if text := f.String() + err.Error(); f.GetBundle() != "" || strings.Contains(text, "secret") {
			t.Errorf("%v", f)
			told++
		}
	}
	t.Logf("attack: a publisher of one bundle breaks another: %d of %d findings tell about it", told, len(findings(t, err)))
}
