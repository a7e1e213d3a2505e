// Package impact says what proposed policies would have done to recorded decisions. It decides the
// recorded questions again, by the live policies and by the proposed ones, on the same entities, and
// compares the outcomes.
package impact

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/cedar-policy/cedar-go"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/snapshot"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/server/wire"
	"github.com/cedarpost/cedarpost/store"
)

const (
	pageRows     = 500 // decisions that are read together
	recordedRows = 50  // the same, if each loads its own entities
	chunkRows    = 32  // decisions that are compared together
)

// Config has what an [Analysis] needs.
type Config struct {
	DB   *store.DB
	Past *snapshot.Past
	// Places are those of the decisions that must not be slowed down, and Work counts the steps of the
	// analysis.
	Places *access.Places
	Work   *access.Work
	// Report says what to analyze, and has what was found so far. Cursor is where its analysis goes on.
	Report *cedarpostv1.ImpactReport
	Cursor store.DecisionCursor
	// Live and Proposed are the policies, and ActionTypes are the types of the actions whose decisions are
	// compared; nil: all.
	Live, Proposed *engine.Set
	ActionTypes    []string
	// Revision is that of the entities.
	Revision int64
	// From and To are the time whose decisions are looked at; zero: that of the report.
	From, To time.Time
}

// Analysis is an analysis under way. It is not safe for concurrent use.
type Analysis struct {
	cfg     Config
	sides   [2]side             // live, proposed
	query   store.DecisionQuery // of the next page
	counts  counts
	entered uint64 // of the places, when it was looked at
	done    bool
}

// side are the policies of one side of the comparison, and the entities that they are asked about.
type side struct {
	set *engine.Set
	at  *snapshot.AtRevision
}

// New begins an analysis, or goes on with one.
func New(cfg Config) *Analysis {
	live := cfg.Past.At(cfg.Revision, cfg.Live)
	a := &Analysis{cfg: cfg, sides: [2]side{{cfg.Live, live}, {cfg.Proposed, live.With(cfg.Proposed)}}, query: filters(cfg.Report)}
	a.query.ActionTypes, a.query.Limit = cfg.ActionTypes, pageRows
	if cfg.Report.GetData() == cedarpostv1.ImpactData_IMPACT_DATA_RECORDED {
		a.query.Limit = recordedRows
	}
	if !cfg.To.IsZero() {
		a.query.From, a.query.To = cfg.From, cfg.To
	}
	a.query.BeforeAt, a.query.BeforeID = cfg.Cursor.At, cfg.Cursor.ID
	a.counts.load(cfg.Report)
	a.counts.changed = changedPolicies(cfg.Live, cfg.Proposed)
	a.counts.decidesFields = func(action cedar.EntityUID, p engine.PolicyRef) bool {
		return cfg.Live.DecidesFields(action, p) || cfg.Proposed.DecidesFields(action, p)
	}
	return a
}

// changedPolicies returns a function that lists the policies about an action that only one set has.
func changedPolicies(live, proposed *engine.Set) func(cedar.EntityUID) []engine.PolicyRef {
	known := map[cedar.EntityUID][]engine.PolicyRef{}
	return func(action cedar.EntityUID) []engine.PolicyRef {
		list, ok := known[action]
		if !ok {
			for _, r := range proposed.Differences(live, action) {
				if r.Policy != (engine.PolicyRef{}) && !slices.Contains(list, r.Policy) {
					list = append(list, r.Policy)
				}
			}
			known[action] = list
		}
		return list
	}
}

// Done reports whether all decisions were looked at.
func (a *Analysis) Done() bool { return a.done }

// Narrowed reports whether a filter leaves out decisions.
func (a *Analysis) Narrowed() bool {
	q := a.query
	return q.Principal != nil || q.Action != nil || q.Resource != nil || q.Caller != ""
}

// filters returns the query of a report.
func filters(r *cedarpostv1.ImpactReport) (q store.DecisionQuery) {
	q.From, q.To, q.Caller = r.GetFrom().AsTime(), r.GetTo().AsTime(), r.GetAskedBy()
	for _, f := range []struct {
		from *cedarpostv1.EntityUid
		into **store.UID
	}{{r.GetPrincipal(), &q.Principal}, {r.GetAction(), &q.Action}, {r.GetResource(), &q.Resource}} {
		if f.from != nil {
			uid := stored.FromProto(f.from)
			*f.into = &uid
		}
	}
	if r.GetSample() < 1 {
		q.Sample = max(int(r.GetSample()*(1<<16)), 1)
	}
	return q
}

// Report returns the report as it is now. If it is not full, it has no groups and no samples.
func (a *Analysis) Report(full bool) *cedarpostv1.ImpactReport {
	out := proto.CloneOf(a.cfg.Report)
	out.UpdatedAt, out.Complete = timestamppb.Now(), a.done
	if !a.query.BeforeAt.IsZero() {
		out.Reached = timestamppb.New(a.query.BeforeAt)
	}
	a.counts.save(out, full)
	if a.done && !out.GetShadow() {
		out.Warnings = a.warnings(out)
	}
	return out
}

// LeftOut notes in the report that who gains and who loses was not asked.
func (a *Analysis) LeftOut(why string) {
	a.cfg.Report.WhoLeftOut = append(a.cfg.Report.GetWhoLeftOut(), why)
}

// Cursor returns where the analysis goes on.
func (a *Analysis) Cursor() store.DecisionCursor {
	return store.DecisionCursor{At: a.query.BeforeAt, ID: a.query.BeforeID}
}

