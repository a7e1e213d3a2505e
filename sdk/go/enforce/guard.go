// Package enforce turns an answer of the service into what a server does with a request: it
// lets the request through or refuses it. cedarposthttp and cedarpostconnect do that for
// net/http and Connect. Everything that decides is here, so that the two cannot differ.
//
// A request passes only on an allow whose obligations are met. Any failure, also a panic,
// refuses it.
package enforce

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"runtime/debug"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/metric"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
)

// ErrNoPrincipal is returned by [Config].Principal for a request without a principal.
var ErrNoPrincipal = errors.New("enforce: the request has no principal")

// Config says how a service enforces. Client is required, and either Principal or PrincipalToken.
type Config struct {
	// Client asks the service.
	Client *cedarpost.Client

	// Principal returns the principal of a request. Authentication runs before the guard and
	// leaves its result in the context. ErrNoPrincipal, or an empty principal, refuses the
	// request as unauthenticated. Any other error refuses it as a fault of the program.
	Principal func(context.Context) (cedarpost.EntityUID, error)

	// PrincipalToken returns the access token of the user of a request, in place of Principal: the
	// service verifies it. ErrNoPrincipal, no token, or one that the service does not accept, refuses
	// the request as unauthenticated. Routes cannot have FailOpen then.
	PrincipalToken func(context.Context) (cedarpost.PrincipalToken, error)

	// Context returns the context of each check, for example whether a second factor was
	// used. A value that a route adds replaces one of the same name. Nil: none.
	Context func(context.Context) (map[string]any, error)

	// Obligations has a function for each obligation, by its text. The guard calls it before
	// the handler; an error refuses the request. For a duty that has to wait, the function
	// can note it, or the handler can do it: the result is in the handler's context. An
	// obligation without a function cannot be met, and refuses the request.
	Obligations map[string]func(context.Context, cedarpost.Result) error

	// StepUp is what the user has to do to follow an advice, by the text of the advice. An
	// advice that is not in it is not passed on.
	StepUp map[string]Challenge

	// RetryAfter is when a client may try again if there was no decision. 0: 1 s.
	RetryAfter time.Duration

	// MeterProvider is that of OpenTelemetry. Nil: the global one.
	MeterProvider metric.MeterProvider
	// Log gets faults of the program, and requests that no route is mapped for. Nil:
	// slog.Default.
	Log *slog.Logger
}

// Guard lets requests through or refuses them. Make it with [New], and share it: it may be
// used concurrently, and by several servers of one process.
type Guard struct {
	cfg    Config
	counts counts
	noted  names // routes that the log has a line for already
	gauges func()
}

// New makes a guard. Errors are mistakes in the configuration.
func New(cfg Config) (*Guard, error) {
	if cfg.Client == nil || (cfg.Principal == nil) == (cfg.PrincipalToken == nil) {
		return nil, errors.New("enforce: Config needs a Client, and either Principal or PrincipalToken")
	}
	for text, meet := range cfg.Obligations {
		if meet == nil {
			return nil, fmt.Errorf("enforce: nothing meets the obligation %q", text)
		}
	}
	for advice, challenge := range cfg.StepUp {
		if err := challenge.check(); err != nil {
			return nil, fmt.Errorf("enforce: step-up %q: %w", advice, err)
		}
	}
	if cfg.RetryAfter < 0 {
		return nil, errors.New("enforce: RetryAfter is negative")
	}
	cfg.RetryAfter = cmp.Or(cfg.RetryAfter, time.Second)
	cfg.Log = cmp.Or(cfg.Log, slog.Default())
	if cfg.MeterProvider == nil {
		cfg.MeterProvider = otel.GetMeterProvider()
	}
	cfg.Obligations, cfg.StepUp = maps.Clone(cfg.Obligations), maps.Clone(cfg.StepUp)
	g := &Guard{cfg: cfg}
	var err error
	if g.gauges, err = g.observe(cfg.MeterProvider.Meter(scope)); err != nil {
		return nil, err
	}
	return g, nil
}

// Close removes the guard's counts from OpenTelemetry. The guard keeps working.
func (g *Guard) Close() { g.gauges() }

// Question is a check that has to be allowed before a request, or one message of a call,
// reaches its handler.
type Question struct {
	// Route names the route in logs: a pattern or a procedure. It is always a text of the
	// program, never of the client.
	Route string
	// Hide answers a denial at the object as if the resource did not exist.
	Hide bool
	// Again says that the same check was allowed before in the same call, so its obligations
	// are met already.
	Again bool
	// Check makes the check without its principal. It is called after the principal is
	// known. Its error refuses the request: in the way that the error says if it is a
	// *Refusal, else as a fault of the program.
	Check func() (cedarpost.Check, error)
}

// Enforce decides about a request. If the refusal is nil, the request is allowed and its
// obligations are met. Nothing else lets a request through.
func (g *Guard) Enforce(ctx context.Context, q Question) (result cedarpost.Result, refused *Refusal) {
	defer func() {
		// A panic after the decision must not let the request through.
		if r := recover(); r != nil {
			g.cfg.Log.Error("panic while a request was checked", "route", q.Route, "panic", r, "stack", string(debug.Stack()))
			result, refused = cedarpost.Result{}, &Refusal{Kind: Fault, Err: fmt.Errorf("panic: %v", r)}
			g.counts.refused[Fault].Add(1)
		}
	}()
	result, err := g.decide(ctx, q)
	if err == nil {
		g.counts.allowed.Add(1)
		return result, nil
	}
	refused, known := errors.AsType[*Refusal](err)
	if !known || refused == nil || refused.Kind == 0 || refused.Kind >= kinds {
		refused = &Refusal{Kind: Fault, Err: err}
	}
	g.counts.refuse(refused)
	if refused.Kind == Fault || refused.Kind == Unmet ||
		errors.Is(refused.Err, cedarpost.ErrUnauthenticated) || errors.Is(refused.Err, cedarpost.ErrPermissionDenied) {
		g.cfg.Log.Error("request refused by a mistake of this program", "route", q.Route, "decision", refused.DecisionID, "err", refused.Err)
	}
	return cedarpost.Result{}, refused
}

