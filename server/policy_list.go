package server

import (
	"context"
	"errors"
	"slices"
	"strings"

	"connectrpc.com/connect/v2"
	"github.com/cedar-policy/cedar-go"
	xast "github.com/cedar-policy/cedar-go/x/exp/ast"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/snapshot"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/server/wire"
	"github.com/cedarpost/cedarpost/store"
)

// concerned is what a scope is compared with: an entity, and the groups that it is or can be in.
type concerned struct {
	uid    cedar.EntityUID
	within func(group cedar.EntityUID) bool
}

// by reports whether the scope of a variable can hold for an entity. A nil entity is any.
func (c *concerned) by(scope any) bool {
	if c == nil {
		return true
	}
	in := func(uid cedar.EntityUID) bool { return uid == c.uid || c.within(uid) }
	switch s := scope.(type) {
	case xast.ScopeTypeEq:
		return s.Entity == c.uid
	case xast.ScopeTypeIn:
		return in(s.Entity)
	case xast.ScopeTypeInSet:
		return slices.ContainsFunc(s.Entities, in)
	case xast.ScopeTypeIs:
		return s.Type == c.uid.Type
	case xast.ScopeTypeIsIn:
		return s.Type == c.uid.Type && in(s.Entity)
	}
	return true
}

// scopeText returns the scope of a variable as Cedar text.
func scopeText(variable string, scope any) string {
	switch s := scope.(type) {
	case xast.ScopeTypeEq:
		return variable + " == " + s.Entity.String()
	case xast.ScopeTypeIn:
		return variable + " in " + s.Entity.String()
	case xast.ScopeTypeInSet:
		names := make([]string, len(s.Entities))
		for i, e := range s.Entities {
			names[i] = e.String()
		}
		return variable + " in [" + strings.Join(names, ", ") + "]"
	case xast.ScopeTypeIs:
		return variable + " is " + string(s.Type)
	case xast.ScopeTypeIsIn:
		return variable + " is " + string(s.Type) + " in " + s.Entity.String()
	}
	return variable
}

// parsePolicy returns the syntax tree of a policy of a published bundle. It is nil for one that does not
// parse, because another version of the service published it.
func parsePolicy(v snapshot.View, p store.Policy) *xast.Policy {
	if tree := v.Set.PolicyTree(p.Bundle, p.Text); tree != nil {
		return tree
	}
	var one cedar.Policy // of admin-local, which is not in the set
	if one.UnmarshalCedar([]byte(p.Text)) != nil {
		return nil
	}
	return (*xast.Policy)(one.AST())
}

// policyToProto converts a policy of a published bundle. A nil parsed leaves all but the text out.
func policyToProto(p store.Policy, parsed *xast.Policy) *cedarpostv1.Policy {
	out := &cedarpostv1.Policy{Bundle: p.Bundle, Id: p.ID, File: p.File, Line: int32(p.Line), Text: p.Text, Revision: p.Since}
	if parsed == nil {
		return out
	}
	out.Effect, out.Conditional = "forbid", len(parsed.Conditions) > 0
	if parsed.Effect == xast.EffectPermit {
		out.Effect = "permit"
	}
	out.Principal, out.Action, out.Resource = scopeText("principal", parsed.Principal), scopeText("action", parsed.Action), scopeText("resource", parsed.Resource)
	out.Annotations = make(map[string]string, len(parsed.Annotations))
	for _, a := range parsed.Annotations {
		out.Annotations[string(a.Key)] = string(a.Value)
	}
	return out
}

// GetPolicy implements cedarpost.v1.PolicyService.
func (s *policyService) GetPolicy(ctx context.Context, req *cedarpostv1.GetPolicyRequest) (*cedarpostv1.GetPolicyResponse, error) {
	v, err := s.follower.Current()
	if err != nil {
		return nil, err
	}
	b, ok := v.Bundle(req.GetBundle())
	if !ok {
		return nil, noBundle(req.GetBundle())
	}
	i, ok := slices.BinarySearchFunc(b.Policies, req.GetId(), func(p store.Policy, id string) int { return strings.Compare(p.ID, id) })
	if !ok {
		return nil, connect.Errorf(connect.CodeNotFound, "the bundle %s has no policy %q", b.Name, req.GetId())
	}
	found := policyToProto(b.Policies[i], parsePolicy(v, b.Policies[i]))
	if err := s.addUses(ctx, []*cedarpostv1.Policy{found}); err != nil {
		return nil, err
	}
	return &cedarpostv1.GetPolicyResponse{Policy: found}, nil
}

