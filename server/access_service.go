package server

import (
	"cmp"
	"context"
	"fmt"
	"path"
	"slices"
	"time"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/store"
)

// accessService manages API keys and grants.
type accessService struct {
	db       *store.DB
	gate     *gate
	recorder *decisionlog.Recorder
}

// applyBundle is the action that publishes a whole bundle.
const applyBundle = "ApplyBundle"

// changing are the actions whose targets say that the call changes what a bundle decides, or the rules
// for that: see [access.Target].
var changing = []string{applyBundle, "ApproveChange", "DeclineChange", deleteBundle, "FreezeBundle", "PublishChange", "RollbackVersion", "UnfreezeBundle"}

// WhoAmI implements cedarpost.v1.AccessService.
func (s *accessService) WhoAmI(ctx context.Context, _ *cedarpostv1.WhoAmIRequest) (*cedarpostv1.WhoAmIResponse, error) {
	c, r := access.CallerFrom(ctx), access.RightsFrom(ctx)
	out := &cedarpostv1.WhoAmIResponse{Caller: c.Name, Kind: string(c.Kind), KeyId: c.KeyID}
	if !c.Ends.IsZero() {
		out.ExpiresAt = timestamppb.New(c.Ends)
	}
	var bundles []string
	for _, g := range r.Grants() {
		out.Grants = append(out.Grants, grantToProto(g))
		if g.Bundle != access.AllBundles {
			bundles = append(bundles, g.Bundle)
		}
	}
	everywhere := r.Permitted(access.Target{})
	out.Permitted = []*cedarpostv1.PermittedActions{{Bundle: access.AllBundles, Actions: everywhere}}
	slices.Sort(bundles)
	for _, name := range slices.Compact(bundles) {
		actions := r.Permitted(access.Target{Bundle: name})
		actions = slices.DeleteFunc(actions, func(a string) bool {
			return slices.Contains(changing, a) || forWholeService(a) || slices.Contains(everywhere, a)
		})
		for _, a := range changing {
			if r.May(a, access.Target{Bundle: name, Changes: true}) {
				actions = append(actions, a)
			}
		}
		if len(actions) > 0 {
			out.Permitted = append(out.Permitted, &cedarpostv1.PermittedActions{Bundle: name, Actions: actions})
		}
	}
	return out, nil
}

// change commits a change of keys and grants, for a call of a procedure. fn gets the rights of the caller
// by what is stored now, and returns the change. It is refused if it would take the last operator away.
// answer makes the answer of the call, which is also stored for o if that is not nil.
func change[A proto.Message](ctx context.Context, s *accessService, procedure string, o *once, answer func(store.Changes, *cedarpostv1.Revision) A, fn func(store.Access, *access.Rights) (store.AccessChange, error)) (out A, err error) {
	v, err := s.gate.follower.Current()
	if err != nil {
		return out, err
	}
	decider, err := s.gate.deciderOf(v.Snapshot)
	if err != nil {
		return out, err
	}
	decided := false // fn returned a change
	made, err := s.db.ChangeAccess(ctx, callerFrom(ctx), func(_ context.Context, now store.Access) (store.AccessChange, error) {
		c := access.CallerFrom(ctx)
		live := c.IsLive(s.gate.credentials(), requestFrom(ctx).tls, time.Now())
		if c.Kind == access.APIKey { // by what is stored, which the snapshot may not have yet
			live = slices.ContainsFunc(now.Keys, func(k store.Key) bool { return k.ID == c.KeyID && k.Live(time.Now()) })
		}
		if !live {
			return store.AccessChange{}, errGone(c)
		}
		r := access.NewRights(c.Name, append(grantsOf(now, c.Name), c.Grants()...), decider, time.Now())
		change, err := fn(now, r)
		if err == nil {
			err = keepsOperator(now, change)
		}
		if err == nil {
			err = checkChange(procedure, r, now, change)
		}
		decided = err == nil
		change.Once = keep(o, func(made store.Changes) proto.Message { return answer(made, written(v, made.Revision, made.Mark)) })
		return change, err
	})
	if err != nil {
		if decided {
			err = connect.NewError(connect.CodeUnavailable, outcomeUnknown).WithCause(err)
		}
		return out, err
	}
	// It is committed. If this server is late to apply it, the change succeeded nevertheless.
	_, _ = s.gate.follower.AtLeast(ctx, made.Revision)
	return answer(made, written(v, made.Revision, made.Mark)), nil
}

