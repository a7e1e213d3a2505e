package cedarposttest

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
)

// Decision is one answer of the service, and what was asked.
type Decision struct {
	ID string

	Principal, Action, Resource cedarpost.EntityUID
	// Context is as it came, in the types of JSON.
	Context map[string]any
	// Fields, AllFields and RequireAllFields are as in [cedarpost.Check].
	Fields                      []string
	AllFields, RequireAllFields bool
	RequestID                   string

	Allowed           bool
	DeniedAt          cedarpost.DeniedAt
	Permitted, Denied []string

	// Uses is how often clients reported that they gave the answer again from their
	// caches.
	Uses int64
}

// String is the decision in a line, as Shop::User::"bob" Shop::Action::"ViewOrder"
// Shop::Order::"42": allow.
func (d Decision) String() string {
	outcome := "allow"
	if !d.Allowed {
		outcome = "deny at " + string(d.DeniedAt)
	}
	return fmt.Sprintf("%s %s %s: %s", d.Principal, d.Action, d.Resource, outcome)
}

// FailOpen is a number of equal checks that a client reported to have let through
// without an answer.
type FailOpen struct {
	Principal, Action, Resource cedarpost.EntityUID
	// Reason is that of the check, Code the error that there was.
	Reason, Code string
	Count        int64
}

// journal is what was decided and reported.
type journal struct {
	mu        sync.Mutex
	decisions []Decision
	byID      map[string]int // place in decisions
	failOpens []FailOpen
	reports   map[string]bool // that were taken, by id
}

func uidOf(u *cedarpostv1.EntityUid) cedarpost.EntityUID {
	return cedarpost.UID(u.GetType(), u.GetId())
}

func (j *journal) add(req *cedarpostv1.AuthorizeRequest, res *cedarpostv1.AuthorizeResponse) {
	d := Decision{
		ID: res.GetDecisionId(), Principal: uidOf(req.GetPrincipal()), Action: uidOf(req.GetAction()), Resource: uidOf(req.GetResource()),
		Context: req.GetContext().AsMap(), RequestID: req.GetRequestId(),
		Fields: req.GetFields().GetPaths(), AllFields: req.GetFields().GetAll(), RequireAllFields: req.GetFields().GetRequireAll(),
		Allowed: res.GetDecision() == cedarpostv1.Decision_ALLOW, Permitted: res.GetFields().GetPermitted(), Denied: res.GetFields().GetDenied(),
	}
	if res.DeniedAt != nil {
		d.DeniedAt = cedarpost.DeniedAt(res.GetDeniedAt().String())
	}
	j.mu.Lock()
	defer j.mu.Unlock()
	j.byID[d.ID] = len(j.decisions)
	j.decisions = append(j.decisions, d)
}

// Decisions are what was decided, oldest first. A check that was refused as a bad
// question is not among them, and neither is one that was answered from a cache.
func (s *Service) Decisions() []Decision {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	return slices.Clone(s.log.decisions)
}

// ForgetDecisions empties [Service.Decisions], as before the next step of a test.
func (s *Service) ForgetDecisions() {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	s.log.decisions, s.log.byID = nil, map[string]int{}
}

// FailOpens are the checks that clients let through without an answer, as far as they
// have reported them: at intervals, and when they are closed.
func (s *Service) FailOpens() []FailOpen {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	return slices.Clone(s.log.failOpens)
}

// ReportReuse implements cedarpost.v1.AuthorizationService. Unlike the real one, it
// does not look at how old a decision is: a test may have a clock of its own.
func (s handler) ReportReuse(_ context.Context, req *cedarpostv1.ReportReuseRequest) (*cedarpostv1.ReportReuseResponse, error) {
	j := &s.log
	j.mu.Lock()
	defer j.mu.Unlock()
	seen := map[string]bool{}
	for i, r := range req.GetReuses() {
		id := strings.ToLower(r.GetDecisionId())
		if seen[id] {
			return nil, connect.Errorf(connect.CodeInvalidArgument, "reuses[%d].decision_id: stands there twice", i)
		}
		seen[id] = true
	}
	if j.reports[req.GetReportId()] {
		return &cedarpostv1.ReportReuseResponse{}, nil // sent again, and counts once
	}
	j.reports[req.GetReportId()] = true
	for _, r := range req.GetReuses() {
		if i, ok := j.byID[strings.ToLower(r.GetDecisionId())]; ok {
			j.decisions[i].Uses += r.GetHits()
		}
	}
	for _, f := range req.GetFailOpens() {
		j.failOpens = append(j.failOpens, FailOpen{
			Principal: uidOf(f.GetPrincipal()), Action: uidOf(f.GetAction()), Resource: uidOf(f.GetResource()),
			Reason: f.GetReason(), Code: f.GetCode(), Count: f.GetCount(),
		})
	}
	return &cedarpostv1.ReportReuseResponse{}, nil
}
