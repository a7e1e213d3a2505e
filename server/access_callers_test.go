package server

import (
	"context"
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/access/issuertest"
	"github.com/cedarpost/cedarpost/store"
)

// whoami is the answer of WhoAmI to a caller without or with an Authorization header.
type whoami struct {
	Caller, Kind, ExpiresAt string
	Grants                  []struct{ Role, Bundle, GrantedBy string }
	status                  int
	text                    string
}

func (w whoami) roles() (list []string) {
	for _, g := range w.Grants {
		list = append(list, g.Role+" "+g.Bundle)
	}
	slices.Sort(list)
	return list
}

func (s *secured) whoami(t *testing.T, client *http.Client, credential string) (me whoami) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+s.Addr("admin")+cedarpostv1connect.AccessServiceWhoAmIProcedure, strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	if credential != "" {
		req.Header.Set("Authorization", "Bearer "+credential)
	}
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	var text strings.Builder
	d := json.NewDecoder(res.Body)
	var raw json.RawMessage
	if err := d.Decode(&raw); err == nil {
		_ = json.Unmarshal(raw, &me)
		text.Write(raw)
	}
	me.status, me.text = res.StatusCode, text.String()
	return me
}

// One server takes API keys, access tokens of an issuer, and client certificates. Each kind is a
// caller with a name of its own, whatever its subject is, and has the rights of its grants.
func TestThreeKindsOfCallers(t *testing.T) {
	t.Parallel()
	issuer := issuertest.Start(t, jose.ES256)
	file := filepath.Join(t.TempDir(), "issuers.yaml")
	config := `issuers:
  - {name: corp, issuer: ` + issuer.URL + `, audience: cedarpost, ca_file: ` + issuer.CAFile + `, groups_claim: groups,
     grants: {ops: [{role: operator, bundle: "*"}], readers: [{role: auditor, bundle: shop}]}}
`
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	tokens, err := access.OpenTokens(file, access.TokensConfig{CheckGrant: access.CheckTokenGrant})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(tokens.Close)
	f := newTLSFiles(t)
	f.writePair(time.Time{})
	ca := newCA(t, "clients", time.Time{})
	f.writeCAs(ca)
	var log syncedLog
	s := f.start(&log, nil, func(c *Config) { c.Tokens = tokens })
	_, err = s.cfg.DB.ChangeAccess(t.Context(), "test", func(context.Context, store.Access) (store.AccessChange, error) {
		return store.AccessChange{Put: []store.Grant{
			{Caller: "token:corp/asker", Role: access.Enforcer, Bundle: "shop"},
			{Caller: "spiffe://example.org/orders", Role: access.DataWriter, Bundle: "shop"},
		}}, nil
	})
	if err != nil {
		t.Fatal(err)
	}

	plain := f.httpClient(nil, nil)
	if me := s.whoami(t, plain, s.key); me.Caller != "bootstrap" || me.Kind != "api_key" || len(me.Grants) != 12 {
		t.Errorf("the key: %+v", me)
	}
	// A token whose subject is the name of a caller with a key is another caller.
	for subject, groups := range map[string][]any{"bootstrap": nil, "asker": {"readers", "strangers"}, "boss": {"ops"}} {
		claims := map[string]any{}
		if groups != nil {
			claims["groups"] = groups
		}
		issuer.SetClaims(subject, claims)
		token := issuer.Token(t, subject)
		var want []string
		switch subject {
		case "asker":
			want = []string{"auditor shop", "enforcer shop"}
		case "boss":
			want = []string{"operator *"}
		}
		var me whoami
		for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
			if me = s.whoami(t, plain, token); slices.Equal(me.roles(), want) {
				break // the grant that was stored is applied
			}
		}
		if me.Caller != "token:corp/"+subject || me.Kind != "token" || me.ExpiresAt == "" || !slices.Equal(me.roles(), want) {
			t.Errorf("a token of %s: %+v", subject, me)
		}
		forged := token[:len(token)-4] + "AAAA"
		if me := s.whoami(t, plain, forged); me.status != http.StatusUnauthorized || strings.Contains(me.text, "corp") {
			t.Errorf("a forged token of %s: %+v", subject, me)
		}
	}
	// A certificate counts only without an Authorization header.
	certified := f.httpClient(clientOf(t, ca, time.Time{}), nil)
	if me := s.whoami(t, certified, ""); me.Caller != "spiffe://example.org/orders" || me.Kind != "certificate" || !slices.Equal(me.roles(), []string{"data-writer shop"}) {
		t.Errorf("the certificate: %+v", me)
	}
	if me := s.whoami(t, certified, s.key); me.Caller != "bootstrap" {
		t.Errorf("the certificate and the key: %+v", me)
	}
	if me := s.whoami(t, certified, "cedarpost_wrong"); me.status != http.StatusUnauthorized {
		t.Errorf("the certificate and a wrong key: %+v", me)
	}
	if me := s.whoami(t, plain, ""); me.status != http.StatusUnauthorized {
		t.Errorf("nothing: %+v", me)
	}
	for _, secret := range []string{s.key} {
		if strings.Contains(log.String(), secret) {
			t.Error("the log has a secret")
		}
	}
}