func grantsOf(now store.Access, caller string) (list []store.Grant) {
	for _, g := range now.Grants {
		if g.Caller == caller {
			list = append(list, g)
		}
	}
	return list
}

func keysOf(now store.Access, caller string) (list []store.Key) {
	for _, k := range now.Keys {
		if k.Name == caller {
			list = append(list, k)
		}
	}
	return list
}

// keepsOperator refuses a change that takes the last operator away.
func keepsOperator(now store.Access, c store.AccessChange) error {
	after := store.Access{Keys: slices.Concat(now.Keys, c.Add), Grants: slices.Concat(now.Grants, c.Put)}
	after.Keys = slices.DeleteFunc(after.Keys, func(k store.Key) bool {
		return slices.ContainsFunc(c.Revoke, func(gone store.Key) bool { return gone.ID == k.ID })
	})
	for i, g := range after.Grants {
		replaced := i < len(now.Grants) && slices.ContainsFunc(c.Put, func(p store.Grant) bool { return p.Key() == g.Key() })
		if replaced || slices.Contains(c.Delete, g.Key()) {
			after.Grants[i].Role = "" // counts for nothing
		}
	}
	t := time.Now()
	switch left := access.OperatorsLeft(after.Keys, after.Grants, t); {
	case left >= access.OperatorsLeft(now.Keys, now.Grants, t):
		return nil
	case left == 1: // those that are left end by themselves
		return connect.NewError(connect.CodeFailedPrecondition, "this would take away, or give an end to, the last API key without an end that has the role operator for all bundles; make another one without an end first")
	default:
		return connect.NewError(connect.CodeFailedPrecondition, "this would take away the last API key with the role operator for all bundles; make another one first")
	}
}

// governs refuses an action on a caller that has the stored grants have and is to get the grants
// asked, if the operator does not govern the bundle of each: with a key of that caller it would get
// these rights. A caller without grants is managed by an operator of all bundles only: another one
// could make a key for it, and wait for its grants. The error names bundles of asked only, which are
// in the request.
func governs(r *access.Rights, action string, have, asked []store.Grant) error {
	procedure := "/" + cedarpostv1connect.AccessServiceName + "/" + action
	if len(have)+len(asked) == 0 && !r.May(action, access.Target{}) {
		return notItsOwn(r, procedure)
	}
	for _, g := range have {
		if !r.Governs(action, g.Bundle) {
			return notItsOwn(r, procedure)
		}
	}
	for _, g := range asked {
		if !r.Governs(action, g.Bundle) {
			t := access.Target{Bundle: g.Bundle}
			if g.Bundle == access.AllBundles {
				t = access.Target{}
			}
			return refusedRight(r, procedure, need{action, t})
		}
	}
	return nil
}

// notItsOwn returns the error of a call about a caller that an operator does not manage. Its text is the
// same whatever grants and keys the caller has, also if there is no such caller or key.
func notItsOwn(r *access.Rights, procedure string) error {
	e := refusedRight(r, procedure, need{action: path.Base(procedure)})
	if len(e.forbids) == 0 && !r.May("PutGrant", access.Target{}) {
		e.about = "a caller that is not its own (an operator of single bundles manages callers whose grants are all for these bundles)"
	}
	return e
}

// mayGive refuses to give a caller grants or a key unless the operator governs the grants that the
// caller has, too. Otherwise an operator of one bundle could put a grant on a caller of another one,
// whose operator would then not manage it any more. A caller with a live key and without grants is
// for operators of all bundles, and so are the names that the service itself gives callers. A caller that can have no API key, because it comes with a token or
// a certificate, is of no operator: there is no key to be taken over, and only the grants asked count.
func mayGive(r *access.Rights, action string, now store.Access, caller string, asked []store.Grant) error {
	have, keys := grantsOf(now, caller), keysOf(now, caller)
	live := slices.ContainsFunc(keys, func(k store.Key) bool { return k.Live(time.Now()) })
	switch {
	case access.IsReservedName(caller) && !r.May(action, access.Target{}):
		return refusedRight(r, "/"+cedarpostv1connect.AccessServiceName+"/"+action, need{action: action})
	case len(keys) == 0 && access.CheckCallerName(caller) != nil:
		have = nil
	case live && len(have) == 0 && !r.May(action, access.Target{}):
		return notItsOwn(r, "/"+cedarpostv1connect.AccessServiceName+"/"+action)
	}
	return governs(r, action, have, asked)
}

