package server_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/dynamicpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
)

// scope says what an RPC is about, and so which grants reach it.
type scope int

const (
	ofBundle  scope = iota // one bundle: its own, and not a foreign one
	ofService              // all bundles
	somewhere              // a grant for any bundle; the answer holds what the caller may see
)

// expected says of each RPC what it is about and which roles may do it. It is written by hand, apart
// from policies/admin and from the rules of the server.
var expected = map[string]struct {
	scope scope
	roles []string
}{
	"Authorize":           {ofBundle, []string{access.Enforcer}},
	"AuthorizeBatch":      {ofBundle, []string{access.Enforcer}},
	"GetRevision":         {somewhere, []string{access.Enforcer, access.DataWriter}},
	"Watch":               {somewhere, []string{access.Enforcer}},
	"ReportReuse":         {somewhere, []string{access.Enforcer}},
	"WriteEntities":       {ofBundle, []string{access.DataWriter}},
	"ImportEntities":      {ofBundle, []string{access.DataWriter}},
	"GetImport":           {somewhere, []string{access.DataWriter}},
	"GetEntity":           {ofBundle, []string{access.DataWriter, access.Auditor}},
	"ListEntities":        {ofBundle, []string{access.DataWriter, access.Auditor}},
	"QueryEntityChanges":  {ofBundle, []string{access.DataWriter, access.Auditor}},
	"ApplyBundle":         {ofBundle, []string{access.PolicyPublisher}},
	"ApplyBundle dry run": {ofBundle, []string{access.PolicyAuthor, access.PolicyPublisher}},
	"ListBundles":         {somewhere, []string{access.PolicyAuthor, access.PolicyApprover, access.PolicyPublisher, access.Auditor, access.Operator}},
	"GetBundle":           {ofBundle, []string{access.PolicyAuthor, access.PolicyApprover, access.PolicyPublisher, access.Auditor}},
	"ListVersions":        {ofBundle, []string{access.PolicyAuthor, access.PolicyApprover, access.PolicyPublisher, access.Auditor}},
	"GetVersion":          {ofBundle, []string{access.PolicyAuthor, access.PolicyApprover, access.PolicyPublisher, access.Auditor}},
	"DiffVersions":        {ofBundle, []string{access.PolicyAuthor, access.PolicyApprover, access.PolicyPublisher, access.Auditor}},
	"RollbackVersion":     {ofBundle, []string{access.PolicyPublisher}},
	"DeleteBundle":        {ofBundle, []string{access.PolicyPublisher}},
	"FreezeBundle":        {ofBundle, []string{access.PolicyPublisher}},
	"UnfreezeBundle":      {ofBundle, []string{access.PolicyPublisher}},
	"CreateChange":        {ofBundle, []string{access.PolicyAuthor}},
	"UpdateChange":        {ofBundle, []string{access.PolicyAuthor}},
	"GetChange":           {ofBundle, []string{access.PolicyAuthor, access.PolicyApprover, access.PolicyPublisher, access.Auditor}},
	"ListChanges":         {somewhere, []string{access.PolicyAuthor, access.PolicyApprover, access.PolicyPublisher, access.Auditor}},
	"CheckChange":         {ofBundle, []string{access.PolicyAuthor, access.PolicyApprover, access.PolicyPublisher}},
	"AnalyzeChange":       {ofBundle, []string{access.Auditor}}, // others need this role besides theirs
	"ShadowChange":        {ofBundle, []string{access.Auditor}}, // as AnalyzeChange
	"GetImpactReport":     {ofBundle, []string{access.PolicyAuthor, access.PolicyApprover, access.PolicyPublisher, access.Auditor}},
	"DiscardChange":       {ofBundle, []string{access.PolicyAuthor}},
	"PublishChange":       {ofBundle, []string{access.PolicyPublisher}},
	"ApproveChange":       {ofBundle, []string{access.PolicyApprover}},
	"DeclineChange":       {ofBundle, []string{access.PolicyApprover}},
	"ListPolicies":        {somewhere, []string{access.PolicyAuthor, access.PolicyApprover, access.PolicyPublisher, access.Auditor}},
	"GetPolicy":           {ofBundle, []string{access.PolicyAuthor, access.PolicyApprover, access.PolicyPublisher, access.Auditor}},
	"QueryDecisions":      {somewhere, []string{access.Auditor}},
	"CountDecisions":      {somewhere, []string{access.Auditor}},
	"GetDecision":         {somewhere, []string{access.Auditor}},
	"ReplayDecision":      {somewhere, []string{access.Auditor}},
	"ExportDecisions":     {ofService, []string{access.Auditor}},
	"QueryEvents":         {ofService, []string{access.Auditor}},
	"GetCheckpoint":       {ofService, []string{access.Auditor}},
	"GetInclusionProof":   {ofService, []string{access.Auditor}},
	"GetConsistencyProof": {ofService, []string{access.Auditor}},
	"WhoAmI":              {somewhere, append(access.Roles(), "none")},
	"CreateKey":           {somewhere, []string{access.Operator}},
	"RotateKey":           {somewhere, []string{access.Operator}},
	"RevokeKey":           {somewhere, []string{access.Operator}},
	"ListKeys":            {somewhere, []string{access.Operator}},
	"PutGrant":            {somewhere, []string{access.Operator}},
	"DeleteGrant":         {somewhere, []string{access.Operator}},
	"ListGrants":          {somewhere, []string{access.Operator, access.Auditor}},

	// They take the role break-glass, too, so no single role is enough.
	"ApplyBundle break-glass":   {ofBundle, nil},
	"PublishChange break-glass": {ofBundle, nil},
}

