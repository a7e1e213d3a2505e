package access

import (
	"encoding/base64"
	"math"
	"slices"
	"strings"
	"time"
	"unicode"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// tokenHeader has the members of a JOSE header that matter (RFC 7515, section 4.1).
type tokenHeader struct {
	Algorithm string `json:"alg"`
	KeyID     string `json:"kid"`
	Type      string `json:"typ"`

	// These are refused.
	Critical jsontext.Value `json:"crit"`
	Base64   jsontext.Value `json:"b64"`
	Zip      jsontext.Value `json:"zip"`
	Key      jsontext.Value `json:"jwk"`
	KeyURL   jsontext.Value `json:"jku"`
	CertURL  jsontext.Value `json:"x5u"`
	Certs    jsontext.Value `json:"x5c"`
}

// claims are the claims of a token.
type claims map[string]jsontext.Value

// parseToken reads header and claims. It does not check the signature.
func parseToken(raw string) (h tokenHeader, c claims, _ TokenReason) {
	parts := strings.Split(raw, ".")
	if len(parts) != 3 {
		return h, nil, TokenMalformed
	}
	var decoded [3][]byte
	for n, part := range parts {
		var err error
		// The decoder skips line breaks, which no token has.
		if decoded[n], err = base64.RawURLEncoding.Strict().DecodeString(part); err != nil || strings.ContainsAny(part, "\r\n") {
			return h, nil, TokenMalformed
		}
	}
	if json.Unmarshal(decoded[0], &h) != nil || len(h.KeyID) > maxKeyID {
		return h, nil, TokenMalformed
	}
	for _, refused := range []jsontext.Value{h.Critical, h.Base64, h.Zip, h.Key, h.KeyURL, h.CertURL, h.Certs} {
		if refused != nil {
			return h, nil, TokenHeader
		}
	}
	// Duplicate names are errors of this decoder.
	if json.Unmarshal(decoded[1], &c) != nil || c == nil {
		return h, nil, TokenMalformed
	}
	return h, c, ""
}

// audiences returns the audiences whose tokens are accepted for a purpose.
func (i *Issuer) audiences(p purpose) []string {
	switch {
	case p == forPrincipal:
		return i.PrincipalAudiences
	case i.Audience == "":
		return nil
	}
	return []string{i.Audience}
}

// readValid checks those claims of a token with a valid signature that say for which audience and for how
// long it is valid. The result has Issuer, Subject and Expires.
func (i *Issuer) readValid(c claims, p purpose, now time.Time) (t Token, _ TokenReason) {
	if !c.isFor(i.audiences(p)) {
		return t, TokenWrongAudience
	}
	if c["cnf"] != nil { // RFC 7800; accepted without proof, a stolen token would work
		return t, TokenBound
	}
	expires, hasExpiry, ok1 := c.time("exp")
	issued, hasIssued, ok2 := c.time("iat")
	notBefore, _, ok3 := c.time("nbf")
	subject, ok4 := c.text("sub")
	if !ok1 || !ok2 || !ok3 || !ok4 || !hasExpiry || !hasIssued || subject == "" {
		return t, TokenClaimsNotValid
	}
	ends, oldest := expires.Add(i.Leeway), issued.Add(i.MaxAge+i.Leeway)
	switch {
	case !now.Before(ends):
		return t, TokenExpired
	case issued.After(now.Add(i.Leeway)) || notBefore.After(now.Add(i.Leeway)):
		return t, TokenNotYetValid
	case !now.Before(oldest):
		return t, TokenTooOld
	}
	t = Token{Issuer: i.Name, Subject: subject, Expires: ends}
	if oldest.Before(ends) {
		t.Expires = oldest
	}
	return t, ""
}

// isFor reports whether one of the audiences is in the claim aud.
func (c claims) isFor(audiences []string) bool {
	list, ok := c.texts("aud", false)
	return ok && slices.ContainsFunc(list, func(a string) bool { return slices.Contains(audiences, a) })
}

// read checks the claims of a caller's token with a valid signature.
func (i *Issuer) read(c claims, now time.Time) (t Token, reason TokenReason) {
	if t, reason = i.readValid(c, forCaller, now); reason != "" {
		return t, reason
	}
	var okName, okAuthTime, okACR, okAMR, okScope, okClient bool
	t.Name, okName = c.name(i.CallerClaim)
	t.Claims.AuthTime, _, okAuthTime = c.time("auth_time")
	t.Claims.ACR, okACR = c.optionalText("acr")
	t.Claims.AMR, okAMR = c.texts("amr", false)
	t.Claims.Scope, okScope = c.texts("scope", true)
	t.Claims.ClientID, okClient = c.optionalText("client_id")
	if t.Claims.ClientID == "" && okClient {
		t.Claims.ClientID, okClient = c.optionalText("azp")
	}
	if !okName || !okAuthTime || !okACR || !okAMR || !okScope || !okClient || len(t.Name) > maxCallerClaim {
		return Token{}, TokenClaimsNotValid
	}
	if i.GroupsClaim != "" {
		groups, ok := c.texts(i.GroupsClaim, false)
		if !ok {
			return Token{}, TokenClaimsNotValid
		}
		i.grant(&t, groups)
	}
	return t, ""
}

// grant gives a token the grants of its groups.
func (i *Issuer) grant(t *Token, groups []string) {
	slices.Sort(groups)
	for _, group := range slices.Compact(groups) {
		grants, ok := i.Grants[group]
		if !ok {
			continue
		}
		t.Groups = append(t.Groups, group)
		for _, g := range grants {
			if !slices.Contains(t.Grants, g) {
				t.Grants = append(t.Grants, g)
			}
		}
	}
}

// name returns a claim that names somebody. With email, the issuer must have verified it.
func (c claims) name(claim string) (s string, ok bool) {
	s, ok = c.text(claim)
	if strings.TrimPrefix(claim, "/") == "email" && string(c["email_verified"]) != "true" {
		ok = false
	}
	return s, ok && goodName(s)
}

// goodName reports whether a claim can name somebody: people read it in the log, so it has no
// character that cannot be seen.
func goodName(s string) bool {
	if s == "" || strings.TrimSpace(s) != s {
		return false
	}
	for _, r := range s {
		if !unicode.IsPrint(r) || r == unicode.ReplacementChar {
			return false
		}
	}
	return true
}

// at returns a claim, or nil. A name that begins with a slash is a JSON pointer.
func (c claims) at(name string) jsontext.Value {
	if !strings.HasPrefix(name, "/") {
		return c[name]
	}
	var value jsontext.Value
	here := map[string]jsontext.Value(c)
	for token := range jsontext.Pointer(name).Tokens() {
		if here == nil {
			return nil
		}
		value, here = here[token], nil
		if value.Kind() == '{' && json.Unmarshal(value, &here) != nil {
			return nil
		}
	}
	return value
}

// text returns a claim that is a text.
func (c claims) text(name string) (s string, ok bool) {
	value := c.at(name)
	ok = value != nil && value.Kind() == '"' && json.Unmarshal(value, &s) == nil
	return s, ok
}

// optionalText returns a claim that is a text or missing.
func (c claims) optionalText(name string) (s string, ok bool) {
	if c.at(name) == nil {
		return "", true
	}
	return c.text(name)
}

// texts returns a claim that is an array of texts, one text, or missing. With split, one text is
// several with spaces between them.
func (c claims) texts(name string, split bool) (list []string, ok bool) {
	value := c.at(name)
	switch {
	case value == nil:
		return nil, true
	case value.Kind() == '[':
		// A null in the array would become an empty text.
		var items []jsontext.Value
		if json.Unmarshal(value, &items) != nil || slices.ContainsFunc(items, func(v jsontext.Value) bool { return v.Kind() != '"' }) {
			return nil, false
		}
		return list, json.Unmarshal(value, &list) == nil
	}
	s, ok := c.text(name)
	if split {
		return strings.Fields(s), ok
	}
	return []string{s}, ok
}

// lastTime is the end of the year 9999, in seconds since 1970.
const lastTime = 253402300799

// time returns a claim that is a time (RFC 7519, section 2, NumericDate) or missing.
func (c claims) time(name string) (t time.Time, present, ok bool) {
	value := c.at(name)
	if value == nil {
		return t, false, true
	}
	var seconds float64
	if value.Kind() != '0' || json.Unmarshal(value, &seconds) != nil || !(seconds >= 0 && seconds <= lastTime) {
		return t, true, false
	}
	whole, fraction := math.Modf(seconds)
	return time.Unix(int64(whole), int64(fraction*1e9)), true, true
}