// readGrant reads a grant of a request.
func readGrant(ctx context.Context, g *cedarpostv1.Grant, caller string) (store.Grant, error) {
	out := store.Grant{
		Caller: cmp.Or(g.GetCaller(), caller), Role: g.GetRole(), Bundle: g.GetBundle(),
		Actions: canonicalActions(g.GetActions()), EntityTypes: g.GetEntityTypes(), GrantedBy: callerFrom(ctx), ChecksPerSecond: g.GetChecksPerSecond(),
	}
	if caller != "" && out.Caller != caller {
		return out, connect.Errorf(connect.CodeInvalidArgument, "grants: one is of caller %q, and the key of %q", out.Caller, caller)
	}
	var err error
	if out.ExpiresAt, err = readEnd(g.GetExpiresAt()); err != nil {
		return out, err
	}
	slices.Sort(out.Actions)
	slices.Sort(out.EntityTypes)
	if err := access.CheckGrant(out); err != nil {
		return out, connect.NewError(connect.CodeInvalidArgument, err.Error())
	}
	return out, nil
}

// readEnd reads when a key or a grant ends, to the microsecond, as Postgres stores it.
func readEnd(at *timestamppb.Timestamp) (*time.Time, error) {
	if at == nil {
		return nil, nil //nolint:nilnil // no end
	}
	if err := at.CheckValid(); err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, "expires_at: not a time")
	}
	t := at.AsTime().Truncate(time.Microsecond)
	if !t.After(time.Now()) {
		return nil, connect.NewError(connect.CodeInvalidArgument, "expires_at: it is in the past")
	}
	return &t, nil
}

// CreateKey implements cedarpost.v1.AccessService.
func (s *accessService) CreateKey(ctx context.Context, req *cedarpostv1.CreateKeyRequest) (*cedarpostv1.CreateKeyResponse, error) {
	if err := access.CheckCallerName(req.GetCaller()); err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err.Error())
	}
	end, err := readEnd(req.GetExpiresAt())
	if err != nil {
		return nil, err
	}
	var grants []store.Grant
	for _, g := range req.GetGrants() {
		grant, err := readGrant(ctx, g, req.GetCaller())
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(grants, func(o store.Grant) bool { return o.Key() == grant.Key() }) {
			return nil, connect.Errorf(connect.CodeInvalidArgument, "grants: role %s for bundle %s stands twice", grant.Role, grant.Bundle)
		}
		grants = append(grants, grant)
	}
	made, err := s.addKey(ctx, cedarpostv1connect.AccessServiceCreateKeyProcedure, req, end, grants)
	if err != nil {
		return nil, err
	}
	warnings := append(keyWarnings(made.had, grants, req.GetCaller()), grantWarnings(s.gate.follower.Latest(), access.RightsFrom(ctx), grants...)...)
	return &cedarpostv1.CreateKeyResponse{Key: keyToProto(made.key, nil), Secret: made.secret, Revision: made.revision, Warnings: warnings}, nil
}

// RotateKey implements cedarpost.v1.AccessService.
func (s *accessService) RotateKey(ctx context.Context, req *cedarpostv1.RotateKeyRequest) (*cedarpostv1.RotateKeyResponse, error) {
	end, err := readEnd(req.GetExpiresAt())
	if err != nil {
		return nil, err
	}
	made, err := s.addKey(ctx, cedarpostv1connect.AccessServiceRotateKeyProcedure, req, end, nil)
	if err != nil {
		return nil, err
	}
	out := &cedarpostv1.RotateKeyResponse{Key: keyToProto(made.key, nil), Secret: made.secret, Revision: made.revision}
	for _, k := range made.others {
		out.Others = append(out.Others, keyToProto(k, nil))
	}
	return out, nil
}

// addedKey is a new key of a caller. others are its live keys from before.
type addedKey struct {
	key      store.Key
	secret   string
	others   []store.Key
	had      []store.Grant // grants of the caller before
	revision *cedarpostv1.Revision
}

