package enforce_test

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/fstest"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/embedded"
	"go.opentelemetry.io/otel/metric/noop"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/cedarposttest"
	"github.com/cedarpost/cedarpost/sdk/go/enforce"
)

// vault has rights with every combination of advice and obligations.
var vault = fstest.MapFS{
	"bundle.yaml": {Data: []byte("name: vault\n")},
	"schema.cedarschema": {Data: []byte(`namespace Vault {
  entity User; entity Safe { sealed: Bool };
  entity FieldGroup in [FieldGroup]; entity Field in [Field, FieldGroup];
  action Open appliesTo { principal: [User], resource: [Safe], context: { mfa?: Bool, recent?: Bool, banned?: Bool } };
  action Edit appliesTo { principal: [User], resource: [Safe], context: { mfa?: Bool, recent?: Bool, banned?: Bool } };
  action "Edit.field" appliesTo { principal: [User], resource: [Safe], context: { mfa?: Bool, recent?: Bool, banned?: Bool, field: Field } };
}`)},
	"fields.yaml": {Data: []byte("Vault::Safe:\n  note: []\n  code: [secret]\n  owner: [fixed]\nVault::FieldGroup:\n  all: []\n")},
	"policies.cedar": {Data: []byte(`
@id("opens") @obligation("log") permit (principal, action == Vault::Action::"Open", resource is Vault::Safe)
  when { resource != Vault::Safe::"private" };
@id("opens-too") @obligation("log") permit (principal, action == Vault::Action::"Open", resource == Vault::Safe::"twice");
@id("rings") @obligation("ring") permit (principal, action == Vault::Action::"Open", resource == Vault::Safe::"rings");
@id("edits") permit (principal, action == Vault::Action::"Edit", resource is Vault::Safe);
@id("edit-fields") permit (principal, action == Vault::Action::"Edit.field", resource is Vault::Safe)
  unless { context.field in Vault::FieldGroup::"fixed" };
@id("mfa") @advice("mfa") forbid (principal, action == Vault::Action::"Open", resource) when { context has mfa && !context.mfa };
@id("recent") @advice("recent") forbid (principal, action == Vault::Action::"Open", resource) when { context has recent && !context.recent };
@id("odd") @advice("odd") forbid (principal, action == Vault::Action::"Open", resource == Vault::Safe::"odd");
@id("private") @advice("mfa") forbid (principal, action == Vault::Action::"Open", resource == Vault::Safe::"private") unless { context has mfa && context.mfa };
@id("banned") forbid (principal, action == Vault::Action::"Open", resource) when { context has banned && context.banned };
@id("sealed") @advice("mfa") forbid (principal, action == Vault::Action::"Open", resource == Vault::Safe::"unknown")
  when { resource.sealed && !(context has mfa && context.mfa) };
@id("note-mfa") @advice("mfa") forbid (principal, action == Vault::Action::"Edit.field", resource == Vault::Safe::"unknown")
  when { context.field == Vault::Field::"Safe.note" } unless { context has mfa && context.mfa };
@id("note-sealed") forbid (principal, action == Vault::Action::"Edit.field", resource == Vault::Safe::"unknown")
  when { context.field == Vault::Field::"Safe.note" && resource.sealed };
@id("code-mfa") @advice("mfa") forbid (principal, action == Vault::Action::"Edit.field", resource)
  when { context.field in Vault::FieldGroup::"secret" && context has mfa && !context.mfa };
`)},
	"tests.yaml": {Data: []byte("checks: []\n")},
}

func ask(g *enforce.Guard, c cedarpost.Check) (cedarpost.Result, *enforce.Refusal) {
	return g.Enforce(context.Background(), enforce.Question{Route: "test", Check: func() (cedarpost.Check, error) { return c, nil }})
}

func open(safe string, context map[string]any) cedarpost.Check {
	return cedarpost.Check{Action: cedarpost.UID("Vault::Action", "Open"), Resource: cedarpost.UID("Vault::Safe", safe), Context: context}
}

func edit(context map[string]any, fields ...string) cedarpost.Check {
	return editOf("1", context, fields...)
}

func editOf(safe string, context map[string]any, fields ...string) cedarpost.Check {
	return cedarpost.Check{
		Action: cedarpost.UID("Vault::Action", "Edit"), Resource: cedarpost.UID("Vault::Safe", safe), Context: context,
		Fields: fields, RequireAllFields: true,
	}
}

