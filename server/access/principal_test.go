package access

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/cedarpost/cedarpost/server/access/issuertest"
	"github.com/cedarpost/cedarpost/server/engine"
)

// forUsers opens an issuer for the tokens of users of the shop.
func forUsers(i *Issuer) { i.PrincipalAudiences = []string{"shop-api", "shop-app"} }

// A token is good for what its audience says, and for nothing else, also after it was verified for the
// other purpose.
func TestAttackTokenForAnotherPurpose(t *testing.T) {
	i := issuertest.Start(t, jose.ES256)
	users, callers := settings(t, i, "users", forUsers), settings(t, i, "callers")
	onlyUsers := users
	onlyUsers.Audience = ""
	both := users
	both.PrincipalAudiences = []string{issuertest.Audience}
	now := time.Now()
	token := func(audience any) string { return i.Sign(t, nil, i.Claims(t, now, map[string]any{"aud": audience})) }
	tried := 0
	for _, c := range []struct {
		name              string
		settings          Issuer
		audience          any
		caller, principal TokenReason
	}{
		{"a user's token", users, "shop-api", TokenWrongAudience, ""},
		{"a user's token of another application", users, []string{"shop-app", "x"}, TokenWrongAudience, ""},
		{"a caller's token", users, issuertest.Audience, "", TokenWrongAudience},
		{"a token for both", users, []string{"shop-api", issuertest.Audience}, "", ""},
		{"a token for neither", users, "billing", TokenWrongAudience, TokenWrongAudience},
		{"no audience", users, nil, TokenWrongAudience, TokenWrongAudience},
		{"an empty audience", users, "", TokenWrongAudience, TokenWrongAudience},
		{"an issuer of callers", callers, "shop-api", TokenWrongAudience, TokenPurpose},
		{"an issuer of users", onlyUsers, "shop-api", TokenPurpose, ""},
		{"an issuer of users, and an empty audience", onlyUsers, "", TokenPurpose, TokenWrongAudience},
		{"one audience for both", both, issuertest.Audience, "", ""},
	} {
		tokens, _ := newTokens(t, c.settings)
		raw := token(c.audience)
		for range 2 { // the second time, it may be known
			_, err := tokens.Verify(t.Context(), raw, now)
			if got := reasonOf(err); got != c.caller {
				t.Errorf("%s, of a caller: %v, want %q", c.name, err, c.caller)
			}
			p, err := tokens.Principal(t.Context(), raw, now)
			if got := reasonOf(err); got != c.principal {
				t.Errorf("%s, of a principal: %v, want %q", c.name, err, c.principal)
			}
			if err == nil && (p.Issuer != "users" || p.Expires.Sub(now).Round(time.Second) > 5*time.Minute+30*time.Second) {
				t.Errorf("%s: %+v", c.name, p)
			}
			tried++
		}
	}
	// Closing an issuer takes effect on tokens that were verified before.
	tokens, _ := newTokens(t, users)
	raw := token("shop-api")
	if _, err := tokens.Principal(t.Context(), raw, now); err != nil {
		t.Fatal(err)
	}
	if err := tokens.Replace([]Issuer{callers}); err != nil {
		t.Fatal(err)
	}
	_, err := tokens.Principal(t.Context(), raw, now)
	wantReason(t, err, TokenPurpose)
	t.Logf("attack: tokens for another purpose: %d tried, 0 accepted", tried)
}

func reasonOf(err error) TokenReason {
	if refused, ok := errors.AsType[*TokenError](err); ok {
		return refused.Reason
	}
	return ""
}

