package access

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/cedarpost/cedarpost/server/access/issuertest"
)

// A file of issuers is read with its defaults.
func TestReadIssuers(t *testing.T) {
	issuers, err := ReadIssuers([]byte(`
issuers:
  - name: staff
    issuer: https://login.example.org/realms/staff
    audience: cedarpost
    groups_claim: /realm_access/roles
    grants:
      operators: [{role: operator, bundle: "*"}]
      shop: [{role: policy-author, bundle: shop}, {role: enforcer, bundle: shop}]
  - name: services
    issuer: http://127.0.0.1/tokens
    audience: https://cedarpost.example.org
    jwks_uri: https://keys.example.org:8443/keys?all
    hosts: [cdn.example.org]
    ca_file: /etc/ca.pem
    algorithms: [ES384]
    access_tokens_only: true
    max_age: 1d
    leeway: 0s
    caller_claim: client_id
  - {name: customers, issuer: https://customers.example.org, principal_audiences: [shop-api, shop-app]}
`))
	if err != nil {
		t.Fatal(err)
	}
	want := []Issuer{
		{Name: "staff", URL: "https://login.example.org/realms/staff", Audience: "cedarpost", Algorithms: []string{"RS256", "PS256", "ES256", "EdDSA"},
			MaxAge: 2 * time.Hour, Leeway: 30 * time.Second, CallerClaim: "sub", GroupsClaim: "/realm_access/roles", Grants: map[string][]TokenGrant{
				"operators": {{"operator", "*"}}, "shop": {{"policy-author", "shop"}, {"enforcer", "shop"}},
			}},
		{Name: "services", URL: "http://127.0.0.1/tokens", Audience: "https://cedarpost.example.org", KeysURL: "https://keys.example.org:8443/keys?all",
			Hosts: []string{"cdn.example.org"}, CAFile: "/etc/ca.pem", Algorithms: []string{"ES384"}, AccessTokensOnly: true, MaxAge: 24 * time.Hour, CallerClaim: "client_id"},
		{Name: "customers", URL: "https://customers.example.org", PrincipalAudiences: []string{"shop-api", "shop-app"}, Algorithms: []string{"RS256", "PS256", "ES256", "EdDSA"},
			MaxAge: 2 * time.Hour, Leeway: 30 * time.Second, CallerClaim: "sub"},
	}
	if !reflect.DeepEqual(issuers, want) {
		t.Errorf("%+v, want %+v", issuers, want)
	}
	for n, hosts := range [][]string{{"login.example.org"}, {"cdn.example.org", "127.0.0.1:80", "keys.example.org:8443"}} {
		if got := issuers[n].keyHosts(); !reflect.DeepEqual(got, hosts) {
			t.Errorf("hosts %q, want %q", got, hosts)
		}
	}
}