func config(t *testing.T) enforce.Config {
	return enforce.Config{
		Client:    cedarposttest.NewFS(t, vault).Client(),
		Principal: func(context.Context) (cedarpost.EntityUID, error) { return cedarpost.UID("Vault::User", "bob"), nil },
		StepUp: map[string]enforce.Challenge{
			"mfa": {ACRValues: []string{"mfa", "key"}, MaxAge: time.Hour}, "recent": {ACRValues: []string{"key", "pin"}, MaxAge: time.Minute},
		},
		Obligations: map[string]func(context.Context, cedarpost.Result) error{"log": func(context.Context, cedarpost.Result) error { return nil }},
	}
}

func newGuard(t *testing.T, cfg enforce.Config) *enforce.Guard {
	t.Helper()
	g, err := enforce.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(g.Close)
	return g
}

// The advice of a forbid that looks at the resource reveals that the resource exists.
func TestStepUpOfWhatIsHidden(t *testing.T) {
	g := newGuard(t, config(t))
	for what, c := range map[string]struct {
		check cedarpost.Check
		kind  enforce.Kind
	}{
		"nobody may open it, with a second factor or without": {open("private", nil), enforce.Hidden},
		"no object could be opened without a second factor":   {open("1", map[string]any{"mfa": false}), enforce.StepUp},
		"the object is allowed, a field is not":               {edit(map[string]any{"mfa": false}, "code"), enforce.StepUp},
	} {
		_, r := g.Enforce(t.Context(), enforce.Question{Route: "test", Hide: true, Check: func() (cedarpost.Check, error) { return c.check, nil }})
		if r == nil || r.Kind != c.kind || (r.Challenge != "") != (c.kind == enforce.StepUp) {
			t.Errorf("%s: %v", what, r)
		}
	}
}

// A refusal without a kind, for example from a function of a route, is a fault.
func TestRefusalOfNoKind(t *testing.T) {
	g := newGuard(t, config(t))
	for _, kind := range []enforce.Kind{0, 200} {
		_, r := g.Enforce(t.Context(), enforce.Question{Route: "test", Check: func() (cedarpost.Check, error) { return cedarpost.Check{}, &enforce.Refusal{Kind: kind} }})
		if r == nil || r.Kind != enforce.Fault {
			t.Errorf("%d: %v", kind, r)
		}
	}
	if n := g.Stats().Faults; n != 2 {
		t.Errorf("%d faults", n)
	}
}

// A step-up is offered only if nothing else is missing.
func TestStepUp(t *testing.T) {
	type m = map[string]any
	g := newGuard(t, config(t))
	const common = `Bearer error="insufficient_user_authentication", error_description="A stronger or more recent authentication is required", `
	for _, c := range []struct {
		what      string
		check     cedarpost.Check
		kind      enforce.Kind // 0: allowed
		challenge string
	}{
		{"nothing is missing", open("1", nil), 0, ""},
		{"a second factor is", open("1", m{"mfa": false}), enforce.StepUp, common + `acr_values="mfa key", max_age="3600"`},
		{"a recent sign-in is", open("1", m{"recent": false}), enforce.StepUp, common + `acr_values="key pin", max_age="60"`},
		{"both are", open("1", m{"mfa": false, "recent": false}), enforce.StepUp, common + `acr_values="mfa key pin", max_age="60"`},
		{"it would not help who is banned", open("1", m{"mfa": false, "banned": true}), enforce.Forbidden, ""},
		{"nobody is told of advice that we do not know", open("odd", nil), enforce.Forbidden, ""},
		{"or that comes on top", open("odd", m{"mfa": false}), enforce.Forbidden, ""},
		{"a field needs it", edit(m{"mfa": false}, "note", "code"), enforce.StepUp, common + `acr_values="mfa key", max_age="3600"`},
		{"another field is not to be had", edit(m{"mfa": false}, "code", "owner"), enforce.Forbidden, ""},
		{"a policy that cannot be evaluated stays, whatever the user does", open("unknown", m{"mfa": false}), enforce.Forbidden, ""},
		{"and has not gone once it is done", open("unknown", m{"mfa": true}), enforce.Forbidden, ""},
		{"another policy denies the same field", editOf("unknown", m{"mfa": false}, "note"), enforce.Forbidden, ""},
		{"the field is to be had", edit(m{"mfa": true}, "note", "code"), 0, ""},
	} {
		_, r := ask(g, c.check)
		var kind enforce.Kind
		var challenge string
		if r != nil {
			kind, challenge = r.Kind, r.Challenge
		}
		if kind != c.kind || challenge != c.challenge {
			t.Errorf("%s: %v\n%s", c.what, r, challenge)
		}
	}
}

