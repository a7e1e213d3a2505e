package server_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/go-jose/go-jose/v4"
	"google.golang.org/protobuf/types/known/structpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/access/issuertest"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
)

// A bank whose users are named by their access tokens.
const (
	bankSchema = `namespace Bank {
  entity User;
  entity Account { owner: User };
  type Login = { acr?: String, amr?: Set<String>, signed_in?: datetime, scope?: Set<String>, client?: String, level?: Long, place?: String };
  action View appliesTo { principal: [User], resource: [Account], context: Login };
  action Close appliesTo { principal: [User], resource: [Account], context: { acr: String } };
  action Watch appliesTo { principal: [User], resource: [Account], context: { now: datetime } };
}`
	bankPolicies = `
@id("owners") permit (principal, action in [Bank::Action::"View", Bank::Action::"Watch"], resource) when { resource.owner == principal };
@id("second-factor") permit (principal, action == Bank::Action::"Close", resource) when { resource.owner == principal && context.acr == "2" };
@id("not-for-robots") forbid (principal, action == Bank::Action::"View", resource) when { context has client && context.client == "robot" };`
	bankManifest = `
principal_tokens:
  users:
    type: Bank::User
    context: {acr: acr, amr: amr, signed_in: auth_time, scope: scope, client: client_id, level: /assurance/level}
`
)

