package server_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectproto"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
)

// storedTypes returns the types in an error that refuses to delete a bundle.
func storedTypes(t *testing.T, err error) (out []string) {
	t.Helper()
	e, ok := errors.AsType[*connect.Error](err)
	if !ok {
		t.Fatal(err)
	}
	for _, d := range e.Details() {
		m, err := connectproto.UnmarshalErrorDetail(d)
		if err != nil {
			t.Fatal(err)
		}
		for _, one := range m.(*cedarpostv1.StoredEntities).GetTypes() {
			out = append(out, fmt.Sprint(one.Type, " ", one.Entities))
		}
	}
	return out
}

func removeEntity(uid string) *cedarpostv1.EntityOperation {
	return &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_Delete{Delete: &cedarpostv1.DeleteEntity{Uid: servertest.UID(uid), Cascade: true}}}
}

// A bundle is deleted when nothing is stored of its types. It is one revision with an event; questions are
// refused as about an unknown action, past decisions are replayed, and a rollback brings the bundle back.
func TestDeleteBundle(t *testing.T) {
	t.Parallel()
	s := docServer(t)
	s.MustApply("doc", append(doc("name: doc\n"), "more.cedar", "// two\n")...)
	digest := live(t, s, "doc").Digest
	s.MustPut(servertest.DocUser(t, "ann", "staff"), servertest.DocUser(t, "bob"), servertest.Entity(t, `{"uid":{"type":"Doc::Paper","id":"p"},"attrs":{"readers":{"__entity":{"type":"Doc::Group","id":"staff"}}}}`))
	asked, err := s.Authorization.Authorize(t.Context(), &cedarpostv1.AuthorizeRequest{Principal: servertest.UID(`Doc::User::"ann"`), Action: servertest.UID(`Doc::Action::"Read"`), Resource: servertest.UID(`Doc::Paper::"p"`)})
	if err != nil || asked.Decision != cedarpostv1.Decision_ALLOW {
		t.Fatal(asked, err)
	}
	publisher := policiesOf(t, s, "publisher", grant(access.PolicyPublisher, "doc"))
	del := func(req *cedarpostv1.DeleteBundleRequest) (*cedarpostv1.DeleteBundleResponse, error) {
		req.Bundle = "doc"
		return publisher.DeleteBundle(t.Context(), req)
	}
	_, err = del(&cedarpostv1.DeleteBundleRequest{})
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "entities of the bundle doc are stored: Doc::Paper, Doc::User; delete them first, or leave them behind")
	if got := storedTypes(t, err); !slices.Equal(got, []string{"Doc::Paper 0", "Doc::User 0"}) {
		t.Errorf("a publisher is told %q", got)
	}
	_, err = s.Policies.DeleteBundle(t.Context(), &cedarpostv1.DeleteBundleRequest{Bundle: "doc", LeaveTypes: []string{"Doc::Paper"}})
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "are stored: Doc::User (2); delete")
	_, err = del(&cedarpostv1.DeleteBundleRequest{LeaveTypes: []string{"Doc::Paper", "Doc::Usr"}})
	servertest.WantCode(t, err, connect.CodeInvalidArgument, `leave_types: the bundle doc has no entity type "Doc::Usr"`)
	wrong := int64(1)
	_, err = del(&cedarpostv1.DeleteBundleRequest{ExpectVersion: &wrong})
	servertest.WantCode(t, err, connect.CodeAborted, "version 2 of the bundle doc is live, not 1")
	_, err = policiesOf(t, s, "author", grant(access.PolicyAuthor, "doc")).DeleteBundle(t.Context(), &cedarpostv1.DeleteBundleRequest{Bundle: "doc"})
	servertest.WantCode(t, err, connect.CodePermissionDenied, "no right to DeleteBundle")
	_, err = s.Policies.DeleteBundle(t.Context(), &cedarpostv1.DeleteBundleRequest{Bundle: "admin"})
	servertest.WantCode(t, err, connect.CodePermissionDenied, "built in")
	_, err = s.Policies.DeleteBundle(t.Context(), &cedarpostv1.DeleteBundleRequest{Bundle: "none"})
	servertest.WantCode(t, err, connect.CodeNotFound, `"none"`)

	if _, err := servertest.Write(t, s, removeEntity(`Doc::User::"bob"`)); err != nil {
		t.Fatal(err)
	}
	w, _ := watch(t, s, nil)
	res, err := del(&cedarpostv1.DeleteBundleRequest{Reason: "nobody uses it", LeaveTypes: []string{"Doc::User", "Doc::Paper", "Doc::Group"}})
	if err != nil || res.Version != 2 || len(res.Left) != 2 || res.Left[0].Type != "Doc::Paper" {
		t.Fatal(res, err)
	}
	if _, reset := w.until(res.Revision.Number); !reset {
		t.Error("watchers got no reset")
	}
	if e := lastChange(t, s); e.Subject != "doc" || e.Revision != res.Revision.Number || e.Caller != "publisher" || e.GetChange().Operation != "DeleteBundle" ||
		string(e.GetChange().Before) != digest || len(e.GetChange().After) > 0 || e.GetChange().Version != 2 || e.GetChange().Reason != "nobody uses it" {
		t.Errorf("%v", e)
	}
	_, err = s.Authorization.Authorize(t.Context(), &cedarpostv1.AuthorizeRequest{Principal: servertest.UID(`Doc::User::"ann"`), Action: servertest.UID(`Doc::Action::"Read"`), Resource: servertest.UID(`Doc::Paper::"p"`)})
	_, unknown := s.Authorization.Authorize(t.Context(), &cedarpostv1.AuthorizeRequest{Principal: servertest.UID(`No::User::"ann"`), Action: servertest.UID(`No::Action::"Read"`), Resource: servertest.UID(`No::Paper::"p"`)})
	if connect.CodeOf(err) != connect.CodeOf(unknown) || strings.ReplaceAll(err.Error(), "Doc::", "No::") != unknown.Error() {
		t.Errorf("%v, want %v", err, unknown)
	}
	if got := replay(t, s, asked.DecisionId); got.Outcome != replayedEqual {
		t.Errorf("%v", got)
	}
	_, err = servertest.Write(t, s, put(servertest.DocUser(t, "eve")))
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "Doc::User")
	left := &cedarpostv1.GetEntityRequest{Uid: servertest.UID(`Doc::User::"ann"`)}
	if _, err := s.Entities.GetEntity(t.Context(), left); err != nil {
		t.Errorf("a caller with rights to all bundles: %v", err)
	}
	_, err = cedarpostv1connect.NewEntityServiceClient(s.Client(s.Admin, newCaller(t, s, "doc-reader", grant(access.Auditor, "doc")))).GetEntity(t.Context(), left)
	servertest.WantCode(t, err, connect.CodePermissionDenied, "GetEntity")
	if _, err = del(&cedarpostv1.DeleteBundleRequest{}); connect.CodeOf(err) != connect.CodeNotFound {
		t.Errorf("deleted twice: %v", err)
	}
	if v := live(t, s, "doc"); v.Version != 2 || v.Live || v.DeletedBy != "publisher" || v.DeletedAt == nil {
		t.Errorf("%v", v)
	}
	if diff, err := s.Policies.DiffVersions(t.Context(), &cedarpostv1.DiffVersionsRequest{Bundle: "doc", From: 1, To: 2}); err != nil || len(diff.Files) != 2 {
		t.Errorf("%v, %v", diff, err)
	}
	if v, files := version(t, s, "doc", 2); v.Version != 2 || len(files) != 4 {
		t.Errorf("%v with %d files", v, len(files))
	}
	mustVerify(t, s.URL)

	// What is stored has to fit the schema of a new version, and comes back with it.
	_, err = s.Apply("doc", servertest.Files("schema.cedarschema", strings.Replace(servertest.DocSchema, "level: Long", "level: String", 1)))
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, `Doc::User::"ann"`)
	back, err := publisher.RollbackVersion(t.Context(), &cedarpostv1.RollbackVersionRequest{Bundle: "doc", Version: 2, Reason: "somebody does"})
	if err != nil || back.Bundle.Version != 3 || back.Bundle.Digest != digest {
		t.Fatal(back, err)
	}
	if got := read(t, s, "ann", nil); got != cedarpostv1.Decision_ALLOW {
		t.Errorf("after the rollback: %v", got)
	}
	_, err = del(&cedarpostv1.DeleteBundleRequest{LeaveTypes: []string{"Doc::User", "Doc::Paper"}})
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "the bundle doc is frozen")
	mustVerify(t, s.URL)
}