// addKey adds a key and grants to a caller.
func (s *accessService) addKey(ctx context.Context, procedure string, req interface {
	proto.Message
	GetCaller() string
	GetIdempotencyKey() string
}, end *time.Time, grants []store.Grant) (made addedKey, err error) {
	caller := req.GetCaller()
	made.key, made.secret = access.NewKey(caller, end)
	answer := func(done store.Changes, at *cedarpostv1.Revision) *cedarpostv1.Key {
		made.revision, made.key = at, done.Added[0]
		return keyToProto(made.key, nil)
	}
	first, err := writeOnce(ctx, s.db, procedure, req.GetIdempotencyKey(), req, &cedarpostv1.Key{}, func(o *once) (*cedarpostv1.Key, error) {
		return change(ctx, s, procedure, o, answer, func(now store.Access, r *access.Rights) (c store.AccessChange, err error) {
			if err := mayGive(r, path.Base(procedure), now, caller, grants); err != nil {
				return c, err
			}
			made.had = grantsOf(now, caller)
			made.others = slices.DeleteFunc(keysOf(now, caller), func(k store.Key) bool { return !k.Live(time.Now()) })
			rotates := procedure == cedarpostv1connect.AccessServiceRotateKeyProcedure
			switch others := made.others; {
			case !rotates && len(others) > 0:
				return c, connect.Errorf(connect.CodeAlreadyExists, "caller %q has a live key already, %s; RotateKey (cedarpost keys rotate) makes the one that replaces it", caller, others[0].ID)
			case rotates && len(others) == 0:
				return c, connect.Errorf(connect.CodeNotFound, "caller %q has no live key to be replaced; CreateKey (cedarpost keys create) makes another one", caller)
			case len(others) > 1: // the one in use, and the one that replaces it
				return c, connect.Errorf(connect.CodeAlreadyExists, "caller %q has two live keys, %s and %s; revoke the one that is not used any more", caller, others[0].ID, others[1].ID)
			}
			return store.AccessChange{Put: grants, Add: []store.Key{made.key}}, nil
		})
	})
	if err == nil && first.GetId() != made.key.ID {
		err = connect.Errorf(connect.CodeAlreadyExists, "an earlier call with this idempotency_key has made the key %s, and its secret is not stored; if you did not get it, revoke that key and make another one", first.GetId())
	}
	return made, err
}

// RevokeKey implements cedarpost.v1.AccessService.
func (s *accessService) RevokeKey(ctx context.Context, req *cedarpostv1.RevokeKeyRequest) (*cedarpostv1.RevokeKeyResponse, error) {
	if (req.GetCaller() == "") == (req.GetId() == "") {
		return nil, connect.NewError(connect.CodeInvalidArgument, "give either the caller, all of whose keys are revoked, or the id of one key")
	}
	var gone []store.Key
	answer := func(_ store.Changes, at *cedarpostv1.Revision) *cedarpostv1.RevokeKeyResponse {
		out := &cedarpostv1.RevokeKeyResponse{Revision: at}
		for _, k := range gone {
			out.Revoked = append(out.Revoked, keyToProto(k, nil))
		}
		return out
	}
	revoke := func(now store.Access, r *access.Rights) (c store.AccessChange, err error) {
		gone = slices.DeleteFunc(slices.Clone(now.Keys), func(k store.Key) bool {
			if req.GetId() != "" {
				return k.ID != req.GetId()
			}
			return k.Name != req.GetCaller()
		})
		caller := req.GetCaller()
		if len(gone) > 0 {
			caller = gone[0].Name
		}
		if err := governs(r, "RevokeKey", grantsOf(now, caller), nil); err != nil {
			return c, err
		}
		if len(gone) == 0 {
			if req.GetId() != "" {
				return c, connect.Errorf(connect.CodeNotFound, "there is no API key with the id %q, or it is revoked already", req.GetId())
			}
			return c, connect.Errorf(connect.CodeNotFound, "no caller %q has an API key; to revoke one key by its id, give the id (cedarpost keys revoke --id)", req.GetCaller())
		}
		return store.AccessChange{Revoke: gone}, nil
	}
	return writeOnce(ctx, s.db, cedarpostv1connect.AccessServiceRevokeKeyProcedure, req.GetIdempotencyKey(), req, &cedarpostv1.RevokeKeyResponse{},
		func(o *once) (*cedarpostv1.RevokeKeyResponse, error) {
			return change(ctx, s, cedarpostv1connect.AccessServiceRevokeKeyProcedure, o, answer, revoke)
		})
}

