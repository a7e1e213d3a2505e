package server

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/cedar-policy/cedar-go"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/snapshot"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/server/wire"
	"github.com/cedarpost/cedarpost/store"
)

// gate knows who calls and what it may do.
type gate struct {
	follower     *snapshot.Follower
	tokens       *access.Tokens       // nil: none is accepted
	certificates *access.Certificates // nil: none is accepted
	uses         *keyUses

	mu      sync.Mutex
	decider *access.Decider
	local   int64 // the revision of admin-local that decider has; 0: none
}

// authenticate returns the caller of a request and its rights, at the newest snapshot. It is an
// error if the snapshot is too old to know them.
func (g *gate) authenticate(ctx context.Context, header http.Header, state *tls.ConnectionState) (c access.Caller, r *access.Rights, err error) {
	now := time.Now()
	c, err = access.Authenticate(ctx, header, state, g.credentials(), now)
	if err != nil {
		return access.Caller{}, nil, err
	}
	v, err := g.follower.Current()
	if err != nil {
		return access.Caller{}, nil, err
	}
	g.uses.note(c.KeyID, now)
	r, err = g.rights(v.Snapshot, c, now)
	return c, r, err
}

// credentials returns what callers are authenticated by now.
func (g *gate) credentials() access.Credentials {
	return access.Credentials{Tokens: g.tokens, Certificates: g.certificates, Keys: func() (access.Keys, error) {
		v, err := g.follower.Current()
		return v.Snapshot, err
	}}
}

// rights returns what a caller may do by the grants and policies of a snapshot.
func (g *gate) rights(s *snapshot.Snapshot, c access.Caller, now time.Time) (*access.Rights, error) {
	d, err := g.deciderOf(s)
	if err != nil {
		return nil, err
	}
	grants := s.Grants(c.Name) // of the snapshot, so not to be changed or copied for each call
	if more := c.Grants(); len(more) > 0 {
		grants = slices.Concat(grants, more)
	}
	return access.NewRights(c.Name, grants, d, now), nil
}

// deciderOf returns the decider with the admin-local of a snapshot.
func (g *gate) deciderOf(s *snapshot.Snapshot) (*access.Decider, error) {
	local, published := s.Bundle(engine.AdminLocal)
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.decider != nil && g.local == local.Since {
		return g.decider, nil
	}
	var source *engine.Source
	if published {
		src, err := stored.Source(local)
		if err != nil {
			return nil, err
		}
		source = &src
	}
	d, err := access.NewDecider(source)
	if err != nil {
		return nil, err
	}
	g.decider, g.local = d, local.Since
	return d, nil
}

// stillMay returns why the caller of a call that takes long may not go on with it, or nil. needs are
// the rights that its messages needed. Its handler answers by the rights of now afterwards. A server
// that has not heard from its database for long goes by what it knows.
func (g *gate) stillMay(ctx context.Context, procedure string, needs ...need) error {
	r, err := g.rightsNow(ctx, g.follower.Latest())
	if err == nil {
		requestFrom(ctx).rights.Set(r)
		err = mayBegin(r, procedure)
	}
	for _, n := range needs {
		if err == nil {
			err = check(r, procedure, n)
		}
	}
	return err
}

// rightsNow returns the rights that the caller of a call that takes long has by now. The error says
// why it is not authenticated any more.
func (g *gate) rightsNow(ctx context.Context, s *snapshot.Snapshot) (*access.Rights, error) {
	c, now := access.CallerFrom(ctx), time.Now()
	credentials := g.credentials()
	credentials.Keys = func() (access.Keys, error) { return s, nil }
	if !c.IsLive(credentials, requestFrom(ctx).tls, now) {
		return nil, errGone(c)
	}
	return g.rights(s, c, now)
}

// errGone is the error of a call whose caller is not authenticated any more.
func errGone(c access.Caller) error {
	if c.Kind == access.AccessToken {
		// Tokens end every few minutes. Clients call again with the next one, and go on.
		return connect.NewError(connect.CodeUnavailable, "the access token of this call has ended, or its issuer is not trusted any more; call again with a new one")
	}
	return errKeyGone
}

// need is one right that a call needs.
type need struct {
	action string
	target access.Target
}

// rule says which rights the calls of a procedure need.
type rule struct {
	// actions are those that a call can need. Without a right to any of them, on any bundle, the
	// call is refused before its message is read.
	actions []string
	// needs lists what a message needs; nil: the first action, on the service itself.
	needs func(*engine.Set, any) []need
	// narrowed says that the handler reduces its answer to what the caller may see. A right on any
	// bundle is enough.
	narrowed bool
}