func TestObligations(t *testing.T) {
	cfg := config(t)
	var met []string
	fails := false
	cfg.Obligations["log"] = func(_ context.Context, r cedarpost.Result) error {
		met = append(met, "log")
		if fails {
			panic("disk full")
		}
		return nil
	}
	g := newGuard(t, cfg)
	if _, r := ask(g, open("twice", nil)); r != nil || len(met) != 1 {
		t.Errorf("two policies oblige to the same: met %d times, %v", len(met), r)
	}
	met = nil
	if result, r := ask(g, open("rings", nil)); r == nil || r.Kind != enforce.Unmet || met != nil || result.Allowed() {
		t.Errorf("one of two cannot be met: met %v, %v", met, r)
	}
	fails = true
	if result, r := ask(g, open("1", nil)); r == nil || r.Kind != enforce.Fault || result.Allowed() {
		t.Errorf("meeting one panics: %v", r)
	}
}

func TestContextOfGuardAndRoute(t *testing.T) {
	cfg := config(t)
	shared := map[string]any{"mfa": false, "recent": true}
	cfg.Context = func(context.Context) (map[string]any, error) { return shared, nil }
	g := newGuard(t, cfg)
	if _, r := ask(g, open("1", nil)); r == nil || r.Kind != enforce.StepUp {
		t.Errorf("the guard's context is not asked with: %v", r)
	}
	if _, r := ask(g, open("1", map[string]any{"mfa": true})); r != nil {
		t.Errorf("the route's context does not win: %v", r)
	}
	if len(shared) != 2 || shared["mfa"] != false {
		t.Errorf("the guard's context was changed: %v", shared)
	}
}

// A principal without a type or an id counts as none, whatever policies say.
func TestNobody(t *testing.T) {
	svc := cedarposttest.NewFS(t, vault)
	for _, who := range []cedarpost.EntityUID{{}, {Type: "Vault::User"}, {ID: "bob"}} {
		cfg := config(t)
		cfg.Client = svc.Client()
		cfg.Principal = func(context.Context) (cedarpost.EntityUID, error) { return who, nil }
		if _, r := ask(newGuard(t, cfg), open("1", nil)); r == nil || r.Kind != enforce.NoPrincipal || r.Challenge != "Bearer" {
			t.Errorf("%s: %v", who, r)
		}
	}
	if n := len(svc.Decisions()); n != 0 {
		t.Errorf("%d decisions", n)
	}
}

// Too large a request is a mistake of the client, and no question is asked.
func TestTooMuch(t *testing.T) {
	svc := cedarposttest.NewFS(t, vault)
	cfg := config(t)
	cfg.Client = svc.Client()
	g := newGuard(t, cfg)
	var many, long []string
	for range 1001 {
		many = append(many, "x")
	}
	for range 200 {
		long = append(long, strings.Repeat("x", 200))
	}
	for what, fields := range map[string][]string{
		"many": many, "large": long, "a long one": {strings.Repeat("x", 257)}, "an empty one": {""}, "no Unicode": {"\xff"}, "NUL": {"\x00"},
	} {
		if _, r := ask(g, edit(nil, fields...)); r == nil || r.Kind != enforce.Malformed {
			t.Errorf("fields, %s: %v", what, r)
		}
	}
	if n := len(svc.Decisions()); n != 0 {
		t.Errorf("%d decisions", n)
	}
}

func TestResultIsHeld(t *testing.T) {
	if enforce.Result(t.Context()).Allowed() {
		t.Error("a context of nobody has an allow")
	}
	ctx, held := enforce.Hold(t.Context())
	if enforce.Result(ctx).Allowed() {
		t.Error("a result that is not there allows")
	}
	result, _ := ask(newGuard(t, config(t)), open("1", nil))
	held.Set(result)
	if got := enforce.Result(ctx); !got.Allowed() || got.DecisionID() != result.DecisionID() {
		t.Error("the result is not in the context")
	}
}