// ListKeys implements cedarpost.v1.AccessService.
func (s *accessService) ListKeys(ctx context.Context, req *cedarpostv1.ListKeysRequest) (*cedarpostv1.ListKeysResponse, error) {
	p, err := readPage[[2]string](&cedarpostv1.ListKeysRequest{Caller: req.GetCaller()}, req.GetPageToken())
	if err != nil {
		return nil, err
	}
	keys, err := s.db.Keys(ctx)
	if err != nil {
		return nil, err
	}
	uses, err := s.db.KeyUses(ctx)
	if err != nil {
		return nil, err
	}
	v, err := s.gate.follower.Current()
	if err != nil {
		return nil, err
	}
	r := access.RightsFrom(ctx)
	slices.SortFunc(keys, func(a, b store.Key) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID)) })
	out := &cedarpostv1.ListKeysResponse{}
	for _, k := range keys {
		at := [2]string{k.Name, k.ID}
		switch {
		case req.GetCaller() != "" && k.Name != req.GetCaller(), governs(r, "ListKeys", v.Grants(k.Name), nil) != nil,
			slices.Compare(at[:], p.End[:]) <= 0:
			continue
		case len(out.Keys) == pageSize(req.GetPageSize()):
			last := out.Keys[len(out.Keys)-1]
			out.NextPageToken = p.next([2]string{last.Caller, last.Id})
			return out, s.recordRead(ctx, cedarpostv1connect.AccessServiceListKeysProcedure, req, len(out.Keys))
		}
		out.Keys = append(out.Keys, keyToProto(k, uses))
	}
	return out, s.recordRead(ctx, cedarpostv1connect.AccessServiceListKeysProcedure, req, len(out.Keys))
}

// PutGrant implements cedarpost.v1.AccessService.
func (s *accessService) PutGrant(ctx context.Context, req *cedarpostv1.PutGrantRequest) (*cedarpostv1.PutGrantResponse, error) {
	grant, err := readGrant(ctx, req.GetGrant(), "")
	if err != nil {
		return nil, err
	}
	warnings := grantWarnings(s.gate.follower.Latest(), access.RightsFrom(ctx), grant) // once: a repeated call gets the same
	var replaced *cedarpostv1.Grant
	var unknown []string // a warning about the caller
	answer := func(made store.Changes, at *cedarpostv1.Revision) *cedarpostv1.PutGrantResponse {
		return &cedarpostv1.PutGrantResponse{Revision: at, Changed: made.Changed, Warnings: append(unknown, warnings...), Replaced: replaced}
	}
	put := func(now store.Access, r *access.Rights) (c store.AccessChange, err error) {
		if err := mayGive(r, "PutGrant", now, grant.Caller, []store.Grant{grant}); err != nil {
			return c, err
		}
		for _, g := range grantsOf(now, grant.Caller) {
			if same := g; g.Key() == grant.Key() { // who gave it is no difference
				same.GrantedBy, same.Since = grant.GrantedBy, 0
				if sameGrant(same, grant) {
					return c, nil
				}
				replaced = grantToProto(g)
			}
		}
		if access.CheckCallerName(grant.Caller) == nil && len(keysOf(now, grant.Caller))+len(grantsOf(now, grant.Caller)) == 0 {
			unknown = []string{fmt.Sprintf("the caller %s has no API key and had no grant until now; cedarpost keys create makes a key, if the name is right", grant.Caller)}
		}
		return store.AccessChange{Put: []store.Grant{grant}}, nil
	}
	return writeOnce(ctx, s.db, cedarpostv1connect.AccessServicePutGrantProcedure, req.GetIdempotencyKey(), req, &cedarpostv1.PutGrantResponse{},
		func(o *once) (*cedarpostv1.PutGrantResponse, error) {
			return change(ctx, s, cedarpostv1connect.AccessServicePutGrantProcedure, o, answer, put)
		})
}

func sameGrant(a, b store.Grant) bool {
	return a.Key() == b.Key() && a.ChecksPerSecond == b.ChecksPerSecond && slices.Equal(a.Actions, b.Actions) && slices.Equal(a.EntityTypes, b.EntityTypes) &&
		(a.ExpiresAt == nil) == (b.ExpiresAt == nil) && (a.ExpiresAt == nil || a.ExpiresAt.Equal(*b.ExpiresAt))
}