// service, anywhere and each make rules.
func service(action string) rule  { return rule{actions: []string{action}} }
func anywhere(action string) rule { return rule{actions: []string{action}, narrowed: true} }
func each[M any](action string, targets func(*engine.Set, M) []access.Target) rule {
	return rule{actions: []string{action}, needs: func(set *engine.Set, msg any) []need {
		m, ok := msg.(M)
		if !ok {
			return []need{{action: action}} // never: the rule is of another message; needs the whole service
		}
		var list []need
		for _, t := range targets(set, m) {
			list = append(list, need{action, t})
		}
		return list
	}}
}

// ofBundle makes the rule of a call about one bundle, which it names. changes says that the call changes
// what the bundle decides, or the rules for that.
func ofBundle[M interface{ GetBundle() string }](action string, changes bool) rule {
	return each(action, func(_ *engine.Set, m M) []access.Target {
		return []access.Target{{Bundle: m.GetBundle(), Changes: changes}}
	})
}

// ofChange makes the rule of a call about one change of a bundle. The id of the change names the bundle.
func ofChange[M interface{ GetId() string }](action string, changes bool) rule {
	return each(action, func(_ *engine.Set, m M) []access.Target {
		return []access.Target{{Bundle: bundleOfChange(m.GetId()), Changes: changes}}
	})
}

// publishChangeRule is the rule of PublishChange.
var publishChangeRule = rule{actions: []string{"PublishChange"}, needs: func(_ *engine.Set, msg any) []need {
	m, ok := msg.(*cedarpostv1.PublishChangeRequest)
	if !ok {
		return []need{{action: "PublishChange"}}
	}
	return withBreakGlass(need{"PublishChange", access.Target{Bundle: bundleOfChange(m.GetId()), Changes: true}}, m.BreakGlass)
}}

// withBreakGlass adds to the right to publish that to go past rules, if the caller asks for it.
func withBreakGlass(publish need, reason *string) []need {
	if reason == nil {
		return []need{publish}
	}
	return []need{publish, {breakGlass, publish.target}}
}

// bundleOfChange returns the bundle of the change with an id; "" if it is not the id of a change.
func bundleOfChange(id string) string {
	return id[:max(strings.LastIndexByte(id, '-'), 0)]
}

// listGrants is the right that a read of entities needs if they are grants.
const listGrants = "ListGrants"

// entityRead makes the rule of a call that reads entities. Grants are entities of the type
// [store.GrantType]. They belong to no bundle that a role is for, so a caller who may list all grants
// may read these entities, and nobody else.
func entityRead[M any](action string, targets func(*engine.Set, M) []access.Target) rule {
	r := each(action, targets)
	needs := r.needs
	r.actions = append(r.actions, listGrants)
	r.needs = func(set *engine.Set, msg any) []need {
		list := needs(set, msg)
		for i, n := range list {
			if n.target.EntityType == store.GrantType {
				list[i] = need{listGrants, access.Target{EntityType: store.GrantType}}
			}
		}
		return list
	}
	return r
}

// forWholeService reports whether calls that need an action are about all bundles, so that a grant for one
// bundle never permits them.
func forWholeService(action string) bool {
	for _, rule := range rules {
		if slices.Contains(rule.actions, action) {
			return rule.needs == nil && !rule.narrowed
		}
	}
	return false
}