func TestRefusalsSayTheirCause(t *testing.T) {
	cause := errors.New("the cause")
	err := error(&enforce.Refusal{Kind: enforce.Malformed, Err: cause})
	if !errors.Is(err, cause) || !strings.Contains(err.Error(), "the cause") || strings.Contains(enforce.Malformed.Detail(), "cause") {
		t.Error(err)
	}
	for k := enforce.Forbidden; k <= enforce.Unmapped; k++ {
		if k.Title() == "" {
			t.Errorf("kind %d has no title", k)
		}
	}
}

// meter collects the metrics of a guard.
type meter struct {
	noop.Meter
	observe metric.Callback
}

func (m *meter) RegisterCallback(f metric.Callback, _ ...metric.Observable) (metric.Registration, error) {
	m.observe = f
	return registration{m: m}, nil
}

type registration struct {
	embedded.Registration
	m *meter
}

func (r registration) Unregister() error { r.m.observe = nil; return nil }

type provider struct {
	noop.MeterProvider
	m *meter
}

func (p provider) Meter(string, ...metric.MeterOption) metric.Meter { return p.m }

type observer struct {
	embedded.Observer
	got *[]string
}

func (o observer) ObserveFloat64(metric.Float64Observable, float64, ...metric.ObserveOption) {}
func (o observer) ObserveInt64(_ metric.Int64Observable, n int64, opts ...metric.ObserveOption) {
	set := metric.NewObserveConfig(opts).Attributes()
	if n > 0 {
		*o.got = append(*o.got, set.Encoded(encoder{}))
	}
}

func TestMetrics(t *testing.T) {
	m := &meter{}
	cfg := config(t)
	cfg.MeterProvider = provider{m: m}
	g := newGuard(t, cfg)
	_, _ = ask(g, open("1", nil))
	_, _ = ask(g, open("1", map[string]any{"banned": true}))
	g.Public()
	_ = g.Unmapped("GET /x")
	var got []string
	if err := m.observe(t.Context(), observer{got: &got}); err != nil {
		t.Fatal(err)
	}
	slices.Sort(got)
	if want := "at=function outcome=allowed outcome=forbidden outcome=public route=GET /x"; strings.Join(got, " ") != want {
		t.Errorf("observed %q", got)
	}
	g.Close()
	if m.observe != nil {
		t.Error("it is observed after it was closed")
	}
}

type encoder struct{}

func (encoder) Encode(i attribute.Iterator) string {
	var out []string
	for i.Next() {
		kv := i.Attribute()
		out = append(out, string(kv.Key)+"="+kv.Value.AsString())
	}
	return strings.Join(out, ",")
}
func (encoder) ID() attribute.EncoderID { return attribute.EncoderID{} }

// A write with a lost revision may be lost, so the request is refused, and repeating it
// does not help.
func TestUnknownRevision(t *testing.T) {
	g := newGuard(t, config(t))
	check := open("1", nil)
	check.AtLeastAsFresh = cedarposttest.NewFS(t, vault).Put(cedarpost.Entity{UID: cedarpost.UID("Vault::User", "bob")})
	check.FailOpen = "never for a revision that is lost"
	_, r := ask(g, check)
	if r == nil || r.Kind != enforce.Conflict || r.RetryAfter != 0 || !errors.Is(r, cedarpost.ErrUnknownRevision) {
		t.Errorf("%v", r)
	}
	if s := g.Stats(); s.Conflicts != 1 || s.Faults != 0 {
		t.Errorf("%+v", s)
	}
}

// A wrong URL is a fault of the program: waiting does not help.
func TestWrongServer(t *testing.T) {
	hs := httptest.NewUnstartedServer(http.NotFoundHandler())
	hs.Config.Protocols = new(http.Protocols)
	hs.Config.Protocols.SetUnencryptedHTTP2(true)
	hs.Start()
	t.Cleanup(hs.Close)
	cfg := config(t)
	var err error
	if cfg.Client, err = cedarpost.New(cedarpost.Config{Servers: []string{hs.URL}, CacheBytes: -1, Timeout: time.Minute}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cfg.Client.Close(context.Background()); err != nil {
			t.Error(err)
		}
	})
	if _, r := ask(newGuard(t, cfg), open("1", nil)); r == nil || r.Kind != enforce.Fault || !errors.Is(r, cedarpost.ErrWrongServer) || !strings.Contains(r.Error(), "another plane") {
		t.Errorf("%v", r)
	}
}
