package server_test

import (
	"testing"
	"time"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// A publish answers after its server has applied it, although that takes longer than other writes wait: here the server
// cannot read the policies for a while after the commit.
func TestPublishAnswersWhenItIsApplied(t *testing.T) {
	t.Parallel()
	s := servertest.New(t)
	s.MustApply("doc", "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies)
	servertest.MustExec(t, servertest.Session(t, s.URL), `
		create function wait_for_test() returns trigger language plpgsql as 'begin perform pg_advisory_xact_lock_shared(4711); return null; end';
		create constraint trigger wait_for_test after insert on bundles deferrable initially deferred for each row execute function wait_for_test()`)
	// The transaction of the publish stops at its end, and the lock of the policies waits for it.
	gate, reads, look := servertest.Session(t, s.URL), servertest.Session(t, s.URL), servertest.Session(t, s.URL)
	servertest.MustExec(t, gate, "select pg_advisory_lock(4711)")
	waiting := func(what, sql string) {
		t.Helper()
		servertest.Eventually(t, what, func() (waits bool) {
			if err := look.QueryRow(t.Context(), "select exists (select from pg_locks where not granted and "+sql+")").Scan(&waits); err != nil {
				t.Fatal(err)
			}
			return waits
		})
	}
	type answer struct {
		res *cedarpostv1.ApplyBundleResponse
		err error
	}
	published := make(chan answer, 1)
	go func() {
		res, err := s.Apply("doc", servertest.Files("schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies+"\n@id(\"more\") permit (principal, action == Doc::Action::\"Read\", resource);\n"))
		published <- answer{res, err}
	}()
	waiting("the publish waits at its end", "locktype = 'advisory' and objid = 4711")
	servertest.MustExec(t, reads, "begin")
	locked := make(chan error, 1)
	go func() {
		_, err := reads.Exec(t.Context(), "lock table policies in access exclusive mode")
		locked <- err
	}()
	waiting("the lock waits for the publish", "locktype = 'relation' and relation = 'policies'::regclass")
	servertest.MustExec(t, gate, "select pg_advisory_unlock(4711)")
	if err := <-locked; err != nil {
		t.Fatal(err)
	}
	select {
	case a := <-published:
		t.Fatalf("it answered before its server had applied it: %v, %v", a.res, a.err)
	case <-time.After(1500 * time.Millisecond): // other writes wait for a second
	}
	servertest.MustExec(t, reads, "rollback")
	if a := <-published; a.err != nil || a.res.Bundle.Version != 2 {
		t.Fatalf("%v, %v", a.res, a.err)
	}
	if _, err := s.Policies.GetPolicy(t.Context(), &cedarpostv1.GetPolicyRequest{Bundle: "doc", Id: "more"}); err != nil {
		t.Error(err)
	}
}
