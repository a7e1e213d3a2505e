// Package enforce turns the answers of the service into what a server does with a
// request: let it through, or refuse it in one of a few ways. What net/http and
// Connect need of it is in cedarposthttp and cedarpostconnect; all that decides stands
// here once, so that the two cannot differ.
//
// A request passes only on an allow whose obligations were met. Whatever goes wrong
// instead, a panic included, refuses it.
package enforce

import (
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

// ErrNoPrincipal is what [Config].Principal returns for a request of nobody.
var ErrNoPrincipal = errors.New("enforce: the request has no principal")

// Config says how a service enforces. Client and Principal are required.
type Config struct {
	// Client asks.
	Client *cedarpost.Client

	// Principal tells whose request it is, from what authentication before has put
	// into its context. ErrNoPrincipal, or a principal that is empty, refuses the
	// request as unauthenticated; any other error refuses it as the service's fault.
	Principal func(context.Context) (cedarpost.EntityUID, error)

	// Context gives the context of each check, such as whether a second factor was
	// used. What a route adds to it wins. Nil: none.
	Context func(context.Context) (map[string]any, error)

	// Obligations are how to meet those that come with an allow, by their text. Each is
	// called before the handler; an error refuses the request. A duty for later is
	// written down here, or left to the handler, which finds the result in its context.
	// An obligation that stands not here cannot be met, and refuses the request.
	Obligations map[string]func(context.Context, cedarpost.Result) error

	// StepUp is what the user has to do to follow an advice, by its text. An advice
	// that stands not here is not passed on.
	StepUp map[string]Challenge

	// RetryAfter is when to try again if there was no decision. 0: 1 s.
	RetryAfter time.Duration

	// MeterProvider is that of OpenTelemetry. Nil: the global one.
	MeterProvider metric.MeterProvider
	// Log gets what is the service's fault, and what no route is mapped for. Nil:
	// slog.Default.
	Log *slog.Logger
}

// Guard enforces. Make it with [New], and share it: it may be used by many at once, for
// several servers of one process.
type Guard struct {
	cfg    Config
	counts counts
	noted  names // what was logged once and is not logged again
	gauges func()
}

// New makes a guard. Errors are mistakes in the configuration.
func New(cfg Config) (*Guard, error) {
	if cfg.Client == nil || cfg.Principal == nil {
		return nil, errors.New("enforce: Config needs a Client and a Principal")
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
	if cfg.RetryAfter == 0 {
		cfg.RetryAfter = time.Second
	}
	if cfg.MeterProvider == nil {
		cfg.MeterProvider = otel.GetMeterProvider()
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	cfg.Obligations, cfg.StepUp = maps.Clone(cfg.Obligations), maps.Clone(cfg.StepUp)
	g := &Guard{cfg: cfg}
	var err error
	if g.gauges, err = g.observe(cfg.MeterProvider.Meter(scope)); err != nil {
		return nil, err
	}
	return g, nil
}

// Close takes the guard's counts out of OpenTelemetry. The guard goes on enforcing.
func (g *Guard) Close() { g.gauges() }

// Question is what has to be allowed before a request, or one message of a call, gets
// to its handler.
type Question struct {
	// Route names it for people who read logs: a pattern or a procedure. It is the
	// service's own text, never the client's.
	Route string
	// Hide answers a denial as if the resource did not exist. See [Refused].
	Hide bool
	// Again says that the same was let through before, in the same call: its obligations
	// are met already.
	Again bool
	// Check makes the check, all of it but the principal. It is called after the
	// principal is known. Its error refuses the request: as it says, if it is a
	// *Refusal, else as the service's fault.
	Check func() (cedarpost.Check, error)
}

// Enforce is the one place that lets a request through: if the refusal is nil, it was
// allowed and its obligations are met.
func (g *Guard) Enforce(ctx context.Context, q Question) (result cedarpost.Result, refused *Refusal) {
	defer func() {
		// A panic after the result was there must not let the request through.
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
	if refused.Kind == Fault || refused.Kind == Unmet || errors.Is(refused.Err, cedarpost.ErrUnauthenticated) {
		g.cfg.Log.Error("request refused by a mistake of the service", "route", q.Route, "decision", refused.DecisionID, "err", refused.Err)
	}
	return cedarpost.Result{}, refused
}

func (g *Guard) decide(ctx context.Context, q Question) (none cedarpost.Result, _ error) {
	principal, err := g.cfg.Principal(ctx)
	if errors.Is(err, ErrNoPrincipal) || err == nil && (principal.Type == "" || principal.ID == "") {
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
	check.Principal = principal
	if check.Context, err = g.context(ctx, check.Context); err != nil {
		return none, err
	}
	result, err := g.cfg.Client.Authorize(ctx, check)
	switch {
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

// maxPathsBytes is for all paths together: the service takes 64 KiB for the question.
const maxPathsBytes = 32 << 10

// askable says what of a check cannot be sent, of what a client decides: the id of the
// resource, and the paths it wants to change. That is the client's mistake; whatever
// else the service does not take is this one's.
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

// context is that of the service with that of the route.
func (g *Guard) context(ctx context.Context, own map[string]any) (map[string]any, error) {
	if g.cfg.Context == nil {
		return own, nil
	}
	all, err := g.cfg.Context(ctx)
	if err != nil {
		return nil, fmt.Errorf("context: %w", err)
	}
	if len(own) > 0 {
		all = maps.Clone(all) // it may be one map for all requests
		if all == nil {
			return own, nil
		}
		maps.Copy(all, own)
	}
	return all, nil
}

// meet meets the obligations of an allow, unless they are met already. The allow does
// not count if one is not met.
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
	var met []string // two policies may oblige to the same
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

// Public counts a request to a route that says why it needs no check.
func (g *Guard) Public() { g.counts.public.Add(1) }

// Unmapped counts a request to what no route is mapped for, logs the first of each, and
// returns its refusal.
func (g *Guard) Unmapped(route string) *Refusal {
	if first := g.counts.unmapped.add(route); first {
		g.cfg.Log.Warn("refused: no route is mapped for this; it is logged once", "route", route)
	}
	return &Refusal{Kind: Unmapped}
}

// Refuse counts a refusal that came about outside of Enforce, and logs one that is the
// service's fault.
func (g *Guard) Refuse(route string, r *Refusal) {
	g.counts.refuse(r)
	if r.Kind == Fault {
		g.cfg.Log.Error("request refused by a mistake of the service", "route", route, "err", r.Err)
	}
}