// rules has the rule of each procedure. A procedure without one is refused.
var rules = map[string]rule{
	cedarpostv1connect.AuthorizationServiceAuthorizeProcedure: each("Authorize", func(set *engine.Set, m *cedarpostv1.AuthorizeRequest) []access.Target {
		return addQuestion(nil, set, m)
	}),
	cedarpostv1connect.AuthorizationServiceAuthorizeBatchProcedure: each("AuthorizeBatch", func(set *engine.Set, m *cedarpostv1.AuthorizeBatchRequest) (list []access.Target) {
		for _, check := range m.GetChecks() {
			list = addQuestion(list, set, check)
		}
		return list
	}),
	cedarpostv1connect.AuthorizationServiceGetRevisionProcedure: anywhere("GetRevision"),
	cedarpostv1connect.AuthorizationServiceWatchProcedure:       anywhere("Watch"), // its tags are hashes
	cedarpostv1connect.AuthorizationServiceReportReuseProcedure: anywhere("ReportReuse"),

	cedarpostv1connect.EntityServiceWriteEntitiesProcedure: each("WriteEntities", func(set *engine.Set, m *cedarpostv1.WriteEntitiesRequest) (list []access.Target) {
		for _, op := range m.GetOperations() {
			if op.GetOperation() != nil { // its validation fails: it changes nothing
				list = addType(list, set, typeOf(op))
			}
		}
		return list
	}),
	cedarpostv1connect.EntityServiceImportEntitiesProcedure: each("ImportEntities", func(set *engine.Set, m *cedarpostv1.ImportEntitiesRequest) (list []access.Target) {
		for _, e := range m.GetEntities() {
			list = addType(list, set, e.GetUid().GetType())
		}
		return list
	}),
	cedarpostv1connect.EntityServiceGetImportProcedure: anywhere("GetImport"),
	cedarpostv1connect.EntityServiceGetEntityProcedure: entityRead("GetEntity", func(set *engine.Set, m *cedarpostv1.GetEntityRequest) []access.Target {
		return addType(nil, set, m.GetUid().GetType())
	}),
	cedarpostv1connect.EntityServiceListEntitiesProcedure: entityRead("ListEntities", func(set *engine.Set, m *cedarpostv1.ListEntitiesRequest) []access.Target {
		list := addType(nil, set, m.GetType())
		// The answer says which entities are below the ancestor, and so how groups of its bundle nest.
		if typ := m.GetAncestor().GetType(); typ != "" && list[0].Bundle != owner(set, cedar.EntityType(typ)) {
			list = addType(list, set, typ)
		}
		return list
	}),
	cedarpostv1connect.EntityServiceQueryEntityChangesProcedure: entityRead("QueryEntityChanges", func(set *engine.Set, m *cedarpostv1.QueryEntityChangesRequest) []access.Target {
		list := addType(nil, set, cmp.Or(m.GetUid().GetType(), m.GetType()))
		if m.GetUid() != nil && m.GetType() != "" {
			list = addType(list, set, m.GetType())
		}
		return list
	}),

	cedarpostv1connect.PolicyServiceApplyBundleProcedure: {actions: []string{"ApplyBundle", "CheckBundle"}, needs: func(_ *engine.Set, msg any) []need {
		m, ok := msg.(*cedarpostv1.ApplyBundleRequest)
		switch h := m.GetHeader(); {
		case !ok:
			return []need{{action: "ApplyBundle"}}
		case h == nil: // a file of an upload, whose header came before; without one the handler refuses it
			return nil
		case h.GetDryRun():
			return []need{{"CheckBundle", access.Target{Bundle: h.GetName()}}}
		default:
			return withBreakGlass(need{"ApplyBundle", access.Target{Bundle: h.GetName(), Changes: true}}, h.BreakGlass)
		}
	}},
	cedarpostv1connect.PolicyServiceListBundlesProcedure: anywhere("ListBundles"),
	cedarpostv1connect.PolicyServiceGetBundleProcedure: each("GetBundle", func(_ *engine.Set, m *cedarpostv1.GetBundleRequest) []access.Target {
		return []access.Target{{Bundle: m.GetName()}}
	}),
	cedarpostv1connect.PolicyServiceListPoliciesProcedure:    anywhere("ListPolicies"),
	cedarpostv1connect.PolicyServiceGetPolicyProcedure:       ofBundle[*cedarpostv1.GetPolicyRequest]("GetPolicy", false),
	cedarpostv1connect.PolicyServiceListVersionsProcedure:    ofBundle[*cedarpostv1.ListVersionsRequest]("ListVersions", false),
	cedarpostv1connect.PolicyServiceGetVersionProcedure:      ofBundle[*cedarpostv1.GetVersionRequest]("GetVersion", false),
	cedarpostv1connect.PolicyServiceDiffVersionsProcedure:    ofBundle[*cedarpostv1.DiffVersionsRequest]("DiffVersions", false),
	cedarpostv1connect.PolicyServiceRollbackVersionProcedure: ofBundle[*cedarpostv1.RollbackVersionRequest]("RollbackVersion", true),
	cedarpostv1connect.PolicyServiceDeleteBundleProcedure:    ofBundle[*cedarpostv1.DeleteBundleRequest](deleteBundle, true),
	cedarpostv1connect.PolicyServiceFreezeBundleProcedure:    ofBundle[*cedarpostv1.FreezeBundleRequest]("FreezeBundle", true),
	cedarpostv1connect.PolicyServiceUnfreezeBundleProcedure:  ofBundle[*cedarpostv1.UnfreezeBundleRequest]("UnfreezeBundle", true),

	cedarpostv1connect.PolicyServiceCreateChangeProcedure: ofBundle[*cedarpostv1.CreateChangeRequest]("CreateChange", false),
	cedarpostv1connect.PolicyServiceUpdateChangeProcedure: ofChange[*cedarpostv1.UpdateChangeRequest]("UpdateChange", false),
	cedarpostv1connect.PolicyServiceGetChangeProcedure:    ofChange[*cedarpostv1.GetChangeRequest]("GetChange", false),
	cedarpostv1connect.PolicyServiceListChangesProcedure:  anywhere("ListChanges"),
	cedarpostv1connect.PolicyServiceCheckChangeProcedure:  ofChange[*cedarpostv1.CheckChangeRequest]("CheckChange", false),
	// The policies of a change can be made to find out what decisions depended on.
	cedarpostv1connect.PolicyServiceAnalyzeChangeProcedure: {actions: []string{"AnalyzeChange"}, needs: func(_ *engine.Set, msg any) []need {
		m, _ := msg.(*cedarpostv1.AnalyzeChangeRequest)
		name := m.GetEdits().GetBundle() + bundleOfChange(m.GetChange()+m.GetReport()) // one of the three is given
		return []need{{"AnalyzeChange", access.Target{Bundle: name}}, {readDecisions, decisionsOf(name)}}
	}},
	cedarpostv1connect.PolicyServiceShadowChangeProcedure: {actions: []string{"ShadowChange"}, needs: func(_ *engine.Set, msg any) []need {
		m, _ := msg.(*cedarpostv1.ShadowChangeRequest)
		name := bundleOfChange(m.GetId())
		return []need{{"ShadowChange", access.Target{Bundle: name}}, {readDecisions, decisionsOf(name)}}
	}},
	cedarpostv1connect.PolicyServiceGetImpactReportProcedure: ofChange[*cedarpostv1.GetImpactReportRequest]("GetImpactReport", false),
	cedarpostv1connect.PolicyServiceApproveChangeProcedure:   ofChange[*cedarpostv1.ApproveChangeRequest]("ApproveChange", true),
	cedarpostv1connect.PolicyServiceDeclineChangeProcedure:   ofChange[*cedarpostv1.DeclineChangeRequest]("DeclineChange", true),
	cedarpostv1connect.PolicyServicePublishChangeProcedure:   publishChangeRule,
	cedarpostv1connect.PolicyServiceDiscardChangeProcedure:   ofChange[*cedarpostv1.DiscardChangeRequest]("DiscardChange", false),

	cedarpostv1connect.AuditServiceQueryDecisionsProcedure: anywhere("QueryDecisions"),
	cedarpostv1connect.AuditServiceCountDecisionsProcedure: anywhere("CountDecisions"),
	cedarpostv1connect.AuditServiceGetDecisionProcedure:    anywhere("GetDecision"),
	cedarpostv1connect.AuditServiceReplayDecisionProcedure: anywhere("ReplayDecision"),
	// The log as a whole is about all bundles.
	cedarpostv1connect.AuditServiceExportDecisionsProcedure:     service("ExportDecisions"),
	cedarpostv1connect.AuditServiceQueryEventsProcedure:         service("QueryEvents"),
	cedarpostv1connect.AuditServiceGetCheckpointProcedure:       service("GetCheckpoint"),
	cedarpostv1connect.AuditServiceGetInclusionProofProcedure:   service("GetInclusionProof"),
	cedarpostv1connect.AuditServiceGetConsistencyProofProcedure: service("GetConsistencyProof"),

	cedarpostv1connect.AccessServiceWhoAmIProcedure: service("WhoAmI"),
	// The handlers decide about keys and grants on what is stored when they commit.
	cedarpostv1connect.AccessServiceCreateKeyProcedure:   anywhere("CreateKey"),
	cedarpostv1connect.AccessServiceRotateKeyProcedure:   anywhere("RotateKey"),
	cedarpostv1connect.AccessServiceRevokeKeyProcedure:   anywhere("RevokeKey"),
	cedarpostv1connect.AccessServiceListKeysProcedure:    anywhere("ListKeys"),
	cedarpostv1connect.AccessServicePutGrantProcedure:    anywhere("PutGrant"),
	cedarpostv1connect.AccessServiceDeleteGrantProcedure: anywhere("DeleteGrant"),
	cedarpostv1connect.AccessServiceListGrantsProcedure:  anywhere("ListGrants"),
}