// Claims give values of the declared types. A claim of another shape is an error that names the claim,
// and has nothing of its value.
func TestAttributesFromClaims(t *testing.T) {
	payload := `{"sub":"ann","acr":"2","amr":["pwd","otp"],"auth_time":1764300000.25,"scope":"read  write","scp":"a b","roles":"one two",
		"level":3,"large":9007199254740993,"half":1.5,"verified":true,"none":null,"deep":{"a/b":{"n":7}},"mixed":["secret-value",1],
		"huge":92233720368547758070,"early":-1,"email":"ann@example.org","odd":" secret-value","":"empty"}`
	var c claims
	if err := json.Unmarshal([]byte(payload), &c); err != nil {
		t.Fatal(err)
	}
	p := Principal{claims: c}
	const refused = "refused"
	for _, test := range []struct {
		claim string
		as    engine.ClaimType
		want  any
	}{
		{"acr", engine.ClaimString, "2"},
		{"acr", engine.ClaimStrings, []any{"2"}},
		{"acr", engine.ClaimLong, refused},
		{"acr", engine.ClaimUnfit, refused},
		{"amr", engine.ClaimStrings, []any{"pwd", "otp"}},
		{"amr", engine.ClaimString, refused},
		{"scope", engine.ClaimStrings, []any{"read", "write"}},
		{"scope", engine.ClaimString, "read  write"},
		{"scp", engine.ClaimStrings, []any{"a", "b"}},
		{"roles", engine.ClaimStrings, []any{"one two"}},
		{"mixed", engine.ClaimStrings, refused},
		{"level", engine.ClaimLong, 3.0},
		{"large", engine.ClaimLong, "9007199254740993"},
		{"huge", engine.ClaimLong, refused},
		{"half", engine.ClaimLong, refused},
		{"level", engine.ClaimString, refused},
		{"verified", engine.ClaimBool, true},
		{"level", engine.ClaimBool, refused},
		{"auth_time", engine.ClaimDatetime, map[string]any{"__extn": map[string]any{"fn": "datetime", "arg": "2025-11-28T03:20:00.250Z"}}},
		{"auth_time", engine.ClaimLong, refused},
		{"early", engine.ClaimDatetime, refused},
		{"acr", engine.ClaimDatetime, refused},
		{"none", engine.ClaimString, refused},
		{"missing", engine.ClaimString, nil},
		{"/deep/a~1b/n", engine.ClaimLong, 7.0},
		{"/deep/a~1b", engine.ClaimString, refused},
		{"/deep/x", engine.ClaimString, nil},
		{"/acr/x", engine.ClaimString, nil},
	} {
		got, err := p.Attribute(test.claim, test.as)
		if test.want == refused {
			if err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%q", test.claim)) || strings.Contains(err.Error(), "secret-value") {
				t.Errorf("%s as %d: %v, %v", test.claim, test.as, got, err)
			}
		} else if err != nil || fmt.Sprint(got) != fmt.Sprint(test.want) {
			t.Errorf("%s as %d: %v, %v, want %v", test.claim, test.as, got, err, test.want)
		}
	}
	for claim, want := range map[string]string{"sub": "u:ann", "/sub": "u:ann", "email": "", "/email": "", "odd": "", "level": "", "missing": "", "amr": "", "/deep/x": ""} {
		id, err := p.ID(claim, "u:")
		if id != want || (err == nil) != (want != "") || err != nil && strings.Contains(err.Error(), "secret-value") {
			t.Errorf("the id %s: %q, %v", claim, id, err)
		}
	}
	c["email_verified"] = []byte("true")
	for _, claim := range []string{"email", "/email"} {
		if id, err := p.ID(claim, ""); id != "ann@example.org" {
			t.Errorf("a verified email: %q, %v", id, err)
		}
	}
	c["long"] = []byte(`"` + strings.Repeat("x", 1024) + `"`)
	if id, err := p.ID("long", ""); len(id) != 1024 {
		t.Error(err)
	}
	if id, err := p.ID("long", "u"); err == nil {
		t.Errorf("an id of %d bytes", len(id))
	}
}

// A token can have any claims. Each value that comes of them has the form that the contract has for its
// type, and each id can be read in the log.
func FuzzClaims(f *testing.F) {
	f.Add([]byte(`{"sub":"ann","acr":"2","amr":["pwd"],"auth_time":1764300000.25,"scope":"read write","a":{"b":[1]}}`), "scope")
	f.Add([]byte(`{"n":9007199254740993,"t":253402300799,"x":1e3,"y":-0}`), "/n")
	f.Add([]byte(`{"a":{"b":{"~":null}},"":""}`), "/a/b/~0")
	f.Fuzz(func(t *testing.T, payload []byte, claim string) {
		head := "eyJhbGciOiJub25lIn0"
		_, c, reason := parseToken(head + "." + base64.RawURLEncoding.EncodeToString(payload) + ".")
		if reason != "" {
			return
		}
		p := Principal{claims: c}
		if id, err := p.ID(claim, ""); err == nil && (!goodName(id) || len(id) > maxIDBytes) || err != nil && id != "" {
			t.Errorf("%s: the id %q, %v", payload, id, err)
		}
		for as := engine.ClaimUnfit; as <= engine.ClaimDatetime+1; as++ {
			value, err := p.Attribute(claim, as)
			if err != nil || value == nil {
				if value != nil || err == nil && c.at(claim) != nil {
					t.Errorf("%s as %d: %v, %v", payload, as, value, err)
				}
				continue
			}
			if v, err := structpb.NewValue(value); err != nil {
				t.Errorf("%s as %d: %v: %v", payload, as, value, err)
			} else if ok := sound(as, v); !ok {
				t.Errorf("%s as %d: %v", payload, as, value)
			}
		}
	})
}

// sound reports whether a value has the form of its type.
func sound(as engine.ClaimType, v *structpb.Value) bool {
	switch as {
	case engine.ClaimString:
		_, ok := v.Kind.(*structpb.Value_StringValue)
		return ok
	case engine.ClaimBool:
		_, ok := v.Kind.(*structpb.Value_BoolValue)
		return ok
	case engine.ClaimLong:
		if text, ok := v.Kind.(*structpb.Value_StringValue); ok {
			var n int64
			return json.Unmarshal([]byte(text.StringValue), &n) == nil && fmt.Sprint(n) == text.StringValue && (n > 1<<53-1 || n < -(1<<53-1))
		}
		n, ok := v.Kind.(*structpb.Value_NumberValue)
		return ok && n.NumberValue == float64(int64(n.NumberValue)) && n.NumberValue < 1<<53 && n.NumberValue > -(1<<53)
	case engine.ClaimStrings:
		list, ok := v.Kind.(*structpb.Value_ListValue)
		for _, e := range list.ListValue.GetValues() {
			_, isText := e.Kind.(*structpb.Value_StringValue)
			ok = ok && isText
		}
		return ok
	case engine.ClaimDatetime:
		arg := v.GetStructValue().GetFields()["__extn"].GetStructValue().GetFields()["arg"].GetStringValue()
		_, err := time.Parse("2006-01-02T15:04:05.000Z", arg)
		return err == nil
	}
	return false
}
