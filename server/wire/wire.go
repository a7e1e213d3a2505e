// Package wire converts the messages of the contract to the types of the engine, and back.
// The server uses it, and everything that calls the engine without a server.
package wire

import (
	"github.com/cedar-policy/cedar-go"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/engine"
)

// MaxErrors bounds how many failed policies an answer lists.
const MaxErrors = 100

// UID converts the name of an entity.
func UID(u *cedarpostv1.EntityUid) cedar.EntityUID {
	return cedar.NewEntityUID(cedar.EntityType(u.GetType()), cedar.String(u.GetId()))
}

// UIDs converts names of entities.
func UIDs(us []*cedarpostv1.EntityUid) []cedar.EntityUID {
	out := make([]cedar.EntityUID, len(us))
	for i, u := range us {
		out[i] = UID(u)
	}
	return out
}

// Entity converts an entity that is not checked against a schema yet.
func Entity(e *cedarpostv1.Entity) engine.RawEntity {
	return engine.RawEntity{
		UID: UID(e.GetUid()), Attrs: e.GetAttrs().AsMap(), Tags: e.GetTags().AsMap(), Parents: UIDs(e.GetParents()),
	}
}

// Response makes the message of a result.
func Response(res *engine.Result) *cedarpostv1.AuthorizeResponse {
	out := &cedarpostv1.AuthorizeResponse{Decision: cedarpostv1.Decision_ALLOW}
	if !res.Allowed {
		out.Decision = cedarpostv1.Decision_DENY
		out.DeniedAt = cedarpostv1.DeniedAt(res.DeniedAt).Enum()
	}
	if res.Permitted != nil {
		out.Fields = &cedarpostv1.Fields{Permitted: res.Permitted, Denied: res.Denied}
	}
	for _, p := range res.Policies {
		out.DeterminingPolicies = append(out.DeterminingPolicies, PolicyRef(p))
	}
	for i, e := range res.Errors {
		if i == MaxErrors {
			out.ErrorsOmitted = int32(len(res.Errors) - i)
			break
		}
		out.Errors = append(out.Errors, &cedarpostv1.PolicyError{Policy: PolicyRef(e.Policy), Message: e.Message})
	}
	for _, o := range res.Obligations {
		out.Obligations = append(out.Obligations, &cedarpostv1.Obligation{Policy: PolicyRef(o.Policy), Text: o.Text})
	}
	for _, a := range res.Advice {
		out.Advice = append(out.Advice, &cedarpostv1.Advice{Policy: PolicyRef(a.Policy), Text: a.Text, Paths: a.Paths})
	}
	return out
}

// Explanation makes the message of an explanation.
func Explanation(x *engine.Explanation) *cedarpostv1.Explanation {
	out := &cedarpostv1.Explanation{Summary: x.Summary, Omitted: int32(x.Omitted)}
	for _, p := range x.Policies {
		e := &cedarpostv1.PolicyExplanation{
			Policy: PolicyRef(p.Policy), Forbid: p.Forbid, Outcome: cedarpostv1.PolicyExplanation_Outcome(p.Outcome),
			Reason: p.Reason, Condition: p.Condition, Paths: p.Paths, File: p.File, Line: int32(p.Line),
		}
		for _, v := range p.Values {
			e.Values = append(e.Values, &cedarpostv1.ExplainedValue{Expression: v.Expression, Value: v.Value})
		}
		out.Policies = append(out.Policies, e)
	}
	return out
}

// PolicyName is the name of a policy in columns of the log and in texts: bundle, slash, id.
func PolicyName(p *cedarpostv1.PolicyRef) string { return p.GetBundle() + "/" + p.GetId() }

// PolicyRef makes the message of a policy's name.
func PolicyRef(r engine.PolicyRef) *cedarpostv1.PolicyRef {
	return &cedarpostv1.PolicyRef{Bundle: r.Bundle, Id: r.ID}
}

// Ask converts a request to a question of the engine. now is the time in milliseconds since
// 1970.
func Ask(r *cedarpostv1.AuthorizeRequest, now int64) engine.Ask {
	a := engine.Ask{
		Principal: UID(r.Principal), Action: UID(r.Action), Resource: UID(r.Resource),
		Context: r.Context.AsMap(), NowMillis: now,
	}
	if f := r.Fields; f != nil {
		a.FieldsAsked, a.Paths, a.All, a.RequireAll = true, f.Paths, f.All, f.RequireAll
	}
	for _, e := range r.Entities {
		a.Inline = append(a.Inline, Entity(e))
	}
	return a
}