// live returns the newest version of a bundle.
func live(t *testing.T, s *servertest.Server, name string) *cedarpostv1.BundleVersion {
	t.Helper()
	list, err := s.Policies.ListVersions(t.Context(), &cedarpostv1.ListVersionsRequest{Bundle: name, PageSize: 1})
	if err != nil {
		t.Fatal(err)
	}
	return list.Versions[0]
}

// A bundle is deleted and made again to shed its approvals or its freeze. Neither goes, nor do the numbers of
// its versions begin again.
func TestAttackDeleteToShedRules(t *testing.T) {
	t.Parallel()
	h := newHouse(t, twoRule)
	refused := 0
	remove := func(text string) {
		t.Helper()
		_, err := h.publisher.DeleteBundle(t.Context(), &cedarpostv1.DeleteBundleRequest{Bundle: "doc"})
		servertest.WantCode(t, err, connect.CodeFailedPrecondition, text)
		refused++
	}
	remove("changes of the bundle doc need 2 approvals, so it cannot be deleted; first publish a change")
	open := h.create(extra(7)) // of version 1
	// Somebody deletes it past the service, or a later version of the service has another way.
	base, err := h.DB.PolicyRevision(t.Context(), 1<<40)
	if err != nil {
		t.Fatal(err)
	}
	gone, err := h.DB.DeleteBundle(t.Context(), store.BundleDeletion{Name: "doc", Caller: "intruder", BaseRevision: base, Rules: func(store.PolicyState) error { return nil }})
	if err != nil || gone.Version != 1 {
		t.Fatal(gone, err)
	}
	again := servertest.Files(doc("name: doc\n")...)
	_, err = h.Apply("doc", again)
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "changes of the bundle doc need 2 approvals")
	refused++
	servertest.WantCode(t, publish(t, h.publisher, open), connect.CodeFailedPrecondition, "is of version 1 of the bundle doc, and version 0 is live")
	refused++
	res, err := h.author.CreateChange(t.Context(), &cedarpostv1.CreateChangeRequest{Bundle: "doc", Title: "again", Edits: []*cedarpostv1.FileEdit{
		putFile("bundle.yaml", "name: doc\napprovals: 0\n"), putFile("schema.cedarschema", servertest.DocSchema), putFile("policies.cedar", servertest.DocPolicies)}})
	if err != nil {
		t.Fatal(err)
	}
	c := res.Change
	if got := h.get(c.Id); c.BaseVersion != 0 || got.ApprovalsNeeded != 2 {
		t.Errorf("%v", got)
	}
	servertest.WantCode(t, publish(t, h.publisher, c), connect.CodeFailedPrecondition, "needs 2 approvals and has 0")
	refused++
	if err := errors.Join(approve(t, h.approver, c), approve(t, h.second, c), publish(t, h.publisher, c)); err != nil {
		t.Fatal(err)
	}
	if v := h.live(); v.Version != 2 || !v.Live {
		t.Errorf("%v", v)
	}
	// With approvals: 0, agreed by two, it can be deleted, unless it is frozen.
	if _, err := h.publisher.FreezeBundle(t.Context(), &cedarpostv1.FreezeBundleRequest{Bundle: "doc", Reason: "audit"}); err != nil {
		t.Fatal(err)
	}
	remove("the bundle doc is frozen")
	base, _ = h.DB.PolicyRevision(t.Context(), 1<<40)
	if _, err := h.DB.DeleteBundle(t.Context(), store.BundleDeletion{Name: "doc", Caller: "intruder", BaseRevision: base, Rules: func(store.PolicyState) error { return nil }}); err != nil {
		t.Fatal(err)
	}
	_, err = h.Apply("doc", again)
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "the bundle doc is frozen")
	refused++
	if _, err := h.publisher.UnfreezeBundle(t.Context(), &cedarpostv1.UnfreezeBundleRequest{Bundle: "doc"}); err != nil {
		t.Fatal(err)
	}
	if v := h.MustApply("doc", doc("name: doc\n")...).Bundle; v.Version != 3 {
		t.Errorf("%v", v)
	}
	if _, err := h.publisher.DeleteBundle(t.Context(), &cedarpostv1.DeleteBundleRequest{Bundle: "doc"}); err != nil {
		t.Error(err)
	}
	mustVerify(t, h.URL)
	t.Logf("attack: a bundle is deleted to shed its approvals and its freeze: %d of 6 refused", refused)
}

