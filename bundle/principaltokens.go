package bundle

import (
	"cmp"
	"regexp"
	"slices"
	"strings"
	"unicode"

	"github.com/go-json-experiment/json/jsontext"
	"go.yaml.in/yaml/v4"

	"github.com/cedarpost/cedarpost/internal/entityuid"
)

// A PrincipalToken says which principal an access token of one issuer stands for, in questions about
// the actions of the bundle. bundle.yaml has it under principal_tokens:
//
//	principal_tokens:
//	  customers:
//	    type: Shop::User
//	    id: sub
//	    audience: shop-api
//	    context:
//	      acr: acr
//	      level: /assurance/level
type PrincipalToken struct {
	// Issuer is the short name of the issuer in the server's configuration.
	Issuer string
	// Type is the entity type of the principal, and IDClaim the claim that its id ends with, after
	// IDPrefix.
	Type, IDClaim, IDPrefix string
	// Audiences are the audiences whose tokens the bundle takes, among those that the server's
	// configuration opens. Empty: all of these.
	Audiences []string
	// Context are the attributes of the context that claims fill, sorted by name.
	Context []ClaimAttribute

	Line, Column int
}

// A ClaimAttribute is an attribute of the context that a claim fills. A claim whose name begins with
// a slash is a JSON pointer (RFC 6901) into the claims.
type ClaimAttribute struct {
	Name, Claim  string
	Line, Column int
}

const (
	principalTokensKey = "principal_tokens"

	maxTokenIssuers    = 100
	maxClaimAttributes = 100 // of one issuer
	maxTokenAudiences  = 100 // of one issuer
	maxClaimBytes      = 256
	maxPrefixBytes     = 128
)

// issuerPattern is the rule for names in the server's file of issuers (docs/tokens.md).
var issuerPattern = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,31}$`)

// ReadPrincipalTokens reads the principal_tokens of a bundle.yaml that was published. It does not look at
// the other settings. The error is [Problems] if a later version of the service published the file, or if
// somebody altered it.
func ReadPrincipalTokens(manifest []byte) ([]PrincipalToken, error) {
	var probs Problems
	y := yamlFile{path: ManifestName, probs: &probs}
	var list []PrincipalToken
	if root := y.load(manifest); root != nil {
		y.each(root, ManifestName, func(k, v *yaml.Node) {
			if k.Value == principalTokensKey {
				list = y.principalTokens(v)
			}
		})
	}
	if len(probs) > 0 {
		return nil, probs
	}
	return list, nil
}

// principalTokens reads principal_tokens: issuer → type, claim of the id, and context.
func (y yamlFile) principalTokens(n *yaml.Node) (list []PrincipalToken) {
	if isNull(n) {
		return nil
	}
	if len(n.Content) > 2*maxTokenIssuers {
		y.fail(n, "", "%s has more than %d issuers", principalTokensKey, maxTokenIssuers)
		return nil
	}
	y.each(n, principalTokensKey, func(issuer, v *yaml.Node) {
		if !issuerPattern.MatchString(issuer.Value) {
			y.fail(issuer, "give the name that the server's file of issuers has", "%.100q cannot be the name of an issuer", issuer.Value)
		}
		t := PrincipalToken{Issuer: issuer.Value, IDClaim: "sub", Line: issuer.Line, Column: issuer.Column}
		y.each(v, "the tokens of "+issuer.Value, func(k, v *yaml.Node) {
			switch k.Value {
			case "type":
				if t.Type = y.str(v, "type"); isText(v) && !entityuid.ValidType(t.Type) {
					y.fail(v, "such as Shop::User", "%.100q is not an entity type", t.Type)
				}
			case "id":
				t.IDClaim = y.claim(v, "id")
			case "id_prefix":
				if t.IDPrefix = y.str(v, "id_prefix"); len(t.IDPrefix) > maxPrefixBytes || strings.ContainsFunc(t.IDPrefix, func(r rune) bool { return !unicode.IsPrint(r) }) {
					y.fail(v, "", "id_prefix must have at most %d bytes, and only visible characters", maxPrefixBytes)
				}
			case "audience":
				if t.Audiences = y.strs(v, "audience"); len(t.Audiences) == 0 || len(t.Audiences) > maxTokenAudiences || slices.Contains(t.Audiences, "") {
					y.fail(v, "", "audience must be a text, or a list of 1 to %d texts", maxTokenAudiences)
				}
			case "context":
				t.Context = y.claimAttributes(v)
			default:
				y.unknown(k, "type", "id", "id_prefix", "audience", "context")
			}
		})
		if v.Kind == yaml.MappingNode && t.Type == "" {
			y.fail(issuer, "add type: the entity type of the principals", "the tokens of %.100q have no type", issuer.Value)
		}
		list = append(list, t)
	})
	y.distinct(list)
	slices.SortFunc(list, func(a, b PrincipalToken) int { return cmp.Compare(a.Issuer, b.Issuer) })
	return list
}

// distinct refuses issuers whose users could get the id of a user of another issuer. Two ids differ for
// certain if neither of their prefixes begins with the other one.
func (y yamlFile) distinct(list []PrincipalToken) {
	for i, t := range list {
		for _, o := range list[:i] {
			if t.Type == "" || t.Type != o.Type || !strings.HasPrefix(t.IDPrefix, o.IDPrefix) && !strings.HasPrefix(o.IDPrefix, t.IDPrefix) {
				continue
			}
			y.probs.add(Problem{File: y.path, Line: t.Line, Column: t.Column,
				Message: "a user of the issuer " + t.Issuer + " could get the id of a user of the issuer " + o.Issuer + ": both are of type " + t.Type,
				Hint:    `give each an id_prefix, such as "` + t.Issuer + `:", or types of their own`})
		}
	}
}

// claim reads the name of a claim.
func (y yamlFile) claim(n *yaml.Node, what string) string {
	s := y.str(n, what)
	switch {
	case !isText(n):
	case s == "" || len(s) > maxClaimBytes:
		y.fail(n, "", "%s must be a claim, with 1 to %d bytes", what, maxClaimBytes)
	case strings.HasPrefix(s, "/") && !jsontext.Pointer(s).IsValid():
		y.fail(n, "a claim that begins with a slash is a JSON pointer; write ~ as ~0", "%s: %.100q is not a JSON pointer", what, s)
	}
	return s
}

// claimAttributes reads attribute → claim.
func (y yamlFile) claimAttributes(n *yaml.Node) (list []ClaimAttribute) {
	if len(n.Content) > 2*maxClaimAttributes {
		y.fail(n, "", "context has more than %d attributes", maxClaimAttributes)
		return nil
	}
	y.each(n, "context", func(k, v *yaml.Node) {
		if k.Value == "" || len(k.Value) > maxClaimBytes {
			y.fail(k, "", "the name of an attribute has 1 to %d bytes", maxClaimBytes)
		}
		list = append(list, ClaimAttribute{Name: k.Value, Claim: y.claim(v, "the claim of "+k.Value), Line: k.Line, Column: k.Column})
	})
	slices.SortFunc(list, func(a, b ClaimAttribute) int { return cmp.Compare(a.Name, b.Name) })
	return list
}