// message returns the first message of a call that is about the entities, the actions or the name of
// a bundle. Nothing else of it is valid: rights are checked before the request is validated.
func message(rpc, bundle string) proto.Message {
	ns := strings.ToUpper(bundle[:1]) + bundle[1:]
	user := &cedarpostv1.EntityUid{Type: ns + "::User", Id: "ann"}
	question := &cedarpostv1.AuthorizeRequest{Action: &cedarpostv1.EntityUid{Type: ns + "::Action", Id: "read"}}
	switch rpc {
	case "Authorize":
		return question
	case "AuthorizeBatch":
		return &cedarpostv1.AuthorizeBatchRequest{Checks: []*cedarpostv1.AuthorizeRequest{question}}
	case "WriteEntities":
		return &cedarpostv1.WriteEntitiesRequest{Operations: []*cedarpostv1.EntityOperation{{Operation: &cedarpostv1.EntityOperation_Delete{Delete: &cedarpostv1.DeleteEntity{Uid: user}}, Precondition: &cedarpostv1.Precondition{Condition: &cedarpostv1.Precondition_MustExist{MustExist: true}}}}}
	case "ImportEntities":
		return &cedarpostv1.ImportEntitiesRequest{Entities: []*cedarpostv1.Entity{{Uid: user}}}
	case "GetEntity":
		return &cedarpostv1.GetEntityRequest{Uid: user}
	case "ListEntities":
		return &cedarpostv1.ListEntitiesRequest{Type: user.Type, PageSize: -1}
	case "QueryEntityChanges":
		return &cedarpostv1.QueryEntityChangesRequest{Uid: user, PageSize: -1}
	case "ApplyBundle", "ApplyBundle dry run":
		return &cedarpostv1.ApplyBundleRequest{Part: &cedarpostv1.ApplyBundleRequest_Header{Header: &cedarpostv1.BundleHeader{Name: bundle, DryRun: rpc != "ApplyBundle"}}}
	case "ApplyBundle break-glass":
		return &cedarpostv1.ApplyBundleRequest{Part: &cedarpostv1.ApplyBundleRequest_Header{Header: &cedarpostv1.BundleHeader{Name: bundle, BreakGlass: new("")}}}
	case "PublishChange break-glass":
		return &cedarpostv1.PublishChangeRequest{Id: bundle + "-9", BreakGlass: new("")}
	case "GetBundle":
		return &cedarpostv1.GetBundleRequest{Name: bundle}
	case "CreateChange":
		return &cedarpostv1.CreateChangeRequest{Bundle: bundle}
	case "UpdateChange":
		return &cedarpostv1.UpdateChangeRequest{Id: bundle + "-9"}
	case "GetChange":
		return &cedarpostv1.GetChangeRequest{Id: bundle + "-9"}
	case "AnalyzeChange":
		return &cedarpostv1.AnalyzeChangeRequest{Candidate: &cedarpostv1.AnalyzeChangeRequest_Change{Change: bundle + "-9"}, Sample: 2}
	case "ShadowChange":
		return &cedarpostv1.ShadowChangeRequest{Id: bundle + "-9"}
	case "GetImpactReport":
		return &cedarpostv1.GetImpactReportRequest{Id: bundle + "-r9"}
	case "CheckChange":
		return &cedarpostv1.CheckChangeRequest{Id: bundle + "-9"}
	case "ApproveChange":
		return &cedarpostv1.ApproveChangeRequest{Id: bundle + "-9"}
	case "DeclineChange":
		return &cedarpostv1.DeclineChangeRequest{Id: bundle + "-9"}
	case "PublishChange":
		return &cedarpostv1.PublishChangeRequest{Id: bundle + "-9"}
	case "DiscardChange":
		return &cedarpostv1.DiscardChangeRequest{Id: bundle + "-9"}
	case "GetPolicy":
		return &cedarpostv1.GetPolicyRequest{Bundle: bundle}
	case "ListVersions":
		return &cedarpostv1.ListVersionsRequest{Bundle: bundle, PageSize: -1}
	case "GetVersion":
		return &cedarpostv1.GetVersionRequest{Bundle: bundle}
	case "DiffVersions":
		return &cedarpostv1.DiffVersionsRequest{Bundle: bundle}
	case "RollbackVersion":
		return &cedarpostv1.RollbackVersionRequest{Bundle: bundle}
	case "DeleteBundle":
		return &cedarpostv1.DeleteBundleRequest{Bundle: bundle, LeaveTypes: []string{""}}
	case "FreezeBundle":
		return &cedarpostv1.FreezeBundleRequest{Bundle: bundle, Reason: strings.Repeat("x", 5000)}
	case "UnfreezeBundle":
		return &cedarpostv1.UnfreezeBundleRequest{Bundle: bundle, Reason: strings.Repeat("x", 5000)}
	}
	return nil
}

