package server_test

import (
	"context"
	"strings"
	"sync"
	"testing"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// Every RPC that writes takes an idempotency key.
func TestWritesTakeIdempotencyKeys(t *testing.T) {
	t.Parallel()
	var has func(m protoreflect.MessageDescriptor, depth int) bool
	has = func(m protoreflect.MessageDescriptor, depth int) bool {
		for i := range m.Fields().Len() {
			f := m.Fields().Get(i)
			if f.Name() == "idempotency_key" || depth > 0 && f.Message() != nil && has(f.Message(), depth-1) {
				return true
			}
		}
		return false
	}
	writes := 0
	for _, file := range []protoreflect.FileDescriptor{cedarpostv1.File_cedarpost_v1_access_proto, cedarpostv1.File_cedarpost_v1_entity_proto, cedarpostv1.File_cedarpost_v1_policy_proto} {
		for i := range file.Services().Len() {
			methods := file.Services().Get(i).Methods()
			for j := range methods.Len() {
				m := methods.Get(j)
				name := string(m.Name())
				if name == "WhoAmI" || strings.HasPrefix(name, "Get") || strings.HasPrefix(name, "List") || strings.HasPrefix(name, "Query") ||
					strings.HasPrefix(name, "Diff") || strings.HasPrefix(name, "Check") || name == "AnalyzeChange" { // a report that was made twice harms nobody
					continue
				}
				if writes++; !has(m.Input(), 1) {
					t.Errorf("%s has no idempotency_key", m.FullName())
				}
			}
		}
	}
	if writes < 8 {
		t.Errorf("found only %d RPCs that write", writes)
	}
}

// repeatable is a call that writes, with an idempotency key.
type repeatable struct {
	name string
	// call sends the request of the case, or another one, to a server.
	call func(s *servertest.Server, key string, other bool) (proto.Message, error)
}

func repeatables(t *testing.T) []repeatable {
	pick := func(other bool, a, b string) string {
		if other {
			return b
		}
		return a
	}
	atomically := func(s *servertest.Server, options *cedarpostv1.ImportOptions, entities ...*cedarpostv1.Entity) (*cedarpostv1.ImportEntitiesResponse, error) {
		stream, err := s.Entities.ImportEntities(t.Context())
		if err != nil {
			return nil, err
		}
		_ = stream.Send(&cedarpostv1.ImportEntitiesRequest{Options: options, Entities: entities}) // the reply has the error
		return stream.CloseAndReceive()
	}
	return []repeatable{
		{"WriteEntities", func(s *servertest.Server, key string, other bool) (proto.Message, error) {
			return s.Entities.WriteEntities(t.Context(), &cedarpostv1.WriteEntitiesRequest{IdempotencyKey: key, Operations: []*cedarpostv1.EntityOperation{{
				Operation:    &cedarpostv1.EntityOperation_Put{Put: servertest.DocUser(t, pick(other, "once", "twice"))},
				Precondition: &cedarpostv1.Precondition{Condition: &cedarpostv1.Precondition_MustNotExist{MustNotExist: true}},
			}}})
		}},
		{"ImportEntities", func(s *servertest.Server, key string, other bool) (proto.Message, error) {
			return atomically(s, &cedarpostv1.ImportOptions{Atomic: true, IdempotencyKey: key},
				servertest.DocUser(t, "imported"), servertest.DocUser(t, pick(other, "too", "not")))
		}},
		{"ApplyBundle", func(s *servertest.Server, key string, other bool) (proto.Message, error) {
			return applyOnce(t.Context(), s, &cedarpostv1.BundleHeader{Name: "doc", IdempotencyKey: key},
				"schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies+pick(other, "// one", "// two"))
		}},
		{"ApplyBundle of what is published", func(s *servertest.Server, key string, other bool) (proto.Message, error) {
			return applyOnce(t.Context(), s, &cedarpostv1.BundleHeader{Name: "doc", IdempotencyKey: key},
				"schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies+pick(other, "// one", "// two"))
		}},
		{"CreateChange", func(s *servertest.Server, key string, other bool) (proto.Message, error) {
			return s.Policies.CreateChange(t.Context(), &cedarpostv1.CreateChangeRequest{Bundle: "doc", Title: pick(other, "one", "two"), Edits: []*cedarpostv1.FileEdit{extra(1)}, IdempotencyKey: key})
		}},
		{"UpdateChange", func(s *servertest.Server, key string, other bool) (proto.Message, error) {
			return s.Policies.UpdateChange(t.Context(), &cedarpostv1.UpdateChangeRequest{Id: "doc-1", Edits: []*cedarpostv1.FileEdit{extra(map[bool]int{true: 3, false: 2}[other])}, IdempotencyKey: key})
		}},
		{"DeclineChange", func(s *servertest.Server, key string, other bool) (proto.Message, error) {
			res, err := s.Policies.GetChange(t.Context(), &cedarpostv1.GetChangeRequest{Id: "doc-1"})
			if err != nil {
				return nil, err
			}
			return s.Policies.DeclineChange(t.Context(), &cedarpostv1.DeclineChangeRequest{Id: "doc-1", Digest: res.Change.Digest, Reason: pick(other, "one", "two"), IdempotencyKey: key})
		}},
		{"DiscardChange", func(s *servertest.Server, key string, other bool) (proto.Message, error) {
			return s.Policies.DiscardChange(t.Context(), &cedarpostv1.DiscardChangeRequest{Id: "doc-1", Reason: pick(other, "one", "two"), IdempotencyKey: key})
		}},
		{"CreateChange of a change to publish", func(s *servertest.Server, key string, other bool) (proto.Message, error) {
			return s.Policies.CreateChange(t.Context(), &cedarpostv1.CreateChangeRequest{Bundle: "doc", Title: pick(other, "one", "two"), Edits: []*cedarpostv1.FileEdit{extra(4)}, IdempotencyKey: key})
		}},
		{"PublishChange", func(s *servertest.Server, key string, other bool) (proto.Message, error) {
			res, err := s.Policies.GetChange(t.Context(), &cedarpostv1.GetChangeRequest{Id: "doc-2"})
			if err != nil {
				return nil, err
			}
			return s.Policies.PublishChange(t.Context(), &cedarpostv1.PublishChangeRequest{Id: pick(other, "doc-2", "doc-1"), Digest: res.Change.Digest, IdempotencyKey: key})
		}},
		{"FreezeBundle", func(s *servertest.Server, key string, other bool) (proto.Message, error) {
			return s.Policies.FreezeBundle(t.Context(), &cedarpostv1.FreezeBundleRequest{Bundle: "doc", Reason: pick(other, "holidays", "audit"), IdempotencyKey: key})
		}},
		{"ApplyBundle of a bundle to delete", func(s *servertest.Server, key string, other bool) (proto.Message, error) {
			return applyOnce(t.Context(), s, &cedarpostv1.BundleHeader{Name: "gone", Message: pick(other, "one", "two"), IdempotencyKey: key}, bundleOf("Gone")...)
		}},
		{"DeleteBundle", func(s *servertest.Server, key string, other bool) (proto.Message, error) {
			return s.Policies.DeleteBundle(t.Context(), &cedarpostv1.DeleteBundleRequest{Bundle: "gone", Reason: pick(other, "one", "two"), IdempotencyKey: key})
		}},
		{"RollbackVersion", func(s *servertest.Server, key string, other bool) (proto.Message, error) {
			return s.Policies.RollbackVersion(t.Context(), &cedarpostv1.RollbackVersionRequest{Bundle: "doc", Version: 1, Reason: pick(other, "too open", "too closed"), IdempotencyKey: key})
		}},
		{"UnfreezeBundle", func(s *servertest.Server, key string, other bool) (proto.Message, error) {
			return s.Policies.UnfreezeBundle(t.Context(), &cedarpostv1.UnfreezeBundleRequest{Bundle: "doc", Reason: pick(other, "mended", "wrong"), IdempotencyKey: key})
		}},
		{"CreateKey", func(s *servertest.Server, key string, other bool) (proto.Message, error) {
			return accessOf(s, s.Token).CreateKey(t.Context(), &cedarpostv1.CreateKeyRequest{Caller: pick(other, "shop", "till"), IdempotencyKey: key, Grants: []*cedarpostv1.Grant{grant(access.Enforcer, "doc")}})
		}},
		{"RotateKey", func(s *servertest.Server, key string, other bool) (proto.Message, error) {
			return accessOf(s, s.Token).RotateKey(t.Context(), &cedarpostv1.RotateKeyRequest{Caller: pick(other, "shop", "till"), IdempotencyKey: key})
		}},
		{"PutGrant", func(s *servertest.Server, key string, other bool) (proto.Message, error) {
			return accessOf(s, s.Token).PutGrant(t.Context(), &cedarpostv1.PutGrantRequest{IdempotencyKey: key, Grant: &cedarpostv1.Grant{Caller: pick(other, "shop", "till"), Role: access.Auditor, Bundle: "doc"}})
		}},
		{"DeleteGrant", func(s *servertest.Server, key string, other bool) (proto.Message, error) {
			return accessOf(s, s.Token).DeleteGrant(t.Context(), &cedarpostv1.DeleteGrantRequest{Caller: pick(other, "shop", "till"), Role: access.Auditor, Bundle: "doc", IdempotencyKey: key})
		}},
		{"RevokeKey", func(s *servertest.Server, key string, other bool) (proto.Message, error) {
			return accessOf(s, s.Token).RevokeKey(t.Context(), &cedarpostv1.RevokeKeyRequest{Caller: pick(other, "shop", "till"), IdempotencyKey: key})
		}},
	}
}

// applyOnce uploads a bundle whose header has an idempotency key.
func applyOnce(ctx context.Context, s *servertest.Server, header *cedarpostv1.BundleHeader, pathsAndContents ...string) (*cedarpostv1.ApplyBundleResponse, error) {
	stream, err := s.Policies.ApplyBundle(ctx)
	if err != nil {
		return nil, err
	}
	// The reply has the errors of Send.
	_ = stream.Send(&cedarpostv1.ApplyBundleRequest{Part: &cedarpostv1.ApplyBundleRequest_Header{Header: header}})
	for _, f := range servertest.Files(pathsAndContents...) {
		_ = stream.Send(&cedarpostv1.ApplyBundleRequest{Part: &cedarpostv1.ApplyBundleRequest_File{File: &cedarpostv1.FilePart{Path: f.Path, Data: f.Content}}})
	}
	return stream.CloseAndReceive()
}

// A request that is sent again gets the answer of the first time, from every server, and nothing
// happens a second time. A new key needs another answer: nothing has its secret.
func TestRepeatedWrites(t *testing.T) {
	t.Parallel()
	a := docServer(t)
	b := servertest.On(t, a.URL)
	b.UseKey(a.Token)
	second := newCaller(t, a, "second", grant(access.Operator, "*"), grant(access.DataWriter, "*"), grant(access.PolicyPublisher, "*"))
	for i, c := range repeatables(t) {
		key := "key of " + c.name
		var wg sync.WaitGroup
		answers, errs := make([]proto.Message, 6), make([]error, 6)
		for n := range answers {
			wg.Go(func() { answers[n], errs[n] = c.call([]*servertest.Server{a, b}[n%2], key, false) })
			if c.name == "ImportEntities" { // a caller has few places for atomic imports
				wg.Wait()
			}
		}
		wg.Wait()
		before := revision(t, a)
		isKey := strings.HasSuffix(c.name, "Key") && c.name != "RevokeKey"
		made := 0
		for n, answer := range answers {
			switch {
			case errs[n] == nil && isKey:
				made++
			case isKey:
				servertest.WantCode(t, errs[n], connect.CodeAlreadyExists, "has made the key")
			case errs[n] != nil || !proto.Equal(answer, answers[0]):
				t.Errorf("%s: %v, %v; want %v", c.name, answer, errs[n], answers[0])
			}
		}
		if isKey && made != 1 {
			t.Errorf("%s: %d calls have a secret", c.name, made)
		}
		if _, err := c.call(a, key, true); connect.CodeOf(err) != connect.CodeAlreadyExists || !strings.Contains(err.Error(), "idempotency_key") {
			t.Errorf("%s with another request: %v", c.name, err)
		}
		// Another RPC is another request.
		_, err := accessOf(a, a.Token).DeleteGrant(t.Context(), &cedarpostv1.DeleteGrantRequest{Caller: "x", Role: access.Auditor, Bundle: "doc", IdempotencyKey: key})
		if c.name != "DeleteGrant" {
			servertest.WantCode(t, err, connect.CodeAlreadyExists, "idempotency_key")
		}
		if now := revision(t, a); now != before {
			t.Errorf("%s: revision %d, then %d", c.name, before, now)
		}
		// Another caller has keys of its own.
		if i == 0 {
			s := servertest.On(t, a.URL)
			s.UseKey(second)
			_, err := c.call(s, key, false)
			servertest.WantCode(t, err, connect.CodeFailedPrecondition, "must not exist")
		}
	}
	// The same key for what was published already, after another publish: the first answer again.
	again, err := applyOnce(t.Context(), a, &cedarpostv1.BundleHeader{Name: "doc", IdempotencyKey: "key of ApplyBundle"},
		"schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies+"// one")
	if err != nil || !again.Published || again.Bundle.Version != 2 || again.Bundle.PublishedBy == "" || again.Bundle.PublishedAt == nil {
		t.Errorf("%v, %v", again, err)
	}
	// A dry run has no key to use up, and a request that was refused has used none.
	for range 2 {
		dry, err := applyOnce(t.Context(), a, &cedarpostv1.BundleHeader{Name: "doc", DryRun: true, IdempotencyKey: "key of ApplyBundle"},
			"schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies)
		if err != nil || dry.Published {
			t.Errorf("%v, %v", dry, err)
		}
	}
	_, err = applyOnce(t.Context(), a, &cedarpostv1.BundleHeader{Name: "doc", IdempotencyKey: "refused"}, "schema.cedarschema", "nonsense")
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "")
	mended, err := applyOnce(t.Context(), a, &cedarpostv1.BundleHeader{Name: "doc", IdempotencyKey: "refused"},
		"schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies+"// mended")
	if err != nil || !mended.Published {
		t.Errorf("%v, %v", mended, err)
	}
}

// Imports that are not atomic have an import_id instead. Keys are bounded.
func TestIdempotencyKeysThatAreRefused(t *testing.T) {
	t.Parallel()
	s := docServer(t)
	op := accessOf(s, s.Token)
	for _, key := range []string{strings.Repeat("k", 129), "k\x00"} {
		_, err := op.DeleteGrant(t.Context(), &cedarpostv1.DeleteGrantRequest{Caller: "x", Role: access.Auditor, Bundle: "doc", IdempotencyKey: key})
		servertest.WantCode(t, err, connect.CodeInvalidArgument, "idempotency_key")
	}
	stream, err := s.Entities.ImportEntities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_ = stream.Send(&cedarpostv1.ImportEntitiesRequest{Options: &cedarpostv1.ImportOptions{IdempotencyKey: "k"}, Entities: []*cedarpostv1.Entity{servertest.DocUser(t, "ann")}})
	_, err = stream.CloseAndReceive()
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "import_id")
}
