package engine

import (
	"fmt"
	"slices"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/x/exp/schema/resolved"
)

// PrincipalToken says which principal an access token of an issuer stands for, in questions about
// the actions of one bundle.
type PrincipalToken struct {
	// Issuer is the short name of the issuer.
	Issuer string
	// Type is the entity type of the principal. Its id is IDPrefix and the claim IDClaim.
	Type, IDClaim, IDPrefix string
	// Audiences are the audiences whose tokens the bundle takes, among those that the server's
	// configuration opens. Empty: all of these.
	Audiences []string
	// Context are the attributes of the context that claims fill.
	Context []ClaimAttribute

	Line, Column int
}

// ClaimAttribute is an attribute of the context that a claim fills.
type ClaimAttribute struct {
	Name, Claim  string
	Line, Column int
}

// ClaimType says what kind of claim can fill an attribute.
type ClaimType uint8

// The kinds, by the Cedar type of the attribute.
const (
	ClaimUnfit    ClaimType = iota // a type that no claim can fill
	ClaimString                    // String
	ClaimLong                      // Long
	ClaimBool                      // Bool
	ClaimStrings                   // Set<String>
	ClaimDatetime                  // datetime
)

func claimType(t resolved.IsType) ClaimType {
	switch t := t.(type) {
	case resolved.StringType:
		return ClaimString
	case resolved.LongType:
		return ClaimLong
	case resolved.BoolType:
		return ClaimBool
	case resolved.SetType:
		if _, ok := t.Element.(resolved.StringType); ok {
			return ClaimStrings
		}
	case resolved.ExtensionType:
		if t == "datetime" {
			return ClaimDatetime
		}
	}
	return ClaimUnfit
}

// PrincipalToken returns how tokens of an issuer become principals of an action: as the bundle that owns
// the action says. The error is a *[RequestError].
func (s *Set) PrincipalToken(action cedar.EntityUID, issuer string) (PrincipalToken, error) {
	act, ok := s.actions[action]
	if !ok {
		return PrincipalToken{}, undeclared(action)
	}
	for _, t := range s.bundles[act.bundle].principalTokens {
		if t.Issuer == issuer {
			return t, nil
		}
	}
	return PrincipalToken{}, badf("principal_token: the bundle %s takes no tokens of the issuer %s, because the principal_tokens in its bundle.yaml do not have it", act.bundle, issuer)
}

// ClaimAttribute returns the type of an attribute of the context of an action. declared is false if
// the action does not have it.
func (s *Set) ClaimAttribute(action cedar.EntityUID, name string) (t ClaimType, declared bool) {
	act := s.actions[action]
	if act == nil || act.appliesTo == nil {
		return ClaimUnfit, false
	}
	attr, declared := act.appliesTo.Context[cedar.String(name)]
	if !declared || name == "now" && act.fillsNow {
		return ClaimUnfit, declared
	}
	return claimType(attr.Type), true
}

// readPrincipalTokens checks how a bundle makes principals from tokens.
func (s *Set) readPrincipalTokens(src Source, report func(line, column int, msg, hint string)) {
	if len(src.PrincipalTokens) == 0 {
		return
	}
	s.bundles[src.Name].principalTokens = src.PrincipalTokens
	var actions []*action
	for _, uid := range s.Actions() {
		if a := s.actions[uid]; a.bundle == src.Name {
			actions = append(actions, a)
		}
	}
	for _, t := range src.PrincipalTokens {
		switch typ := cedar.EntityType(t.Type); {
		case !s.knowsType(typ):
			report(t.Line, t.Column, fmt.Sprintf("type %s is not declared by any schema", quote(t.Type)), "")
		case !slices.ContainsFunc(actions, func(a *action) bool { return slices.Contains(a.appliesTo.Principals, typ) }):
			report(t.Line, t.Column, fmt.Sprintf("no action of the bundle has principals of type %s", t.Type), "")
		}
		for _, attr := range t.Context {
			used := false
			for _, a := range actions {
				fit, declared := s.ClaimAttribute(a.uid, attr.Name)
				used = used || declared
				if declared && fit == ClaimUnfit {
					report(attr.Line, attr.Column, fmt.Sprintf("no claim can fill the attribute %s of the context of %s", quote(attr.Name), a.uid),
						"a claim fills a String, Long, Bool, Set<String> or datetime, and not a datetime with the name now, which the server fills")
					break
				}
			}
			if !used {
				report(attr.Line, attr.Column, fmt.Sprintf("no action of the bundle declares the attribute %s in its context", quote(attr.Name)), "")
			}
		}
	}
}