// Settings that are not valid, or not safe, are errors that say what is wrong with which issuer.
func TestReadIssuersRefuses(t *testing.T) {
	const issuer = "issuer: https://a.example, audience: cedarpost"
	for text, want := range map[string]string{
		"":            "empty",
		"# nothing":   "empty",
		"issuers: []": "no issuers",
		"{}":          "no issuers",
		"[]":          "not valid",
		"issuers: 7":  "not valid",
		"issuers: [}": "not valid",
		"issuer: []":  `unknown key "issuer"; known are issuers`,
		"{issuers: [{name: a, " + issuer + "}], x: 1}":                                                          "x",
		"issuers: [{name: a, " + issuer + "}]\n---\nissuers: []":                                                "more than one",
		"issuers: [{name: a, " + issuer + ", audiences: [b]}]":                                                  `unknown key "audiences"; known are name, issuer, audience, principal_audiences, jwks_uri,`,
		"issuers: [{name: a, name: b, " + issuer + "}]":                                                         "name",
		"issuers: [{" + issuer + "}]":                                                                           "name",
		"issuers: [{name: a/b, " + issuer + "}]":                                                                `"a/b"): name`,
		"issuers: [{name: 'a:b', " + issuer + "}]":                                                              "name",
		"issuers: [{name: A, " + issuer + "}]":                                                                  "name",
		"issuers: [{name: a, issuer: https://a.example}]":                                                       `issuer 1 ("a"): audience is missing`,
		"issuers: [{name: a, issuer: https://a.example, audience: ''}]":                                         "audience is missing",
		"issuers: [{name: a, issuer: https://a.example, audience: }]":                                           "audience is missing",
		"issuers: [{name: a, issuer: https://a.example, principal_audiences: []}]":                              "audience is missing",
		"issuers: [{name: a, issuer: https://a.example, principal_audiences: [b, '']}]":                         "principal_audiences",
		"issuers: [{name: a, issuer: https://a.example, principal_audiences: [b], groups_claim: g}]":            "groups_claim and grants are for callers",
		"issuers: [{name: a, audience: b}]":                                                                     "issuer: the URL is missing",
		"issuers: [{name: a, audience: b, issuer: http://a.example}]":                                           "https://",
		"issuers: [{name: a, audience: b, issuer: http://10.0.0.1}]":                                            "https://",
		"issuers: [{name: a, audience: b, issuer: 'https://a.example?x=1'}]":                                    "query",
		"issuers: [{name: a, audience: b, issuer: 'https://a.example#x'}]":                                      "fragment",
		"issuers: [{name: a, audience: b, issuer: 'https://user:pa55@a.example'}]":                              "user name",
		"issuers: [{name: a, audience: b, issuer: a.example}]":                                                  "host",
		"issuers: [{name: a, " + issuer + ", jwks_uri: 'http://a.example'}]":                                    "jwks_uri",
		"issuers: [{name: a, " + issuer + ", algorithms: [none]}]":                                              `"none" is not one of`,
		"issuers: [{name: a, " + issuer + ", algorithms: [RS256, HS256]}]":                                      `"HS256" is not one of`,
		"issuers: [{name: a, " + issuer + ", algorithms: [rs256]}]":                                             "is not one of",
		"issuers: [{name: a, " + issuer + ", algorithms: []}]":                                                  "algorithms: the list is empty",
		"issuers: [{name: a, " + issuer + ", max_age: 0s}]":                                                     "max_age",
		"issuers: [{name: a, " + issuer + ", max_age: 25h}]":                                                    "max_age",
		"issuers: [{name: a, " + issuer + ", max_age: -1h}]":                                                    "is not a duration",
		"issuers: [{name: a, " + issuer + ", max_age: soon}]":                                                   `"soon" is not a duration like`,
		"issuers: [{name: a, " + issuer + ", leeway: 3m}]":                                                      "leeway",
		"issuers: [{name: a, " + issuer + ", leeway: -1s}]":                                                     "is not a duration",
		"issuers: [{name: a, " + issuer + ", grants: {g: [{role: r, bundle: b}]}}]":                             "groups_claim is missing",
		"issuers: [{name: a, " + issuer + ", groups_claim: g, grants: {g: [{role: r}]}}]":                       `group "g": each grant needs`,
		"issuers: [{name: a, " + issuer + ", groups_claim: g, grants: {g: [{}]}}]":                              `group "g": each grant needs`,
		"issuers: [{name: a, " + issuer + ", groups_claim: g, grants: {'': []}}]":                               "a group without a name",
		"issuers: [{name: a, " + issuer + ", groups_claim: g, grants: {g: [{role: r, bundle: b, action: c}]}}]": `unknown key "action"; known are role, bundle`,
		"issuers: [{name: a, " + issuer + "}, {name: a, issuer: https://b.example, audience: b}]":               "another issuer has this name",
		"issuers: [{name: a, " + issuer + "}, {name: b, " + issuer + "}]":                                       "another entry has this issuer",
		"issuers: [" + strings.Repeat("{name: a}, ", maxIssuers) + "{name: b}]":                                 "more than 100",
		strings.Repeat("#", maxIssuersBytes+1):                                                                  "bytes",
	} {
		issuers, err := ReadIssuers([]byte(text))
		if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "pa55") {
			t.Errorf("%.200s: %+v, %v, want %q", text, issuers, err, want)
		}
	}
	good := "issuers: [{name: a, " + issuer + ", hosts: ['*.example.org']}]"
	issuers, err := ReadIssuers([]byte(good))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := NewTokens(TokensConfig{Issuers: issuers}); err == nil || !strings.Contains(err.Error(), `issuer 1 ("a")`) {
		t.Errorf("a host with a wildcard: %v", err)
	}
	issuers[0].Hosts, issuers[0].GroupsClaim, issuers[0].Grants = nil, "g", map[string][]TokenGrant{"g": {{"king", "*"}}}
	_, err = NewTokens(TokensConfig{Issuers: issuers, CheckGrant: func(g TokenGrant) error { return fmt.Errorf("the role %q is unknown", g.Role) }})
	if err == nil || !strings.Contains(err.Error(), `issuer 1 ("a"): grants: group "g": the role "king" is unknown`) {
		t.Errorf("an unknown role: %v", err)
	}
}