// ListPolicies implements cedarpost.v1.PolicyService.
func (s *policyService) ListPolicies(ctx context.Context, req *cedarpostv1.ListPoliciesRequest) (*cedarpostv1.ListPoliciesResponse, error) {
	if req.AnnotationValue != nil && req.GetAnnotation() == "" {
		return nil, connect.NewError(connect.CodeInvalidArgument, "annotation_value: name the annotation, too")
	}
	if t := req.GetUnusedSince(); t != nil && t.CheckValid() != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, "unused_since: not a time")
	}
	filters := &cedarpostv1.ListPoliciesRequest{
		Bundle: req.GetBundle(), Effect: req.GetEffect(), Action: req.GetAction(), Principal: req.GetPrincipal(), Resource: req.GetResource(),
		Annotation: req.GetAnnotation(), AnnotationValue: req.AnnotationValue, UnusedSince: req.GetUnusedSince(),
	}
	p, err := readPage[[2]string](filters, req.GetPageToken())
	if err != nil {
		return nil, err
	}
	v, err := s.follower.Current()
	if err != nil {
		return nil, err
	}
	matches, err := s.policyFilter(ctx, v, req)
	if err != nil {
		return nil, err
	}
	room, err := roomFor(ctx)
	if err != nil {
		return nil, err
	}
	out := &cedarpostv1.ListPoliciesResponse{Revision: snapshot.EncodeRevision(v.Position, v.Position.Number)}
	names, all := bundlesFor(ctx, v.Snapshot, "ListPolicies")
	live := func(yield func(store.Policy) bool) {
		for _, b := range v.Bundles { // by name
			if req.GetBundle() != "" && b.Name != req.GetBundle() || b.Name < p.End[0] || !all && !slices.Contains(names, b.Name) {
				continue
			}
			for _, one := range b.Policies { // by id
				if (b.Name != p.End[0] || one.ID > p.End[1]) && !yield(one) {
					return
				}
			}
		}
	}
	var found []*cedarpostv1.Policy // that match, and are not in out yet
	tooNew := int32(0)              // of those after the last one in out
	// add adds what is found to the page, and reports whether the page is full.
	add := func() (full bool, err error) {
		if err := s.addUses(ctx, found); err != nil {
			return false, err
		}
		for _, one := range found {
			if unused, known := unusedSince(ctx, one, req.GetUnusedSince()); !known {
				tooNew++
				continue
			} else if !unused {
				continue
			}
			err := room.add(len(one.Text))
			if len(out.Policies) == pageSize(req.GetPageSize()) || errors.Is(err, errPageFull) {
				last := out.Policies[len(out.Policies)-1]
				out.NextPageToken = p.next([2]string{last.Bundle, last.Id})
				return true, nil
			}
			if err != nil {
				return false, err
			}
			out.Policies, out.TooNew, tooNew = append(out.Policies, one), out.TooNew+tooNew, 0
		}
		found = found[:0]
		return false, nil
	}
	atOnce := pageSize(req.GetPageSize()) + 1 // one more, to know whether there is another page
	if req.GetUnusedSince() != nil {
		atOnce = 1000
	}
	for one := range live {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		parsed := parsePolicy(v, one)
		if parsed == nil || !matches(one.Bundle, parsed) {
			continue
		}
		if found = append(found, policyToProto(one, parsed)); len(found) < atOnce {
			continue
		}
		if full, err := add(); full || err != nil {
			return out, err
		}
	}
	if full, err := add(); full || err != nil {
		return out, err
	}
	out.TooNew += tooNew
	return out, nil
}

// policyFilter returns the filter of a request.
func (s *policyService) policyFilter(ctx context.Context, v snapshot.View, req *cedarpostv1.ListPoliciesRequest) (func(bundle string, p *xast.Policy) bool, error) {
	principal, err := s.concerned(ctx, v, req.GetPrincipal())
	if err != nil {
		return nil, err
	}
	resource, err := s.concerned(ctx, v, req.GetResource())
	if err != nil {
		return nil, err
	}
	var action *concerned
	if req.GetAction() != nil {
		uid := wire.UID(req.GetAction())
		action = &concerned{uid, v.Set.ActionGroups(uid).Contains}
	}
	decides := v.Set.Deciders(actionOf(req), cedar.EntityType(req.GetPrincipal().GetType()), cedar.EntityType(req.GetResource().GetType()))
	return func(bundle string, p *xast.Policy) bool {
		if !decides(bundle) {
			return false
		}
		if req.GetEffect() != "" && (p.Effect == xast.EffectPermit) != (req.GetEffect() == "permit") ||
			!principal.by(p.Principal) || !action.by(p.Action) || !resource.by(p.Resource) {
			return false
		}
		return req.GetAnnotation() == "" || slices.ContainsFunc(p.Annotations, func(a xast.AnnotationType) bool {
			return string(a.Key) == req.GetAnnotation() && (req.AnnotationValue == nil || string(a.Value) == req.GetAnnotationValue())
		})
	}, nil
}

// actionOf returns the action of a filter; the zero UID: any.
func actionOf(req *cedarpostv1.ListPoliciesRequest) (uid cedar.EntityUID) {
	if req.GetAction() != nil {
		uid = wire.UID(req.GetAction())
	}
	return uid
}

// concerned returns an entity with its groups. A caller that may read the entity gets those that it is in
// now, and another caller those that it can be in: otherwise it would learn what is stored.
func (s *policyService) concerned(ctx context.Context, v snapshot.View, asked *cedarpostv1.EntityUid) (*concerned, error) {
	if asked == nil {
		return nil, nil //nolint:nilnil // any
	}
	uid := wire.UID(asked)
	may := access.RightsFrom(ctx).May("GetEntity", access.Target{Bundle: owner(v.Set, uid.Type), EntityType: string(uid.Type)})
	if !may {
		above := v.Set.TypesAbove(uid.Type)
		return &concerned{uid, func(group cedar.EntityUID) bool { return above[group.Type] }}, nil
	}
	found, err := s.db.PastEntities(ctx, v.Position.Number, []store.UID{stored.UID(uid)}, maxGroupsWeight)
	if errors.Is(err, store.ErrTooLarge) {
		return nil, connect.Errorf(connect.CodeFailedPrecondition, "%s is in too many groups to look at", uid)
	}
	if err != nil {
		return nil, err
	}
	groups := map[cedar.EntityUID]bool{}
	for _, e := range found {
		for _, parent := range e.Parents {
			groups[cedar.NewEntityUID(cedar.EntityType(parent.Type), cedar.String(parent.ID))] = true
		}
	}
	return &concerned{uid, func(group cedar.EntityUID) bool { return groups[group] }}, nil
}

// maxGroupsWeight bounds the groups of an entity in a filter: see [store.Entity.Weight].
const maxGroupsWeight = 512 << 10