// A bundle whose types others use is not deleted. The refusal names the users to those who may read them.
func TestDeleteBundleThatIsUsed(t *testing.T) {
	t.Parallel()
	s := docServer(t)
	s.MustApply("doc", doc(exportsUser)...)
	s.MustApply("wiki", wiki(wikiSchema)...)
	req := &cedarpostv1.DeleteBundleRequest{Bundle: "doc"}
	_, err := s.Policies.DeleteBundle(t.Context(), req)
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "another bundle would break, because it uses types of the bundle doc; change or delete that one first: ")
	if list := findings(t, err); list[0].Bundle != "wiki" || !strings.Contains(list[0].Message, "Doc::User") {
		t.Errorf("%v", list)
	}
	_, err = policiesOf(t, s, "publisher", grant(access.PolicyPublisher, "doc")).DeleteBundle(t.Context(), req)
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "another bundle would break")
	if strings.Contains(err.Error(), "wiki") || strings.Contains(err.Error(), "Wiki") {
		t.Errorf("%v", err)
	}
	s.MustApply("wiki", wiki(wikiOwn)...)
	s.MustApply("guardrails", "schema.cedarschema", "", "g.cedar", `@id("g") forbid (principal == Doc::User::"eve", action, resource);`)
	_, err = s.Policies.DeleteBundle(t.Context(), req)
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "policy g: ")
	// guardrails and admin-local need grants that name them.
	all := policiesOf(t, s, "all", grant(access.PolicyPublisher, "*"))
	s.MustApply("admin-local", "schema.cedarschema", "", "p.cedar", `@id("none") forbid (principal, action == Cedarpost::Action::"DeleteBundle", resource);`)
	for _, name := range []string{"guardrails", "admin-local"} {
		_, err = all.DeleteBundle(t.Context(), &cedarpostv1.DeleteBundleRequest{Bundle: name})
		servertest.WantCode(t, err, connect.CodePermissionDenied, "DeleteBundle")
	}
	_, err = s.Policies.DeleteBundle(t.Context(), &cedarpostv1.DeleteBundleRequest{Bundle: "guardrails"})
	servertest.WantCode(t, err, connect.CodePermissionDenied, "admin-local/none")
	for _, name := range []string{"admin-local", "guardrails", "doc", "wiki"} { // no rule forbids to delete admin-local
		if _, err := s.Policies.DeleteBundle(t.Context(), &cedarpostv1.DeleteBundleRequest{Bundle: name}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if list, err := s.Policies.ListBundles(t.Context(), &cedarpostv1.ListBundlesRequest{}); err != nil || len(list.Bundles) > 0 {
		t.Errorf("%v, %v", list, err)
	}
	mustVerify(t, s.URL)
}

// oneAfterTheOther makes two calls on two servers of a database so that both have checked what they write before
// either commits, and first commits first.
func oneAfterTheOther(t *testing.T, url string, first, after func() error) (one, two error) {
	t.Helper()
	lock := servertest.Session(t, url)
	servertest.MustExec(t, lock, "begin; select from revision for update")
	watcher := servertest.Session(t, url)
	waiting := func(n int) func() bool {
		return func() bool {
			var found int
			err := watcher.QueryRow(t.Context(), "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'").Scan(&found)
			return err == nil && found >= n
		}
	}
	var calls sync.WaitGroup
	calls.Go(func() { one = first() })
	servertest.Eventually(t, "the first call waits to commit", waiting(1))
	calls.Go(func() { two = after() })
	servertest.Eventually(t, "both calls wait to commit", waiting(2))
	servertest.MustExec(t, lock, "commit")
	calls.Wait()
	return one, two
}

// Entities are written while their bundle is deleted, and while its schema changes. An entity is never stored
// without a bundle that declares its type, nor one that does not fit the schema.
func TestAttackWritesRaceSchema(t *testing.T) {
	t.Parallel()
	a := docServer(t)
	b := servertest.On(t, a.URL)
	b.UseKey(a.Token)
	base := []string{"schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies}
	write := func() error { return second(servertest.Write(t, a, put(servertest.DocUser(t, "ann")))) }
	races := map[string]func() error{
		"deletion": func() error {
			return second(b.Policies.DeleteBundle(t.Context(), &cedarpostv1.DeleteBundleRequest{Bundle: "doc"}))
		},
		"deletion that leaves others": func() error {
			return second(b.Policies.DeleteBundle(t.Context(), &cedarpostv1.DeleteBundleRequest{Bundle: "doc", LeaveTypes: []string{"Doc::Paper"}}))
		},
		"other schema": func() error {
			return second(b.Apply("doc", servertest.Files("schema.cedarschema", strings.Replace(servertest.DocSchema, "level: Long", "level: String", 1))))
		},
	}
	refused := 0
	for name, change := range races {
		a.MustApply("doc", base...)
		wrote, changed := oneAfterTheOther(t, a.URL, write, change)
		if wrote != nil {
			t.Errorf("%s after a write: %v", name, wrote)
		}
		servertest.WantCode(t, changed, connect.CodeFailedPrecondition, "Doc::User")
		refused++
		if _, err := servertest.Write(t, a, removeEntity(`Doc::User::"ann"`)); err != nil {
			t.Fatal(err)
		}
		changed, wrote = oneAfterTheOther(t, a.URL, change, write)
		if changed != nil {
			t.Errorf("%s before a write: %v", name, changed)
		}
		servertest.WantCode(t, wrote, connect.CodeInvalidArgument, "Doc::User")
		refused++
	}
	mustVerify(t, a.URL)
	t.Logf("attack: an entity is written while its schema goes: the later of the two is refused, %d of %d", refused, 2*len(races))
}

// A bundle begins to use a type while its bundle stops exporting it, and while that bundle is deleted: never
// do both happen.
func TestAttackUseRacesExport(t *testing.T) {
	t.Parallel()
	a := docServer(t)
	b := servertest.On(t, a.URL)
	b.UseKey(a.Token)
	use := func() error { return second(a.Apply("wiki", servertest.Files(wiki(wikiSchema)...))) }
	races := map[string]func() error{
		"no export": func() error { return second(b.Apply("doc", servertest.Files(doc("name: doc\n")...))) },
		"deletion": func() error {
			return second(b.Policies.DeleteBundle(t.Context(), &cedarpostv1.DeleteBundleRequest{Bundle: "doc"}))
		},
	}
	refused := 0
	for name, take := range races {
		a.MustApply("doc", doc(exportsUser)...)
		a.MustApply("wiki", wiki(wikiOwn)...)
		used, taken := oneAfterTheOther(t, a.URL, use, take)
		if used != nil {
			t.Errorf("use before %s: %v", name, used)
		}
		servertest.WantCode(t, taken, connect.CodeFailedPrecondition, "would break")
		refused++
		a.MustApply("wiki", wiki(wikiOwn)...)
		taken, used = oneAfterTheOther(t, a.URL, take, use)
		if taken != nil {
			t.Errorf("%s before use: %v", name, taken)
		}
		servertest.WantCode(t, used, connect.CodeInvalidArgument, "Doc::User")
		refused++
	}
	t.Logf("attack: a bundle uses a type while that is taken away: the later of the two is refused, %d of %d", refused, 2*len(races))
}