// The file of the issuers is read again when it changes. A mistake in it changes nothing. Keys
// and verified tokens of an issuer that stays as it is are kept.
func TestIssuersFileIsFollowed(t *testing.T) {
	a, b := issuertest.Start(t, jose.ES256), issuertest.Start(t, jose.ES256)
	entry := func(i *issuertest.Issuer, name, role string) string {
		return fmt.Sprintf("  - {name: %s, issuer: '%s', audience: cedarpost, ca_file: '%s', groups_claim: groups, grants: {staff: [{role: %s, bundle: shop}]}}\n",
			name, i.URL, i.CAFile, role)
	}
	file := filepath.Join(t.TempDir(), "issuers.yaml")
	write := func(text string, mode os.FileMode) {
		t.Helper()
		next := file + ".next"
		if err := errors.Join(os.WriteFile(next, []byte(text), mode), os.Chmod(next, mode), os.Rename(next, file)); err != nil {
			t.Fatal(err)
		}
	}
	write("issuers:\n"+entry(a, "a", "enforcer"), 0o666)
	if _, err := OpenTokens(file, TokensConfig{}); err == nil || !strings.Contains(err.Error(), "may change it") {
		t.Errorf("a file that everybody may change: %v", err)
	}
	write("issuers:\n"+entry(a, "a", "enforcer"), 0o644)
	tokens, err := OpenTokens(file, TokensConfig{Log: slog.New(slog.DiscardHandler), fetchTimeout: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tokens.Close)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		tokens.Follow(t.Context(), file)
	}()
	t.Cleanup(func() { <-ended })
	now := time.Now()
	ofA, ofB := a.Sign(t, nil, a.Claims(t, now, map[string]any{"groups": "staff"})), b.Sign(t, nil, b.Claims(t, now, map[string]any{"groups": "staff"}))
	roles := func() string {
		var list []string
		for _, raw := range []string{ofA, ofB} {
			token, err := tokens.Verify(t.Context(), raw, now)
			switch {
			case err != nil:
				list = append(list, "none")
			default:
				list = append(list, token.Grants[0].Role)
			}
		}
		return strings.Join(list, " ")
	}
	wait := func(want string) {
		t.Helper()
		for end := time.Now().Add(time.Minute); roles() != want; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%s, want %s", roles(), want)
			}
		}
	}
	if got := roles(); got != "enforcer none" {
		t.Fatal(got)
	}
	write("issuers:\n"+entry(a, "a", "enforcer")+entry(b, "b", "auditor"), 0o644)
	wait("enforcer auditor")
	if a.Fetches() != 1 {
		t.Errorf("the keys of the issuer that stayed were fetched %d times", a.Fetches())
	}
	write("issuers:\n"+entry(a, "a", "operator")+entry(a, "b", "operator"), 0o644) // one issuer twice
	write("issuers:\n"+entry(b, "b", "operator"), 0o644)
	wait("none operator")
}

// The issuers of any file that is accepted have an audience, safe algorithms and bounds.
func FuzzReadIssuers(f *testing.F) {
	f.Add([]byte("issuers: [{name: a, issuer: https://a.example, audience: cedarpost, groups_claim: g, grants: {g: [{role: r, bundle: '*'}]}}]"))
	f.Add([]byte("issuers:\n- name: a\n  issuer: http://[::1]:80/x\n  audience: b\n  max_age: 1h\n  leeway: 0s\n  algorithms: [EdDSA]\n  hosts: [a]\n"))
	f.Add([]byte("issuers: [{name: a, issuer: https://a.example, principal_audiences: [shop]}]"))
	f.Add([]byte("a: &a [*a]"))
	f.Add([]byte("issuers: [{audience: !!binary AAAA}]"))
	f.Fuzz(func(t *testing.T, text []byte) {
		issuers, err := ReadIssuers(text)
		if err != nil {
			return
		}
		for _, i := range issuers {
			if i.Audience == "" && (len(i.PrincipalAudiences) == 0 || len(i.Grants) > 0) || slices.Contains(i.PrincipalAudiences, "") || !issuerName.MatchString(i.Name) || i.MaxAge <= 0 || i.MaxAge > largestMaxAge || i.Leeway < 0 || i.Leeway > largestLeeway ||
				len(i.Algorithms) == 0 || i.CallerClaim == "" || !strings.HasPrefix(i.URL, "http") {
				t.Errorf("%q: %+v", text, i)
			}
			for _, a := range i.Algorithms {
				if a == "" || strings.HasPrefix(a, "HS") || strings.EqualFold(a, "none") {
					t.Errorf("%q: algorithm %q", text, a)
				}
			}
		}
		// The hosts can still be refused. There is no panic.
		if tokens, err := NewTokens(TokensConfig{Issuers: issuers}); err == nil {
			tokens.Close()
		}
	})
}