// The matrix: each RPC of the contract, called by a caller of each role, for its own bundle and for a
// foreign one, with grants that hold, that have ended, and that are narrowed. `make access-matrix`
// prints it.
func TestAccessMatrix(t *testing.T) {
	t.Parallel() // it takes long
	s := servertest.New(t)
	for _, name := range []string{"doc", "other"} {
		ns := strings.ToUpper(name[:1]) + name[1:]
		s.MustApply(name, "schema.cedarschema", strings.ReplaceAll(servertest.DocSchema, "namespace Doc", "namespace "+ns), "policies.cedar", strings.ReplaceAll(servertest.DocPolicies, "Doc::", ns+"::"))
	}
	s.MustApply("flat", "schema.cedarschema", flatSchema, "policies.cedar", flatPolicies) // it has no namespace
	soon := time.Now().Add(time.Hour)
	var c store.AccessChange
	secrets := map[string]string{}
	caller := func(name string, grants ...store.Grant) {
		key, secret := access.NewKey(name, nil)
		c.Add = append(c.Add, key)
		for _, g := range grants {
			g.Caller = name
			c.Put = append(c.Put, g)
		}
		secrets[name] = secret
	}
	ended := time.Now().Add(time.Millisecond)
	roles := append(access.Roles(), "none")
	for _, role := range roles {
		if role == "none" {
			caller(role)
			continue
		}
		caller(role+".all", store.Grant{Role: role, Bundle: "*"})
		caller(role+".own", store.Grant{Role: role, Bundle: "doc", ExpiresAt: &soon})
		caller(role+".flat", store.Grant{Role: role, Bundle: "flat"})
		caller(role+".ended", store.Grant{Role: role, Bundle: "*", ExpiresAt: &ended}, store.Grant{Role: role, Bundle: "doc", ExpiresAt: &ended})
	}
	caller("enforcer.narrowed", store.Grant{Role: access.Enforcer, Bundle: "doc", Actions: []string{`Doc::Action::"write"`}})
	caller("data-writer.narrowed", store.Grant{Role: access.DataWriter, Bundle: "*", EntityTypes: []string{"Doc::Role"}})
	if _, err := s.DB.ChangeAccess(t.Context(), "test", func(context.Context, store.Access) (store.AccessChange, error) { return c, nil }); err != nil {
		t.Fatal(err)
	}
	servertest.Eventually(t, "the callers", func() bool {
		_, err := call(t, s, "AccessService", "WhoAmI", nil, secrets["none"])
		return err == nil && time.Now().After(ended)
	})

	var table strings.Builder
	seen := map[string]bool{}
	checks := 0
	try := func(service protoreflect.ServiceDescriptor, rpc, name, bundle string, want bool) bool {
		checks++
		_, err := call(t, s, string(service.Name()), rpc, message(rpc, bundle), secrets[name])
		may := connect.CodeOf(err) != connect.CodePermissionDenied
		if connect.CodeOf(err) == connect.CodeUnauthenticated || connect.CodeOf(err) == connect.CodeUnimplemented {
			t.Errorf("%s by %s: %v", rpc, name, err)
		}
		if may != want {
			t.Errorf("%s about %s by %s: %v, want permitted %v", rpc, bundle, name, err, want)
		}
		return may
	}
	protoregistry.GlobalFiles.RangeFiles(func(f protoreflect.FileDescriptor) bool {
		if f.Package() != "cedarpost.v1" {
			return true
		}
		for i := range f.Services().Len() {
			service := f.Services().Get(i)
			for j := range service.Methods().Len() {
				method := string(service.Methods().Get(j).Name())
				rpcs := []string{method}
				if method == "ApplyBundle" {
					rpcs = append(rpcs, method+" dry run")
				}
				if method == "ApplyBundle" || method == "PublishChange" {
					rpcs = append(rpcs, method+" break-glass")
				}
				for _, rpc := range rpcs {
					want, ok := expected[rpc]
					if !ok {
						t.Errorf("%s: nobody says which roles may do it", rpc)
						continue
					}
					seen[rpc] = true
					fmt.Fprintf(&table, "%-22s", rpc)
					for _, role := range roles {
						has := slices.Contains(want.roles, role)
						if role == "none" {
							cell := try(service, rpc, role, "doc", has)
							fmt.Fprintf(&table, " %-16s", mark(cell))
							continue
						}
						all := try(service, rpc, role+".all", "doc", has)
						own := try(service, rpc, role+".own", "doc", has && want.scope != ofService)
						foreign := try(service, rpc, role+".own", "other", has && want.scope == somewhere)
						try(service, rpc, role+".ended", "doc", rpc == "WhoAmI")
						try(service, rpc, role+".all", "other", has)
						fmt.Fprintf(&table, " %-16s", map[bool]string{true: "all", false: ""}[all]+map[bool]string{true: " own", false: ""}[own]+map[bool]string{true: " any", false: ""}[foreign])
					}
					table.WriteString("\n")
				}
			}
		}
		return true
	})
	for _, rpc := range slices.Sorted(maps.Keys(expected)) {
		if !seen[rpc] {
			t.Errorf("%s: the contract has no such RPC", rpc)
		}
	}
	for rpc, narrowed := range map[string]string{"Authorize": "enforcer.narrowed", "AuthorizeBatch": "enforcer.narrowed", "WriteEntities": "data-writer.narrowed", "ImportEntities": "data-writer.narrowed", "GetEntity": "data-writer.narrowed", "ListEntities": "data-writer.narrowed"} {
		if _, err := call(t, s, serviceOf(rpc), rpc, message(rpc, "doc"), secrets[narrowed]); connect.CodeOf(err) != connect.CodePermissionDenied {
			t.Errorf("%s by %s: %v", rpc, narrowed, err)
		}
		checks++
	}
	// About entities of all types: only by a grant for all bundles, and not by that of the bundle
	// without a namespace.
	for rpc, msg := range map[string]proto.Message{"ListEntities": &cedarpostv1.ListEntitiesRequest{PageSize: -1}, "QueryEntityChanges": &cedarpostv1.QueryEntityChangesRequest{PageSize: -1}} {
		for _, role := range expected[rpc].roles {
			for _, kind := range []string{".all", ".own", ".flat"} {
				_, err := call(t, s, "EntityService", rpc, msg, secrets[role+kind])
				if may, want := connect.CodeOf(err) != connect.CodePermissionDenied, kind == ".all"; may != want {
					t.Errorf("%s of all types by %s%s: %v, want permitted %v", rpc, role, kind, err, want)
				}
				checks++
			}
		}
	}
	t.Logf("%d calls", checks)
	if os.Getenv("CEDARPOST_ACCESS_MATRIX") != "" {
		head := fmt.Sprintf("%-22s", "")
		for _, role := range roles {
			head += fmt.Sprintf(" %-16s", role)
		}
		fmt.Printf("all: by a grant for all bundles; own: by one for the call's bundle; any: by one for another bundle, with an answer about that one\n%s\n%s", head, table.String())
	}
}