// addQuestion adds what a question is about. An action of no bundle needs a right to all. A question
// without an action needs none, because its validation fails: the caller learns that, if it may ask
// anything at all.
func addQuestion(list []access.Target, set *engine.Set, m *cedarpostv1.AuthorizeRequest) []access.Target {
	if m.GetAction().GetType() == "" {
		return list
	}
	uid := wire.UID(m.GetAction())
	t := access.Target{Bundle: owner(set, uid.Type), Action: uid}
	if slices.Contains(list, t) {
		return list
	}
	return append(list, t)
}

// owner returns the bundle that a type of entities or actions belongs to, or "".
func owner(set *engine.Set, typ cedar.EntityType) string {
	if store.IsOwnType(string(typ)) {
		return engine.Admin
	}
	return set.Owner(typ)
}

// addType adds what the entities of a type are about. Without a type, or for one of no bundle, a
// right to all is needed.
func addType(list []access.Target, set *engine.Set, typ string) []access.Target {
	t := access.Target{EntityType: access.AllTypes}
	if typ != "" { // the namespace of "" would be the empty one, which a bundle can own
		t = access.Target{Bundle: owner(set, cedar.EntityType(typ)), EntityType: typ}
	}
	if slices.Contains(list, t) {
		return list
	}
	return append(list, t)
}

