package main

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// replayNamed bounds how many decisions of a kind the summary names.
const replayNamed = 10

type replayDecisionsCmd struct {
	outputFlags
	ID      string `arg:"" optional:"" help:"Id of the decision. Without it, filters select decisions."`
	Explain bool   `help:"Also print how each policy of that revision came out, and why; with an id."`
	filterFlags
	Concurrency int `help:"Number of replays at a time (default ${default})." default:"4" placeholder:"N"`
	adminFlags
}

// Help is the long help of replay.
func (*replayDecisionsCmd) Help() string {
	return `Decides the question of a record again, at its revision, and compares every part of the outcome. Each replay is recorded as a read of the log.

  cedarpost decisions replay 019f6e2b-5c1e-7a54-9d6a-0c3f0e6b8a11
  cedarpost decisions replay --since 1h

Exits with 1 if the outcome of a replay differs, if the row of a decision is damaged, or if a single decision cannot be replayed. With -o json, prints the ReplayDecisionResponse of the API for a single decision, and a summary for many.`
}

// Run replays one decision or many.
func (r *replayDecisionsCmd) Run(ctx context.Context, c *console) error {
	req, err := r.request()
	if err != nil {
		return err
	}
	filtered := !proto.Equal(req, &cedarpostv1.QueryDecisionsRequest{})
	switch {
	case r.ID != "" && filtered:
		return misuse("give an id or filters, not both")
	case r.ID == "" && !filtered:
		return misuse("give an id, or select decisions: --since 1h")
	case r.Explain && r.ID == "":
		return misuse("--explain needs the id of a decision")
	case r.Concurrency < 1:
		return misuse("--concurrency must be at least 1")
	}
	admin, err := r.dial()
	if err != nil {
		return err
	}
	if r.ID != "" {
		return r.one(ctx, c, admin)
	}
	sum := &replaySummary{Reasons: map[string]int{}, Damaged: []replayDamaged{}}
	if err = r.many(ctx, c, admin, req, sum); err == nil || sum.total() > 0 {
		sum.print(c, r.json())
	}
	if err == nil && sum.Different+len(sum.Damaged) > 0 {
		err = exitWith(codeFailed)
	}
	return err
}

func (r *replayDecisionsCmd) one(ctx context.Context, c *console, admin *peer) error {
	res, err := call(ctx, admin, admin.audit().ReplayDecision, &cedarpostv1.ReplayDecisionRequest{DecisionId: r.ID, Explain: r.Explain})
	if err != nil {
		return err
	}
	if r.json() {
		err = c.message(res)
	} else {
		c.printReplay(res)
		c.printPast(res, r.Explain)
	}
	if err == nil && res.GetOutcome() != cedarpostv1.ReplayDecisionResponse_EQUAL {
		err = exitWith(codeFailed)
	}
	return err
}

func (c *console) printReplay(res *cedarpostv1.ReplayDecisionResponse) {
	color := red
	if res.GetOutcome() == cedarpostv1.ReplayDecisionResponse_EQUAL {
		color = green
	}
	fmt.Fprintln(c.out, c.paint(color, strings.ReplaceAll(res.GetOutcome().String(), "_", " ")))
	for _, d := range res.GetDifferences() {
		fmt.Fprintf(c.out, "  %s\n", clean(d))
	}
	c.pair("reason", res.GetReason())
	d := res.GetRecorded()
	c.pair("principal", uidText(d.GetPrincipal()))
	c.pair("action", uidText(d.GetAction()))
	c.pair("resource", uidText(d.GetResource()))
	recorded := d.GetDecision().String()
	if d.DeniedAt != nil {
		recorded += " at " + d.GetDeniedAt().String()
	}
	c.pair("recorded", recorded)
	c.pair("revision", fmt.Sprint(d.GetRevision()))
	c.pair("decision", d.GetDecisionId())
}

// printPast prints the explanation of a past decision, or why there is none.
func (c *console) printPast(res *cedarpostv1.ReplayDecisionResponse, wanted bool) {
	switch {
	case res.GetExplanation() != nil:
		c.printExplanation(res.GetExplanation())
	case wanted:
		fmt.Fprintf(c.out, "\nnot explained: %s\n", clean(cmp.Or(res.GetReason(), "it cannot be decided again")))
	}
}

// replaySummary is the outcome of many replays. Its fields are the JSON output.
type replaySummary struct {
	Equal         int               `json:"equal"`
	Different     int               `json:"different"`
	NotReplayable int               `json:"notReplayable"`
	Differing     []replayDifferent `json:"differing"` // by time
	Reasons       map[string]int    `json:"reasons"`   // number of decisions that are not replayable, by reason
	Damaged       []replayDamaged   `json:"damaged"`   // decisions whose row is damaged
}

type replayDamaged struct {
	DecisionID string `json:"decisionId"`
	Damage     string `json:"damage"`
}

type replayDifferent struct {
	DecisionID  string   `json:"decisionId"`
	Differences []string `json:"differences"`
	Reason      string   `json:"reason,omitempty"`
}