func mark(may bool) string { return map[bool]string{true: "yes", false: ""}[may] }

func serviceOf(rpc string) string {
	if strings.Contains(rpc, "Entit") {
		return "EntityService"
	}
	return "AuthorizationService"
}

// clients has one client for each key, because a server bounds its connections.
var clients sync.Map

func clientOf(s *servertest.Server, url, secret string) *connect.Client {
	type key struct{ url, secret string }
	if c, ok := clients.Load(key{url, secret}); ok {
		return c.(*connect.Client)
	}
	c, _ := clients.LoadOrStore(key{url, secret}, s.Client(url, secret))
	return c.(*connect.Client)
}

// call calls an RPC with a first message, which may be nil, and returns the first answer.
func call(t *testing.T, s *servertest.Server, service, rpc string, msg proto.Message, secret string) (proto.Message, error) {
	t.Helper()
	rpc, _, _ = strings.Cut(rpc, " ")
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName("cedarpost.v1." + service + "." + rpc))
	if err != nil {
		t.Fatal(err)
	}
	m := d.(protoreflect.MethodDescriptor)
	in, out := dynamicpb.NewMessage(m.Input()), dynamicpb.NewMessage(m.Output())
	if msg != nil {
		b, err := proto.Marshal(msg)
		if err == nil {
			err = proto.Unmarshal(b, in)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	url := s.Admin
	if service == "AuthorizationService" {
		url = s.API
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	client, spec := clientOf(s, url, secret), connect.Spec{Procedure: "/cedarpost.v1." + service + "/" + rpc, Schema: m}
	var stream connect.ClientStream
	switch {
	case m.IsStreamingClient():
		spec.StreamType = connect.StreamTypeClient
		if stream, err = client.CallClientStream(ctx, spec); err == nil {
			_ = stream.Send(in) // if the server refuses it, the error is that of the answer
			err = stream.CloseSend()
		}
	case m.IsStreamingServer():
		spec.StreamType = connect.StreamTypeServer
		stream, err = client.CallServerStream(ctx, spec, in)
	default:
		return out, client.CallUnary(ctx, spec, in, out)
	}
	if err == nil {
		err = stream.Receive(out)
	}
	if errors.Is(err, io.EOF) {
		err = nil // an answer without a message
	}
	return out, err
}