// Next reads and compares the next page of decisions. The error is [store.ErrSwept] if history does not go
// back to the revision of the entities any more.
func (a *Analysis) Next(ctx context.Context) error {
	began := time.Now()
	rows, err := a.cfg.DB.QueryDecisions(ctx, a.query)
	if err != nil {
		return err
	}
	a.done = len(rows) < a.query.Limit
	for len(rows) > 0 {
		n := min(len(rows), chunkRows)
		if err := a.compare(ctx, rows[:n]); err != nil {
			return err
		}
		a.query.BeforeAt, a.query.BeforeID = rows[n-1].At, rows[n-1].ID
		rows = rows[n:]
		if err := a.rest(ctx, time.Since(began)); err != nil {
			return err
		}
		began = time.Now()
	}
	return nil
}

// rest waits if the server decided questions meanwhile, so that they get most of the processors.
func (a *Analysis) rest(ctx context.Context, worked time.Duration) error {
	entered := a.cfg.Places.Entered()
	busy := entered != a.entered
	a.entered = entered
	if !busy {
		return nil
	}
	a.cfg.Work.Rest()
	select {
	case <-time.After(3 * worked):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// compare compares decisions.
func (a *Analysis) compare(ctx context.Context, rows []store.Decision) error {
	var records []*cedarpostv1.DecisionRecord
	var asks []engine.Ask
	for _, row := range rows {
		rec := decisionlog.ReadDecision(row)
		if rec.GetDamaged() != "" {
			a.counts.unknown("the row is damaged; verify the log (cedarpost audit verify)")
			continue
		}
		ask := wire.Ask(&cedarpostv1.AuthorizeRequest{
			Principal: rec.Principal, Action: rec.Action, Resource: rec.Resource,
			Context: rec.Context, Fields: rec.FieldsAsked, Entities: rec.Entities,
		}, 0)
		ask.Recorded, ask.NothingMasked = true, len(rec.GetMasked()) == 0
		records, asks = append(records, rec), append(asks, ask)
	}
	var list [2][]outcome
	for i, side := range a.sides {
		var err error
		if list[i], err = a.outcomes(ctx, side, records, asks); err != nil {
			return err
		}
	}
	for i, rec := range records {
		a.counts.add(rec, list[0][i], list[1][i])
	}
	return nil
}

// outcomes decides questions by the policies of one side.
func (a *Analysis) outcomes(ctx context.Context, by side, records []*cedarpostv1.DecisionRecord, asks []engine.Ask) ([]outcome, error) {
	out := make([]outcome, len(asks))
	if a.cfg.Report.GetData() == cedarpostv1.ImpactData_IMPACT_DATA_RECORDED {
		for i, ask := range asks {
			if records[i].GetRevision() > a.cfg.Revision { // it was lost in a failover
				out[i].err = errNoRevision
				continue
			}
			e, err := a.cfg.Past.PrepareAnew(ctx, records[i].GetRevision(), by.set, ask, a.cfg.Work.Pause)
			if out[i], err = outcomeOf(e, err); err != nil {
				return nil, err
			}
		}
		return out, nil
	}
	return a.outcomesNow(ctx, by, asks)
}

// outcomesNow decides questions by the policies of one side, with the entities of the analysis.
func (a *Analysis) outcomesNow(ctx context.Context, by side, asks []engine.Ask) ([]outcome, error) {
	out := make([]outcome, len(asks))
	list, err := by.at.Prepare(ctx, asks, a.cfg.Work.Pause)
	if _, unfit := errors.AsType[*stored.UnfitError](err); unfit && len(asks) > 1 {
		for i := range asks { // one of them is about an entity that does not fit
			one, err := a.outcomesNow(ctx, by, asks[i:i+1])
			if err != nil {
				return nil, err
			}
			out[i] = one[0]
		}
		return out, nil
	} else if unfit {
		return []outcome{{err: err}}, nil
	}
	if err != nil {
		return nil, err
	}
	for i := range list {
		if out[i], err = outcomeOf(&list[i], list[i].Err); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// errNoRevision is a recorded question whose revision the database does not have.
var errNoRevision = errors.New("this database has no such revision")

// outcome is how a question was decided, or why it was not.
type outcome struct {
	res    *engine.Result
	masked bool // values are masked, so the check that denied is not certain
	err    error
}

// outcomeOf decides a question that was prepared. An error about this question alone is in the outcome.
func outcomeOf(e *engine.Evaluation, err error) (o outcome, _ error) {
	if err == nil {
		o.masked = e.Question.Masked()
		o.res, err = e.Decide()
	}
	if err != nil && undecided(err) == "" {
		return o, err
	}
	o.err = err
	return o, nil
}

// undecided says in words why a question has no outcome. It is "" for an error that is not about the question,
// such as that of the database. The text names no entity.
func undecided(err error) string {
	_, bad := errors.AsType[*engine.RequestError](err)
	_, unfit := errors.AsType[*stored.UnfitError](err)
	switch {
	case errors.Is(err, engine.ErrMasked), errors.Is(err, errNoRevision):
		return err.Error()
	case errors.Is(err, store.ErrSwept):
		return "history no longer goes back to its revision"
	case bad:
		return "the schema does not understand the question"
	case unfit:
		return "a stored entity does not fit the schema"
	case errors.Is(err, engine.ErrTooCostly), errors.Is(err, engine.ErrTooManyAncestors), errors.Is(err, engine.ErrTooLarge), errors.Is(err, store.ErrTooLarge):
		return "its entities or its policies take more work than a decision may"
	}
	return ""
}