// typeOf returns the type of the entity that an operation changes.
func typeOf(op *cedarpostv1.EntityOperation) string {
	switch o := op.GetOperation().(type) {
	case *cedarpostv1.EntityOperation_Put:
		return o.Put.GetUid().GetType()
	case *cedarpostv1.EntityOperation_Delete:
		return o.Delete.GetUid().GetType()
	case *cedarpostv1.EntityOperation_AddParents:
		return o.AddParents.GetUid().GetType()
	case *cedarpostv1.EntityOperation_RemoveParents:
		return o.RemoveParents.GetUid().GetType()
	case *cedarpostv1.EntityOperation_SetAttributes:
		return o.SetAttributes.GetUid().GetType()
	}
	return "" // validation refuses it; it needs a right to all
}

// isReflection reports whether a procedure only describes the contract.
func isReflection(procedure string) bool { return strings.HasPrefix(procedure, "/grpc.reflection.") }

// mayBegin refuses a call, before its message is read, if no message could make it permitted.
func mayBegin(r *access.Rights, procedure string) error {
	if isReflection(procedure) {
		return nil
	}
	rule, ok := rules[procedure]
	if !ok {
		return refusedRight(r, procedure, need{})
	}
	if rule.needs == nil && !rule.narrowed {
		return check(r, procedure, need{action: rule.actions[0]})
	}
	if !slices.ContainsFunc(rule.actions, r.MaySomewhere) {
		return refusedAnywhere(r, procedure, rule.actions...)
	}
	return nil
}

func check(r *access.Rights, procedure string, n need) error {
	if r.MayAll(n.action, n.target) {
		return nil
	}
	return refusedRight(r, procedure, n)
}

// refusedError is the error of a call to which the caller has no right.
type refusedError struct {
	procedure, about string
	forbids          []string // policies of admin-local without which it would be permitted
	glass            bool     // it is about break-glass, and not about the call itself
}

// reason returns what the call was about, and the policies that forbid it, for the log.
func (e *refusedError) reason() string {
	if len(e.forbids) > 0 {
		return e.about + ": forbidden by policy " + strings.Join(e.forbids, ", ")
	}
	return e.about
}

// Error returns the text for the caller. It names what the caller sent, and of what is stored only the
// policies of admin-local that take a right away which the roles of the caller give.
func (e *refusedError) Error() string {
	if e.glass && len(e.forbids) == 0 {
		return fmt.Sprintf("this caller has no right to break-glass for %s, which takes the role break-glass besides the right to %s; `cedarpost whoami` lists its rights, and an operator can grant others", e.about, path.Base(e.procedure))
	}
	if len(e.forbids) > 0 {
		return fmt.Sprintf("this caller has no right to %s for %s", path.Base(e.procedure), e.reason())
	}
	return fmt.Sprintf("this caller has no right to %s for %s; `cedarpost whoami` lists its rights, and an operator can grant others", path.Base(e.procedure), e.about)
}