// syncedBuffer is a log that several goroutines write.
type syncedBuffer struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (b *syncedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *syncedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// bank is a server whose bundle takes tokens of the issuer users, which also has callers. The tokens of
// partners and of late may name principals, but no bundle takes them. The tokens of staff authenticate
// callers only. The issuer foreign is not configured.
type bank struct {
	*servertest.Server
	users, partners, late, staff, foreign *issuertest.Issuer
	log                                   *syncedBuffer
	sent                                  []string // every token
}

func startBank(t *testing.T, opts ...servertest.Option) *bank {
	t.Helper()
	b := &bank{log: new(syncedBuffer)}
	var issuers []access.Issuer
	for _, i := range []struct {
		at       **issuertest.Issuer
		settings string
	}{
		{&b.users, "name: users, audience: cedarpost, principal_audiences: [bank-api]"},
		{&b.partners, "name: partners, principal_audiences: [bank-api]"},
		{&b.late, "name: late, principal_audiences: [bank-api]"},
		{&b.staff, "name: staff, audience: cedarpost"},
		{&b.foreign, ""},
	} {
		*i.at = issuertest.Start(t, jose.ES256)
		if i.settings == "" {
			continue
		}
		list, err := access.ReadIssuers([]byte(fmt.Sprintf("issuers: [{%s, issuer: '%s', ca_file: '%s'}]", i.settings, (*i.at).URL, (*i.at).CAFile)))
		if err != nil {
			t.Fatal(err)
		}
		issuers = append(issuers, list...)
	}
	log := slog.New(slog.NewTextHandler(b.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	tokens, err := access.NewTokens(access.TokensConfig{Issuers: issuers, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	opts = append(opts, func(c *server.Config) { c.Tokens, c.Log, c.DecisionTimeout = tokens, log, time.Hour })
	b.Server = servertest.New(t, opts...)
	t.Cleanup(tokens.Close)
	b.MustApply("bank", "schema.cedarschema", bankSchema, "bank.cedar", bankPolicies, "bundle.yaml", bankManifest)
	b.MustPut(servertest.Entity(t, `{"uid":{"type":"Bank::Account","id":"1"},"attrs":{"owner":{"type":"Bank::User","id":"ann"}},"parents":[]}`))
	return b
}

// token signs a token of ann for the bank, with other claims.
func (b *bank) token(t *testing.T, i *issuertest.Issuer, claims map[string]any) string {
	t.Helper()
	all := map[string]any{"aud": "bank-api"}
	for name, value := range claims {
		all[name] = value
	}
	return b.sends(i.Sign(t, nil, i.Claims(t, time.Now(), all)))
}

func (b *bank) sends(raw string) string {
	b.sent = append(b.sent, raw)
	return raw
}

// ask is a question about account 1.
func (b *bank) ask(t *testing.T, action, token string, sent map[string]any) *cedarpostv1.AuthorizeRequest {
	t.Helper()
	r := &cedarpostv1.AuthorizeRequest{PrincipalToken: token, Action: servertest.UID(`Bank::Action::"` + action + `"`), Resource: servertest.UID(`Bank::Account::"1"`)}
	if sent != nil {
		var err error
		if r.Context, err = structpb.NewStruct(sent); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

// leaks fails the test if one of the tokens, or a part that proves or tells something, is in a text.
func (b *bank) leaks(t *testing.T, where, text string) {
	t.Helper()
	for _, raw := range b.sent {
		for _, part := range append(strings.Split(raw, "."), raw) {
			// The headers of all tokens are the same, and say nothing.
			if len(part) > 20 && !strings.HasPrefix(raw, part+".") && (strings.Contains(text, part) || strings.Contains(text, hex.EncodeToString([]byte(part)))) {
				t.Errorf("%s has a token, or a part of one: %q", where, part)
			}
		}
	}
}

// A user's token names the principal and fills the context. The record has both, and a replay needs no
// token. The answer may be kept until the token ends.
func TestPrincipalByToken(t *testing.T) {
	b := startBank(t, server.KeyWait(time.Hour))
	signedIn := map[string]any{"acr": "2", "amr": []string{"pwd", "otp"}, "auth_time": 1764300000, "scope": "read write", "assurance": map[string]any{"level": 3}}
	raw := b.token(t, b.users, signedIn)
	req := b.ask(t, "View", raw, map[string]any{"place": "home"})
	req.WantCacheHint = true
	res, err := b.Authorization.Authorize(t.Context(), req)
	if err != nil || res.Decision != cedarpostv1.Decision_ALLOW {
		t.Fatalf("%v, %v", res, err)
	}
	if keep := res.GetCacheHint().GetMaxAge().AsDuration(); keep <= 4*time.Minute || keep > 5*time.Minute {
		t.Errorf("a token of five minutes: the answer may be kept for %v", keep)
	}
	record, err := b.Audit.GetDecision(t.Context(), &cedarpostv1.GetDecisionRequest{DecisionId: res.DecisionId})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]any{
		"acr": "2", "amr": []any{"pwd", "otp"}, "scope": []any{"write", "read"}, "client": "app", "level": 3.0, "place": "home",
		"signed_in": map[string]any{"__extn": map[string]any{"fn": "datetime", "arg": "2025-11-28T03:20:00.000Z"}},
	}
	d := record.GetDecision()
	got := d.GetContext().AsMap()
	for _, set := range []string{"amr", "scope"} { // in any order
		if list, ok := got[set].([]any); ok {
			slices.SortFunc(list, func(a, b any) int { return -strings.Compare(fmt.Sprint(a), fmt.Sprint(b)) })
		}
	}
	if fmt.Sprint(got) != fmt.Sprint(want) || d.GetPrincipal().GetId() != "ann" || d.GetPrincipal().GetType() != "Bank::User" || d.GetCaller() != "bootstrap" {
		t.Errorf("recorded %v\nwant %v, of %v by %s", got, want, d.GetPrincipal(), d.GetCaller())
	}
	again, err := b.Audit.ReplayDecision(t.Context(), &cedarpostv1.ReplayDecisionRequest{DecisionId: res.DecisionId})
	if err != nil || again.Outcome != cedarpostv1.ReplayDecisionResponse_EQUAL {
		t.Errorf("replay: %v, %v", again, err)
	}

	// An answer is not kept for longer than a token is accepted, with the 30 s that clocks may differ.
	req = b.ask(t, "View", b.token(t, b.users, map[string]any{"exp": time.Now().Unix()}), nil)
	req.WantCacheHint = true
	res, err = b.Authorization.Authorize(t.Context(), req)
	if keep := res.GetCacheHint().GetMaxAge().AsDuration(); err != nil || keep <= 0 || keep > 31*time.Second || keep%time.Millisecond != 0 {
		t.Errorf("a token that ends: %v, %v", res, err)
	}
	// An explanation names the principal of the token.
	req = b.ask(t, "View", b.token(t, b.users, map[string]any{"client_id": "robot"}), nil)
	req.Explain = true
	if res, err := b.Authorization.Authorize(t.Context(), req); err != nil || res.Decision != cedarpostv1.Decision_DENY || res.DeterminingPolicies[0].Id != "not-for-robots" || len(res.GetExplanation().GetPolicies()) == 0 {
		t.Errorf("a robot: %v, %v", res, err)
	}
	// Only the attributes that an action declares are filled.
	for action, allowed := range map[string]bool{"Close": true, "Watch": true} {
		if res, err := b.Authorization.Authorize(t.Context(), b.ask(t, action, raw, nil)); err != nil || (res.Decision == cedarpostv1.Decision_ALLOW) != allowed {
			t.Errorf("%s: %v, %v", action, res, err)
		}
	}
	// Each check of a batch has a user of its own. One that is refused does not refuse the others.
	batch, err := b.Authorization.AuthorizeBatch(t.Context(), &cedarpostv1.AuthorizeBatchRequest{Checks: []*cedarpostv1.AuthorizeRequest{
		b.ask(t, "View", b.token(t, b.users, map[string]any{"aud": "other"}), nil),
		b.ask(t, "View", raw, nil),
		b.ask(t, "View", b.token(t, b.users, map[string]any{"sub": "ben"}), nil),
		{Principal: servertest.UID(`Bank::User::"ann"`), Action: servertest.UID(`Bank::Action::"View"`), Resource: servertest.UID(`Bank::Account::"1"`)},
		b.ask(t, "View", "no token", nil),
	}})
	if err != nil {
		t.Fatal(err)
	}
	var outcomes []string
	for _, r := range batch.Results {
		outcomes = append(outcomes, r.GetResponse().GetDecision().String()+r.GetError().GetCode())
	}
	if want := "DECISION_UNSPECIFIEDinvalid_argument ALLOW DENY ALLOW DECISION_UNSPECIFIEDinvalid_argument"; strings.Join(outcomes, " ") != want {
		t.Errorf("a batch: %q, want %q", outcomes, want)
	}
	recorded, err := b.Audit.GetDecision(t.Context(), &cedarpostv1.GetDecisionRequest{DecisionId: batch.Results[2].GetResponse().GetDecisionId()})
	if err != nil || recorded.GetDecision().GetPrincipal().GetId() != "ben" {
		t.Errorf("the third check: %v, %v", recorded, err)
	}
	// A mapping that does not fit the schema is not published.
	_, err = b.Apply("bank", servertest.Files("schema.cedarschema", bankSchema, "bank.cedar", bankPolicies, "bundle.yaml", "principal_tokens: {users: {type: Bank::User, context: {place: x, plaice: y}}}"))
	servertest.WantCode(t, err, connect.CodeInvalidArgument, `no action of the bundle declares the attribute "plaice" in its context`)
	// Another mapping holds for the next question.
	b.MustApply("bank", "schema.cedarschema", bankSchema, "bank.cedar", bankPolicies, "bundle.yaml", "principal_tokens: {users: {type: Bank::User, id: client_id, id_prefix: 'app:'}}")
	res, err = b.Authorization.Authorize(t.Context(), b.ask(t, "View", raw, nil))
	if err != nil || res.Decision != cedarpostv1.Decision_DENY {
		t.Fatalf("another mapping: %v, %v", res, err)
	}
	if recorded, err = b.Audit.GetDecision(t.Context(), &cedarpostv1.GetDecisionRequest{DecisionId: res.DecisionId}); err != nil || recorded.GetDecision().GetPrincipal().GetId() != "app:app" || recorded.GetDecision().GetContext() != nil && len(recorded.GetDecision().GetContext().Fields) > 0 {
		t.Errorf("another mapping: %v, %v", recorded, err)
	}
	b.scan(t)
}

// scan looks for the tokens in everything that the server wrote, and stops it.
func (b *bank) scan(t *testing.T) {
	t.Helper()
	b.leaks(t, "a metric", servertest.Metrics(t, b.Server))
	b.Stop()
	b.leaks(t, "the log of the server", b.log.String())
	conn := servertest.Session(t, b.URL)
	rows, err := conn.Query(t.Context(), `select relname from pg_class where relnamespace = 'public'::regnamespace and relkind in ('r', 'p') and not relispartition`)
	if err != nil {
		t.Fatal(err)
	}
	var tables []string
	for rows.Next() {
		var name string
		if err := rows.Scan(&name); err != nil {
			t.Fatal(err)
		}
		tables = append(tables, name)
	}
	if rows.Close(); rows.Err() != nil || len(tables) < 8 {
		t.Fatalf("%q, %v", tables, rows.Err())
	}
	for _, table := range tables {
		var text string
		if err := conn.QueryRow(t.Context(), `select coalesce(string_agg(t::text, ' '), '') from `+table+` t`).Scan(&text); err != nil {
			t.Fatal(err)
		}
		b.leaks(t, "the table "+table, text)
		if table == "decisions" && !strings.Contains(text, "Bank::User") {
			t.Error("no decision was scanned")
		}
	}
}

// A question by a token that is not accepted, or does not fit the bundle, is not decided. Its caller learns
// no more than that, and an auditor learns the reason. No token is written anywhere.
func TestAttackPrincipalTokens(t *testing.T) {
	b := startBank(t, server.KeyWait(time.Hour))
	now := time.Now()
	good := b.token(t, b.users, nil)
	parts := strings.Split(good, ".")
	ofCaller := b.sends(b.users.Token(t, "robot")) // a token of the provider itself, for Cedarpost
	_, err := b.DB.ChangeAccess(t.Context(), "test", func(context.Context, store.Access) (store.AccessChange, error) {
		return store.AccessChange{Put: access.AllGrants("token:users/robot", "test")}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
	const notAccepted, invalid = "principal_token: the access token is not accepted; no decision was given", connect.CodeInvalidArgument
	reasons := map[string]int64{}
	tried := 0
	refused := func(name string, req *cedarpostv1.AuthorizeRequest, text, reason string) {
		t.Helper()
		for _, client := range []cedarpostv1connect.AuthorizationServiceClient{b.Authorization, cedarpostv1connect.NewAuthorizationServiceClient(b.Client(b.API, ofCaller))} {
			res, err := client.Authorize(t.Context(), req)
			if err == nil || connect.CodeOf(err) != invalid || !strings.Contains(err.Error(), text) {
				t.Errorf("%s: %v, %v, want %q", name, res, err, text)
				continue
			}
			b.leaks(t, "an error", err.Error())
			if tried++; reason != "" {
				reasons[reason]++
			}
		}
	}
	servertest.Eventually(t, "the grants of the token's caller are applied", func() bool {
		_, err := cedarpostv1connect.NewAuthorizationServiceClient(b.Client(b.API, ofCaller)).Authorize(t.Context(), b.ask(t, "View", good, nil))
		return err == nil
	})
	none := issuertest.Sign(t, []byte("x"), []byte(`{"alg":"none","typ":"at+jwt"}`), b.users.Claims(t, now, map[string]any{"aud": "bank-api"}))
	for _, c := range []struct{ name, token, text, reason string }{
		{"another audience", b.token(t, b.users, map[string]any{"aud": "shop-api"}), notAccepted, "wrong_audience"},
		{"a caller's token", ofCaller, notAccepted, "wrong_audience"},
		{"an issuer of callers", b.token(t, b.staff, nil), notAccepted, "purpose"},
		{"a foreign issuer, with the same subject", b.token(t, b.foreign, nil), notAccepted, "unknown_issuer"},
		{"a foreign issuer that says it is ours", b.token(t, b.foreign, map[string]any{"iss": b.users.URL}), notAccepted, "unknown_key"},
		{"expired", b.token(t, b.users, map[string]any{"iat": now.Add(-time.Hour).Unix(), "exp": now.Add(-time.Minute).Unix()}), "principal_token: the access token has expired", "expired"},
		{"alg none", b.sends(none), notAccepted, "algorithm"},
		{"alg none without a signature", b.sends(none[:strings.LastIndex(none, ".")+1]), notAccepted, "algorithm"},
		{"HS256 with the public key", b.sends(issuertest.Sign(t, []byte("key"), []byte(`{"alg":"HS256","typ":"at+jwt"}`), b.users.Claims(t, now, nil))), notAccepted, "algorithm"},
		{"other claims under the signature", b.sends(parts[0] + "." + strings.Split(b.token(t, b.users, map[string]any{"sub": "ben"}), ".")[1] + "." + parts[2]), notAccepted, "unknown_key"},
		{"an API key", b.Token, notAccepted, "malformed"},
		{"bearer", "Bearer " + good, notAccepted, "malformed"},
		{"an issuer without a mapping", b.token(t, b.partners, nil), "the bundle bank takes no tokens of the issuer partners", ""},
		{"no subject that can be read", b.token(t, b.users, map[string]any{"sub": " ann"}), `principal_token: the claim "sub"`, ""},
		{"a claim of another shape", b.token(t, b.users, map[string]any{"acr": 2}), `principal_token: the claim "acr" is not a text`, ""},
		{"a claim of another shape, deep", b.token(t, b.users, map[string]any{"assurance": map[string]any{"level": "high"}}), `principal_token: the claim "/assurance/level" is not a whole number`, ""},
	} {
		refused(c.name, b.ask(t, "View", c.token, nil), c.text, c.reason)
	}
	// What the token fills cannot be sent, also if this token does not fill it.
	refused("a context of the caller", b.ask(t, "View", good, map[string]any{"acr": "2"}), "context.acr is filled from the principal_token and cannot be sent", "")
	refused("a required claim that is missing", b.ask(t, "Close", good, nil), `required attribute "acr" is missing`, "")
	refused("an unknown action", b.ask(t, "Nothing", good, nil), "is not declared by any schema", "")
	both := b.ask(t, "View", good, nil)
	both.Principal = servertest.UID(`Bank::User::"ann"`)
	refused("both", both, "principal", "")
	refused("neither", b.ask(t, "View", "", nil), "principal", "")
	refused("too large", b.ask(t, "View", strings.Repeat("x", 16<<10+1), nil), "principal_token", "")
	// A user's token does not authenticate a caller.
	if _, err := cedarpostv1connect.NewAuthorizationServiceClient(b.Client(b.API, good)).Authorize(t.Context(), b.ask(t, "View", good, nil)); connect.CodeOf(err) != connect.CodeUnauthenticated {
		t.Errorf("a user's token as a caller's: %v", err)
	}
	// A token in the wrong place is not repeated by the error.
	for _, body := range []string{`{"principal": "` + good + `"}`, `{"principalToken": ["` + good + `"]}`, `{"principalToken": {"` + good + `": 1}}`, `{"` + good + `": 1}`, good} {
		b.leaks(t, "an error of "+body[:12], b.post(t, body))
	}
	// The issuer is away, and its keys are not known. The error does not say that the service is away.
	b.late.SetAway(true)
	for range 2 {
		_, err = b.Authorization.Authorize(t.Context(), b.ask(t, "View", b.token(t, b.late, nil), nil))
		servertest.WantCode(t, err, connect.CodeFailedPrecondition, "principal_token: the keys of its issuer cannot be fetched now; no decision was given")
		reasons["no_keys"]++
	}
	if n := b.late.Discoveries(); n != 1 {
		t.Errorf("the issuer that is away was asked %d times", n)
	}

	metrics := servertest.Metrics(t, b.Server)
	b.scan(t)
	counted := map[string]int64{}
	for _, e := range events(t, b.Server, "probing") {
		p := e.GetProbing()
		if reason, ok := strings.CutPrefix(p.GetReason(), "principal_token: "); ok {
			counted[reason] += p.GetCount()
			if p.GetPrincipal() != "" || p.GetExample() != `Bank::Action::"View" on Bank::Account::"1"` {
				t.Errorf("%v", p)
			}
		}
	}
	if fmt.Sprint(counted) != fmt.Sprint(reasons) || len(reasons) != 8 {
		t.Errorf("counted %v, want %v", counted, reasons)
	}
	for reason, n := range reasons {
		if line := fmt.Sprintf(`cedarpost_principal_tokens_refused_total{reason="%s"} %d`, reason, n); !strings.Contains(metrics, line) {
			t.Errorf("no metric %s", line)
		}
	}
	t.Logf("attack: tokens of users that are forged, of others, or for others: %d questions, 0 decided, 0 tokens written; reasons %v", tried, reasons)
}

// A token whose issuer does not answer does not hold up the other checks of a batch. The bundle can take fewer
// audiences than the server.
func TestAttackTokenOfAnIssuerThatHangs(t *testing.T) {
	b := startBank(t, server.KeyWait(time.Millisecond))
	b.MustApply("bank", "schema.cedarschema", bankSchema, "bank.cedar", bankPolicies, "bundle.yaml", bankManifest+"    audience: [bank-app, bank-api]\n")
	good := b.token(t, b.users, nil)
	servertest.Eventually(t, "the keys of the users' issuer are known", func() bool {
		_, err := b.Authorization.Authorize(t.Context(), b.ask(t, "View", good, nil))
		return err == nil
	})
	b.late.Hold()
	defer b.late.Release()
	began := time.Now()
	res, err := b.Authorization.AuthorizeBatch(t.Context(), &cedarpostv1.AuthorizeBatchRequest{Checks: []*cedarpostv1.AuthorizeRequest{
		b.ask(t, "View", b.token(t, b.late, nil), nil), b.ask(t, "View", good, nil), b.ask(t, "View", b.token(t, b.late, nil), nil),
	}})
	if err != nil {
		t.Fatal(err)
	}
	if r := res.Results; r[0].GetError().GetCode() != "failed_precondition" || r[1].GetResponse().GetDecision() != cedarpostv1.Decision_ALLOW || r[2].GetError().GetCode() != "failed_precondition" {
		t.Errorf("%v", r)
	}
	b.MustApply("bank", "schema.cedarschema", bankSchema, "bank.cedar", bankPolicies, "bundle.yaml", bankManifest+"    audience: bank-app\n")
	_, err = b.Authorization.Authorize(t.Context(), b.ask(t, "View", good, nil))
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "principal_token: the access token is not accepted")
	t.Logf("attack: tokens of an issuer that hangs: another user of the batch was answered after %v", time.Since(began).Round(time.Millisecond))
}

// Questions whose tokens wait for the keys of an issuer hold no places for decisions.
func TestAttackTokensHoldNoPlaces(t *testing.T) {
	t.Parallel()
	b := startBank(t, server.KeyWait(time.Hour), func(c *server.Config) { c.MaxDecisions = 8 })
	b.MustApply("bank", "schema.cedarschema", bankSchema, "bank.cedar", bankPolicies, "bundle.yaml", bankManifest+"    audience: [bank-app, bank-api]\n")
	good := b.token(t, b.users, nil)
	servertest.Eventually(t, "the keys of the users' issuer are known", func() bool {
		_, err := b.Authorization.Authorize(t.Context(), b.ask(t, "View", good, nil))
		return err == nil
	})
	b.late.Hold()
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range 30 {
		ask := b.ask(t, "View", b.token(t, b.late, nil), nil)
		wg.Go(func() { _, _ = b.Authorization.Authorize(ctx, ask) })
	}
	answered := 0
	for range 50 {
		if _, err := b.Authorization.Authorize(t.Context(), b.ask(t, "View", good, nil)); err != nil {
			t.Errorf("%v", err)
			break
		}
		answered++
	}
	stop()
	wg.Wait()
	b.late.Release()
	t.Logf("30 questions wait for an issuer that hangs, with 8 places: %d of 50 other questions of the same caller are answered", answered)
}

// post sends a body to Authorize, and returns the answer.
func (b *bank) post(t *testing.T, body string) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, b.API+cedarpostv1connect.AuthorizationServiceAuthorizeProcedure, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Authorization", "Bearer "+b.Token)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	var text bytes.Buffer
	if _, err := text.ReadFrom(res.Body); err != nil {
		t.Fatal(err)
	}
	if res.StatusCode != http.StatusBadRequest {
		t.Errorf("%.30s…: %s", body, res.Status)
	}
	return text.String()
}