// DeleteGrant implements cedarpost.v1.AccessService.
func (s *accessService) DeleteGrant(ctx context.Context, req *cedarpostv1.DeleteGrantRequest) (*cedarpostv1.DeleteGrantResponse, error) {
	gone := store.GrantKey{Caller: req.GetCaller(), Role: req.GetRole(), Bundle: req.GetBundle()}
	answer := func(_ store.Changes, at *cedarpostv1.Revision) *cedarpostv1.DeleteGrantResponse {
		return &cedarpostv1.DeleteGrantResponse{Revision: at}
	}
	remove := func(now store.Access, r *access.Rights) (c store.AccessChange, err error) {
		if err := governs(r, "DeleteGrant", nil, []store.Grant{{Bundle: gone.Bundle}}); err != nil {
			return c, err
		}
		if !slices.ContainsFunc(now.Grants, func(g store.Grant) bool { return g.Key() == gone }) {
			return c, connect.Errorf(connect.CodeNotFound, "caller %q has no grant of the role %s for %s", gone.Caller, gone.Role, gone.Bundle)
		}
		return store.AccessChange{Delete: []store.GrantKey{gone}}, nil
	}
	return writeOnce(ctx, s.db, cedarpostv1connect.AccessServiceDeleteGrantProcedure, req.GetIdempotencyKey(), req, &cedarpostv1.DeleteGrantResponse{},
		func(o *once) (*cedarpostv1.DeleteGrantResponse, error) {
			return change(ctx, s, cedarpostv1connect.AccessServiceDeleteGrantProcedure, o, answer, remove)
		})
}

// ListGrants implements cedarpost.v1.AccessService.
func (s *accessService) ListGrants(ctx context.Context, req *cedarpostv1.ListGrantsRequest) (*cedarpostv1.ListGrantsResponse, error) {
	p, err := readPage[[3]string](&cedarpostv1.ListGrantsRequest{Caller: req.GetCaller()}, req.GetPageToken())
	if err != nil {
		return nil, err
	}
	v, err := s.gate.follower.FullyConsistent(ctx)
	if err != nil {
		return nil, err
	}
	r := access.RightsFrom(ctx)
	out := &cedarpostv1.ListGrantsResponse{}
	for _, g := range v.AllGrants() {
		at := [3]string{g.Caller, g.Role, g.Bundle}
		switch {
		case req.GetCaller() != "" && g.Caller != req.GetCaller(), !mayList(r, g), slices.Compare(at[:], p.End[:]) <= 0:
			continue
		case len(out.Grants) == pageSize(req.GetPageSize()):
			last := out.Grants[len(out.Grants)-1]
			out.NextPageToken = p.next([3]string{last.Caller, last.Role, last.Bundle})
			return out, s.recordRead(ctx, cedarpostv1connect.AccessServiceListGrantsProcedure, req, len(out.Grants))
		}
		out.Grants = append(out.Grants, grantToProto(g))
	}
	return out, s.recordRead(ctx, cedarpostv1connect.AccessServiceListGrantsProcedure, req, len(out.Grants))
}

// mayList reports whether a caller may see a grant.
func mayList(r *access.Rights, g store.Grant) bool {
	return r.May("ListGrants", access.GrantTarget(g.Bundle))
}

// recordRead records that keys or grants were read, before they are given out.
func (s *accessService) recordRead(ctx context.Context, procedure string, req proto.Message, rows int) error {
	return s.recorder.RecordLogRead(ctx, procedure, req, rows)
}

func grantToProto(g store.Grant) *cedarpostv1.Grant {
	out := &cedarpostv1.Grant{Caller: g.Caller, Role: g.Role, Bundle: g.Bundle, Actions: g.Actions, EntityTypes: g.EntityTypes, GrantedBy: g.GrantedBy, Revision: g.Since, ChecksPerSecond: g.ChecksPerSecond, Expired: !g.Live(time.Now())}
	if g.ExpiresAt != nil {
		out.ExpiresAt = timestamppb.New(*g.ExpiresAt)
	}
	return out
}

func keyToProto(k store.Key, uses map[string]time.Time) *cedarpostv1.Key {
	out := &cedarpostv1.Key{Id: k.ID, Caller: k.Name, CreatedAt: timestamppb.New(k.CreatedAt), Expired: !k.Live(time.Now())}
	if k.ExpiresAt != nil {
		out.ExpiresAt = timestamppb.New(*k.ExpiresAt)
	}
	if at, ok := uses[k.ID]; ok {
		out.LastUsedAt = timestamppb.New(at)
	}
	return out
}
