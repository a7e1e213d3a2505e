package server

import (
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"

	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/access/issuertest"
)

// Calls of a caller with a token are held open until its issuer is taken out of the file: what an
// operator does when the issuer is broken into. None of them does anything any more.
func TestAttackCallsOfARemovedIssuer(t *testing.T) {
	t.Parallel()
	issuer := issuertest.Start(t, jose.ES256)
	file := filepath.Join(t.TempDir(), "issuers.yaml")
	config := `issuers:
  - {name: corp, issuer: ` + issuer.URL + `, audience: cedarpost, ca_file: ` + issuer.CAFile + `, groups_claim: groups,
     grants: {ops: [{role: operator, bundle: "*"}, {role: auditor, bundle: "*"}, {role: enforcer, bundle: "*"}]}}
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
	f.writeCAs(newCA(t, "clients", time.Time{}))
	var log syncedLog
	s := f.start(&log, nil, func(c *Config) { c.Tokens = tokens })
	issuer.SetClaims("boss", map[string]any{"groups": []any{"ops"}})
	token := issuer.Token(t, "boss")
	client := f.httpClient(nil, func(tr *http.Transport) { tr.ExpectContinueTimeout = time.Minute })
	if me := s.whoami(t, client, token); len(me.Grants) != 3 {
		t.Fatalf("%+v", me)
	}
	// begin sends a call without the last bytes of its body, and returns once the server waits for them.
	begin := func(procedure, body string) (finish func() string) {
		r, w := io.Pipe()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "https://"+s.Addr("admin")+procedure, r)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Authorization", "Bearer "+token)
		req.Header.Set("Expect", "100-continue")
		req.ContentLength = int64(len(body))
		done := make(chan string, 1)
		go func() {
			res, err := client.Do(req)
			if err != nil {
				done <- err.Error()
				return
			}
			text, _ := io.ReadAll(res.Body)
			_ = res.Body.Close()
			done <- res.Status + " " + string(text)
		}()
		_, _ = io.WriteString(w, body[:2]) // it is read once the server asks for the body of the admitted call
		return func() string {
			_, _ = io.WriteString(w, body[2:])
			_ = w.Close()
			return <-done
		}
	}
	calls := map[string]func() string{}
	for procedure, body := range map[string]string{
		cedarpostv1connect.AccessServiceCreateKeyProcedure:  `{"caller":"backdoor","grants":[{"role":"operator","bundle":"*"}]}`,
		cedarpostv1connect.AccessServicePutGrantProcedure:   `{"grant":{"caller":"token:corp/boss","role":"operator","bundle":"*"}}`,
		cedarpostv1connect.AuditServiceQueryEventsProcedure: `{"pageSize": 1}`,
	} {
		calls[procedure] = begin(procedure, body)
	}
	if err := tokens.Replace(nil); err != nil { // what the follower of the file does
		t.Fatal(err)
	}
	time.Sleep(atOnce) // until then, the rights of the admission count
	refused := 0
	for procedure, finish := range calls {
		if text := finish(); !strings.HasPrefix(text, "401") && !strings.HasPrefix(text, "503") {
			t.Errorf("%s: %s", procedure, text)
			continue
		}
		refused++
	}
	t.Logf("attack: calls that are held open until their issuer is removed: %d of %d refused", refused, len(calls))
}