func (s *replaySummary) add(res *cedarpostv1.ReplayDecisionResponse) {
	switch res.GetOutcome() {
	case cedarpostv1.ReplayDecisionResponse_EQUAL:
		s.Equal++
	case cedarpostv1.ReplayDecisionResponse_NOT_REPLAYABLE:
		s.NotReplayable++
		s.Reasons[res.GetReason()]++
	default:
		s.Different++
		s.Differing = append(s.Differing, replayDifferent{res.GetRecorded().GetDecisionId(), res.GetDifferences(), res.GetReason()})
	}
}

func (s *replaySummary) total() int { return s.Equal + s.Different + s.NotReplayable + len(s.Damaged) }

func (s *replaySummary) print(c *console, asJSON bool) {
	slices.SortFunc(s.Differing, func(a, b replayDifferent) int { return cmp.Compare(a.DecisionID, b.DecisionID) })
	if asJSON {
		_ = c.object(s) // nothing helps if the reader of the output has gone
		return
	}
	damaged := ""
	if n := len(s.Damaged); n > 0 {
		damaged = fmt.Sprintf(", %d damaged", n)
	}
	fmt.Fprintf(c.out, "%s replayed: %d equal, %d different, %d not replayable%s\n",
		count(s.total(), "decision", "decisions"), s.Equal, s.Different, s.NotReplayable, damaged)
	for i, d := range s.Differing {
		if i == replayNamed {
			fmt.Fprintf(c.out, "  and %d more\n", len(s.Differing)-i)
			break
		}
		fmt.Fprintf(c.out, "  %s  %s\n", c.paint(red, d.DecisionID), clean(strings.Join(d.Differences, "; ")))
		if d.Reason != "" {
			fmt.Fprintf(c.out, "    %s\n", clean(d.Reason))
		}
	}
	for i, d := range s.Damaged {
		if i == replayNamed {
			fmt.Fprintf(c.out, "  and %d more damaged\n", len(s.Damaged)-i)
			break
		}
		fmt.Fprintf(c.out, "  %s  damaged: %s\n", c.paint(red, d.DecisionID), clean(d.Damage))
	}
	for _, reason := range slices.Sorted(maps.Keys(s.Reasons)) {
		fmt.Fprintf(c.out, "  %d not replayable: %s\n", s.Reasons[reason], clean(reason))
	}
}

// many replays all decisions of a query, page by page. It stops at the first error.
func (r *replayDecisionsCmd) many(ctx context.Context, c *console, admin *peer, req *cedarpostv1.QueryDecisionsRequest, sum *replaySummary) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	ids := make(chan string)
	var mu sync.Mutex // of sum and said
	said := time.Now()
	var workers sync.WaitGroup
	for range r.Concurrency {
		workers.Go(func() {
			for id := range ids {
				res, err := call(ctx, admin, admin.audit().ReplayDecision, &cedarpostv1.ReplayDecisionRequest{DecisionId: id})
				if err != nil {
					stop(fmt.Errorf("replay of %s: %w", id, err))
					return
				}
				mu.Lock()
				sum.add(res)
				if now := time.Now(); now.Sub(said) > c.replayInterval() {
					said = now
					c.replayProgress(sum, "")
				}
				mu.Unlock()
			}
		})
	}
	err := r.each(ctx, admin, req, ids, func(d *cedarpostv1.DecisionRecord) {
		mu.Lock()
		defer mu.Unlock()
		sum.Damaged = append(sum.Damaged, replayDamaged{d.GetDecisionId(), d.GetDamaged()})
	})
	close(ids)
	workers.Wait()
	if cause := context.Cause(ctx); cause != nil {
		err = cause
	}
	if c.live && sum.total() > 0 {
		c.replayProgress(sum, "\n")
	}
	return err
}

// each sends the ids of all decisions of a query, and calls damaged for those whose row is
// damaged.
func (r *replayDecisionsCmd) each(ctx context.Context, admin *peer, req *cedarpostv1.QueryDecisionsRequest, ids chan<- string, damaged func(*cedarpostv1.DecisionRecord)) error {
	req.PageSize = 500
	for {
		res, err := call(ctx, admin, admin.audit().QueryDecisions, req)
		if err != nil {
			return inFlags(err)
		}
		for _, d := range res.GetDecisions() {
			if d.GetDamaged() != "" {
				damaged(d)
				continue
			}
			select {
			case ids <- d.GetDecisionId():
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if req.PageToken = res.GetNextPageToken(); req.GetPageToken() == "" {
			return nil
		}
	}
}

// replayInterval is the time between two progress lines. It is short on a terminal, where each
// line overwrites the one before.
func (c *console) replayInterval() time.Duration {
	if c.live {
		return 200 * time.Millisecond
	}
	return 5 * time.Second
}

func (c *console) replayProgress(sum *replaySummary, end string) {
	start := ""
	if c.live {
		start = "\r"
	} else {
		end = "\n"
	}
	fmt.Fprintf(c.err, "%sreplayed %d, %d different%s", start, sum.total(), sum.Different, end)
}
