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

// Decision is one question to the service and its answer.
type Decision struct {
	ID string

	Principal, Action, Resource cedarpost.EntityUID
	// Context is the context of the question, in the types of JSON.
	Context map[string]any
	// Fields, AllFields and RequireAllFields are as in [cedarpost.Check].
	Fields                      []string
	AllFields, RequireAllFields bool
	RequestID                   string

	Allowed           bool
	DeniedAt          cedarpost.DeniedAt
	Permitted, Denied []string

	// Uses is how often clients reported that they reused the answer.
	Uses int64
}

// String returns the decision in one line, such as Shop::User::"bob"
// Shop::Action::"ViewOrder" Shop::Order::"42": allow.
func (d Decision) String() string {
	outcome := "allow"
	if !d.Allowed {
		outcome = "deny at " + string(d.DeniedAt)
	}
	return fmt.Sprintf("%s %s %s: %s", d.Principal, d.Action, d.Resource, outcome)
}

// FailOpen is a number of equal checks that a client let through without an answer and
// reported.
type FailOpen struct {
	Principal, Action, Resource cedarpost.EntityUID
	// Reason is the FailOpen of the check, Code the code of the error.
	Reason, Code string
	Count        int64
}

// journal has the decisions and the reports of a service.
type journal struct {
	mu        sync.Mutex
	decisions []Decision
	byID      map[string]int // index in decisions
	failOpens []FailOpen
	reports   map[string]bool // ids of accepted reports
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

// Decisions returns the decisions, oldest first. Checks that were refused as invalid and
// checks that a client answered from its cache are not among them.
func (s *Service) Decisions() []Decision {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	return slices.Clone(s.log.decisions)
}

// ForgetDecisions empties [Service.Decisions], for example before the next step of a test.
func (s *Service) ForgetDecisions() {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	s.log.decisions, s.log.byID = nil, map[string]int{}
}

// FailOpens returns the checks that clients let through without an answer and reported.
// Clients report at intervals, and when they are closed.
func (s *Service) FailOpens() []FailOpen {
	s.log.mu.Lock()
	defer s.log.mu.Unlock()
	return slices.Clone(s.log.failOpens)
}

// ReportReuse implements cedarpost.v1.AuthorizationService. Unlike a server, it accepts
// decisions of any age, because a test may have a clock of its own.
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
		return &cedarpostv1.ReportReuseResponse{}, nil // it was sent again, and counts once
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