// refusedAnywhere returns the error of a call that needs a right to one of some actions.
func refusedAnywhere(r *access.Rights, procedure string, actions ...string) error {
	e := &refusedError{procedure: procedure, about: "any bundle"}
	for _, action := range actions {
		for _, name := range r.ForbiddenSomewhere(action) {
			if !slices.Contains(e.forbids, name) {
				e.forbids = append(e.forbids, name)
			}
		}
	}
	return e
}

func refusedRight(r *access.Rights, procedure string, n need) *refusedError {
	about, t := "the service", n.target
	switch {
	case t.Action != (cedar.EntityUID{}):
		about = t.Action.String()
	case t.EntityType == access.AllTypes:
		about = "entities of all types"
	case t.EntityType != "":
		about = "entities of type " + t.EntityType
	case t.Bundle != "":
		about = "the bundle " + t.Bundle
	}
	if t.Bundle == engine.Admin && t.EntityType == "" {
		about += ", which is built in: no role is for it, and admin-local is for rules of your own"
	}
	if n.action == readDecisions && procedure != cedarpostv1connect.AuditServiceQueryDecisionsProcedure {
		about += ", because it has no right to read the decisions (QueryDecisions)"
	}
	return &refusedError{procedure: procedure, about: about, forbids: r.Forbidden(n.action, t), glass: n.action == breakGlass}
}

// rights is the interceptor that refuses messages to which the caller has no right, before they are
// validated.
func (e *edge) rights(next connect.ServerFunc) connect.ServerFunc {
	return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) error {
		if rule, ok := rules[spec.Procedure]; ok {
			stream = &rightsStream{ServerStream: stream, ctx: ctx, gate: e.gate, procedure: spec.Procedure, rule: rule}
		}
		return next(ctx, spec, stream)
	}
}

// atOnce is how long after its admission the rights of a call count, unless the snapshot changes. Keys
// and grants also end by time.
const atOnce = 100 * time.Millisecond

// rightsStream checks each message, and the end of an upload. A caller can send a message slowly, and
// its key or its grant can end meanwhile.
type rightsStream struct {
	connect.ServerStream
	ctx       context.Context //nolint:containedctx // of the call
	gate      *gate
	procedure string
	rule      rule
	needs     []need // of the messages so far
}

func (s *rightsStream) Receive(msg any) error {
	received := s.ServerStream.Receive(msg)
	if received != nil && !errors.Is(received, io.EOF) {
		return received
	}
	now := s.gate.follower.Latest()
	var needs []need // of this message, and new
	if received == nil && s.rule.needs != nil {
		for _, n := range s.rule.needs(now.Set, msg) {
			if !slices.Contains(s.needs, n) {
				needs = append(needs, n)
			}
		}
		s.needs = append(s.needs, needs...)
	}
	r := requestFrom(s.ctx)
	admitted := r.snapshot
	r.snapshot = nil // a call that takes long must not hold an old snapshot in memory
	if admitted != now || time.Since(r.admitted) > atOnce {
		if err := s.gate.stillMay(s.ctx, s.procedure, s.needs...); err != nil {
			return err
		}
		return received
	}
	rights := access.RightsFrom(s.ctx)
	for _, n := range needs {
		if err := check(rights, s.procedure, n); err != nil {
			return err
		}
	}
	return received
}

// bundlesFor lists the bundles on which the caller may do an action; all is true if these are all
// bundles, also unknown ones.
func bundlesFor(ctx context.Context, s *snapshot.Snapshot, action string) (names []string, all bool) {
	r := access.RightsFrom(ctx)
	if r.MayEverywhere(action) {
		return nil, true
	}
	for _, b := range s.Bundles {
		if r.May(action, access.Target{Bundle: b.Name}) {
			names = append(names, b.Name)
		}
	}
	return names, false
}

// actionTypesFor lists the types of the actions whose decisions the caller may read; all is true if
// these are all.
func (g *gate) actionTypesFor(ctx context.Context, action string) (types []string, all bool) {
	s := g.follower.Latest()
	names, all := bundlesFor(ctx, s, action)
	for _, name := range names {
		if name == engine.AdminLocal {
			continue
		}
		types = append(types, actionTypesOf(s.Set, name)...)
	}
	return types, all
}

// actionTypesOf returns the types of the actions of a bundle.
func actionTypesOf(set *engine.Set, name string) (types []string) {
	for _, ns := range set.Namespaces(name) {
		if ns != "" {
			ns += "::"
		}
		types = append(types, ns+"Action")
	}
	return types
}