func (g *Guard) decide(ctx context.Context, q Question) (none cedarpost.Result, _ error) {
	principal, token, err := g.principal(ctx)
	if errors.Is(err, ErrNoPrincipal) || err == nil && token.IsZero() && (principal.Type == "" || principal.ID == "") {
		return none, &Refusal{Kind: NoPrincipal, Challenge: "Bearer", Err: err}
	}
	if err != nil {
		return none, fmt.Errorf("principal: %w", err)
	}
	check, err := q.Check()
	if err != nil {
		return none, err
	}
	if err := askable(&check); err != nil {
		return none, malformed(err)
	}
	check.Principal, check.PrincipalToken = principal, token
	if check.Context, err = g.context(ctx, check.Context); err != nil {
		return none, err
	}
	result, err := g.cfg.Client.Authorize(ctx, check)
	switch {
	case errors.Is(err, cedarpost.ErrPrincipalToken): // RFC 6750, section 3.1
		return none, &Refusal{Kind: NoPrincipal, Challenge: `Bearer error="invalid_token"`, Err: err}
	case errors.Is(err, cedarpost.ErrInvalid), errors.Is(err, cedarpost.ErrWrongServer):
		return none, err
	case errors.Is(err, cedarpost.ErrUnknownRevision):
		return none, &Refusal{Kind: Conflict, Err: err}
	case err != nil:
		return none, &Refusal{Kind: Unavailable, RetryAfter: g.cfg.RetryAfter, Err: err}
	case !result.Allowed():
		return none, g.denied(result, check, q.Hide)
	}
	return result, g.meet(ctx, result, q.Again)
}

// principal returns the principal of a request, or the token that names it.
func (g *Guard) principal(ctx context.Context) (p cedarpost.EntityUID, t cedarpost.PrincipalToken, err error) {
	if g.cfg.Principal != nil {
		p, err = g.cfg.Principal(ctx)
	} else {
		t, err = g.cfg.PrincipalToken(ctx)
	}
	return p, t, err
}

// maxPathsBytes bounds all paths together: a whole question may have 64 KiB.
const maxPathsBytes = 32 << 10

// askable checks the parts of a check that a client chooses: the id of the resource, and the
// paths that it wants to change. If the service would refuse them, that is a mistake of the
// client. Any other invalid part is a mistake of this program.
func askable(check *cedarpost.Check) error {
	if id := check.Resource.ID; len(id) > cedarpost.MaxIDBytes || !plain(id) {
		return errors.New("no such id")
	}
	if !check.RequireAllFields {
		return nil
	}
	size := 0
	for _, path := range check.Fields {
		size += len(path)
		if path == "" || len(path) > cedarpost.MaxFieldBytes || !plain(path) {
			return errors.New("no such field")
		}
	}
	if len(check.Fields) > cedarpost.MaxFields || size > maxPathsBytes {
		return errors.New("too many fields change")
	}
	return nil
}

func plain(text string) bool { return utf8.ValidString(text) && !strings.Contains(text, "\x00") }

// context joins the context of the guard and that of the route.
func (g *Guard) context(ctx context.Context, own map[string]any) (map[string]any, error) {
	if g.cfg.Context == nil {
		return own, nil
	}
	all, err := g.cfg.Context(ctx)
	if err != nil {
		return nil, fmt.Errorf("context: %w", err)
	}
	if len(own) > 0 {
		all = maps.Clone(all) // the function may return one map for all requests
		if all == nil {
			return own, nil
		}
		maps.Copy(all, own)
	}
	return all, nil
}

// meet meets the obligations of an allow, unless they are met already. It returns an error
// if one of them is not met.
func (g *Guard) meet(ctx context.Context, result cedarpost.Result, already bool) error {
	obligations := result.Obligations()
	for _, o := range obligations {
		if g.cfg.Obligations[o.Text] == nil {
			return &Refusal{Kind: Unmet, DecisionID: result.DecisionID(), Err: fmt.Errorf("nothing meets the obligation %q of %s", o.Text, o.Policy)}
		}
	}
	if already {
		return nil
	}
	var met []string // two policies may have the same obligation
	for _, o := range obligations {
		if slices.Contains(met, o.Text) {
			continue
		}
		met = append(met, o.Text)
		if err := g.cfg.Obligations[o.Text](ctx, result); err != nil {
			return &Refusal{Kind: Unmet, DecisionID: result.DecisionID(), Err: fmt.Errorf("obligation %q: %w", o.Text, err)}
		}
	}
	return nil
}

// Public counts a request to a public route.
func (g *Guard) Public() { g.counts.public.Add(1) }

// Unmapped counts a request that no route is mapped for, and returns its refusal. It logs the
// first request of each name.
func (g *Guard) Unmapped(route string) *Refusal {
	if first := g.counts.unmapped.add(route); first {
		g.cfg.Log.Warn("refused: no route is mapped for this; further requests are not logged", "route", route)
	}
	return &Refusal{Kind: Unmapped}
}

// Refuse counts a refusal that was made outside of Enforce, and logs it if it is a fault of
// the program.
func (g *Guard) Refuse(route string, r *Refusal) {
	g.counts.refuse(r)
	if r.Kind == Fault {
		g.cfg.Log.Error("request refused by a mistake of this program", "route", route, "err", r.Err)
	}
}
