package server_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cedarpost/cedarpost/auditlog"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
)

const (
	replayedEqual     = cedarpostv1.ReplayDecisionResponse_EQUAL
	replayedDifferent = cedarpostv1.ReplayDecisionResponse_DIFFERENT
	notReplayable     = cedarpostv1.ReplayDecisionResponse_NOT_REPLAYABLE
)

func replay(t testing.TB, s *servertest.Server, id string) *cedarpostv1.ReplayDecisionResponse {
	t.Helper()
	res, err := s.Audit.ReplayDecision(t.Context(), &cedarpostv1.ReplayDecisionRequest{DecisionId: id})
	if err != nil {
		t.Fatal(err)
	}
	return res
}

// labSchema has everything that a decision can depend on: the time of the server, entities of
// the request, tags, extension values, sets, and numbers that are too large for JSON.
const labSchema = `namespace Lab {
  entity Team in [Team];
  entity User in [Team] { level: Long, boss?: User } tags Long;
  entity Item in [Item] { owner: User, n: Long };
  @source("request") entity Draft { author: User, size: Long, words: Set<String>, about?: Item };
  entity FieldGroup in [FieldGroup];
  entity Field in [Field, FieldGroup];
  action All;
  action Look in [All] appliesTo { principal: [User], resource: [Item], context: { now: datetime, ok: Bool, n: Long, ip?: ipaddr, ids?: Set<Item>, price?: decimal } };
  action "Look.field" in [All] appliesTo { principal: [User], resource: [Item], context: { now: datetime, ok: Bool, n: Long, ip?: ipaddr, ids?: Set<Item>, price?: decimal, field: Field } };
  action Post in [All] appliesTo { principal: [User], resource: [Draft], context: { n: Long } };
}`

const labFields = `Lab::Item:
  a: [open]
  b.c: [open, secret]
  b.d: [secret]
  e: []
`

// labPolicies are the policies from which each publish draws some. Some of them fail, and some
// of these in two ways at the same time. SOON is a time shortly after the publish.
var labPolicies = []string{
	`permit (principal, action == Lab::Action::"Look", resource) when { resource.owner == principal };`,
	`permit (principal in Lab::Team::"t1", action == Lab::Action::"Look", resource);`,
	`@obligation("tell") permit (principal, action == Lab::Action::"Look", resource) when { context.now < datetime("SOON") };`,
	`permit (principal, action == Lab::Action::"Look", resource) when { principal has boss && principal.boss.level > 1 };`,
	`permit (principal, action == Lab::Action::"Look", resource) when { context has ids && context.ids.contains(resource) };`,
	`permit (principal, action == Lab::Action::"Look", resource) when { context has ip && context.ip.isInRange(ip("10.0.0.0/8")) };`,
	`permit (principal, action == Lab::Action::"Look", resource) when { context has price && context.price.lessThan(decimal("1.5")) };`,
	`permit (principal, action == Lab::Action::"Look", resource) when { principal.hasTag("x") && principal.getTag("x") == context.n };`,
	`permit (principal, action == Lab::Action::"Look", resource) when { context.n + 1 > 5 };`,
	`permit (principal, action == Lab::Action::"Look", resource) when { {a: resource.n + context.n, b: principal.level + context.n} == {a: 1, b: 2} };`,
	`@advice("ask the boss") forbid (principal, action == Lab::Action::"Look", resource) when { principal.level * 9223372036854775807 > 0 };`,
	`@advice("later") forbid (principal, action, resource) when { principal.level == 0 };`,
	`permit (principal, action == Lab::Action::"Look.field", resource) when { context.field in Lab::FieldGroup::"open" };`,
	`permit (principal, action == Lab::Action::"Look.field", resource) when { resource.owner == principal && context.field in Lab::FieldGroup::"secret" };`,
	`@advice("say ok") forbid (principal, action == Lab::Action::"Look.field", resource) when { context.field in Lab::FieldGroup::"secret" } unless { context.ok };`,
	`permit (principal, action == Lab::Action::"Look.field", resource) when { context.now.toTime() >= duration("0s") && context.n == 3 };`,
	`permit (principal, action == Lab::Action::"Post", resource) when { resource.author == principal && resource.size < context.n };`,
	`permit (principal, action == Lab::Action::"Post", resource) when { resource.words.contains("please") && resource has about && resource.about.n > 0 };`,
}

// lab makes random changes and asks random questions.
type lab struct {
	*rand.Rand
	t *testing.T
	s *servertest.Server
}

func (l lab) pick(from ...string) string { return from[l.IntN(len(from))] }
func (l lab) user() string               { return l.pick("ann", "ben", "cat", "nobody") }
func (l lab) item() string               { return l.pick("i1", "i2", "i3", "none") }

func (l lab) publish() {
	var policies strings.Builder
	for i, p := range labPolicies {
		if l.IntN(3) > 0 {
			fmt.Fprintf(&policies, "@id(\"p%d\") %s\n", i, p)
		}
	}
	soon := time.Now().Add(time.Duration(l.IntN(2000)) * time.Millisecond).UTC().Format("2006-01-02T15:04:05.000Z")
	files := servertest.Files(
		"schema.cedarschema", labSchema, "fields.yaml", labFields,
		"bundle.yaml", "name: lab\non_forbid_error: "+l.pick("deny", "skip")+"\n",
		"p.cedar", strings.ReplaceAll(policies.String(), "SOON", soon))
	if _, err := l.s.Apply("lab", files); err != nil && connect.CodeOf(err) != connect.CodeAborted {
		l.t.Error(err)
	}
}

func (l lab) change() {
	switch l.IntN(4) {
	case 0:
		order := fmt.Sprintf(`{"uid":{"type":"Shop::Order","id":"42"},"attrs":{"owner":{"type":"Shop::User","id":%q},"region":"eu","status":%q,"total":3},"parents":[]}`,
			l.pick("bob", "carol"), l.pick("open", "archived"))
		l.s.MustPut(servertest.Entity(l.t, order))
	case 1:
		l.s.MustPut(servertest.Entity(l.t, fmt.Sprintf(`{"uid":{"type":"Lab::Item","id":%q},"attrs":{"owner":{"type":"Lab::User","id":%q},"n":%d},"parents":[{"type":"Lab::Item","id":"all"}]}`,
			l.pick("i1", "i2", "i3"), l.user(), l.IntN(3))))
	default:
		boss, tags := "", ""
		if l.IntN(2) == 0 {
			boss = fmt.Sprintf(`,"boss":{"type":"Lab::User","id":%q}`, l.user())
		}
		if l.IntN(2) == 0 {
			tags = fmt.Sprintf(`"x":%d`, l.IntN(4))
		}
		l.s.MustPut(servertest.Entity(l.t, fmt.Sprintf(`{"uid":{"type":"Lab::User","id":%q},"attrs":{"level":%d%s},"tags":{%s},"parents":[{"type":"Lab::Team","id":%q}]}`,
			l.pick("ann", "ben", "cat"), l.IntN(4), boss, tags, l.pick("t1", "t2"))))
	}
}

func (l lab) question() *cedarpostv1.AuthorizeRequest {
	n := l.pick("3", "7", `"9223372036854775807"`)
	var req *cedarpostv1.AuthorizeRequest
	switch l.IntN(4) {
	case 0:
		req = servertest.AskShop(l.pick("bob", "alice", "dave", "mallory", "nobody"), l.pick("ViewOrder", "EditOrder", "DeleteOrder", "RefundOrder"), l.pick("42", "99", "none"), l.IntN(2) == 0)
		if id := req.Action.Id; id == "ViewOrder" || id == "EditOrder" {
			req.Fields = l.fields("id", "customer", "internal.notes", "total")
		}
		return req
	case 1:
		draft := servertest.Entity(l.t, fmt.Sprintf(`{"uid":{"type":"Lab::Draft","id":"d"},"attrs":{"author":{"type":"Lab::User","id":%q},"size":%d,"words":["a","please","b"]%s}}`,
			l.user(), l.IntN(9), l.pick("", `,"about":{"__entity":{"type":"Lab::Item","id":"i1"}}`)))
		req = &cedarpostv1.AuthorizeRequest{Action: servertest.UID(`Lab::Action::"Post"`), Resource: draft.Uid, Entities: []*cedarpostv1.Entity{draft}}
		req.Context = structOf(l.t, `{"n": `+n+`}`)
	default:
		req = &cedarpostv1.AuthorizeRequest{Action: servertest.UID(`Lab::Action::"Look"`), Resource: servertest.UID(`Lab::Item::"` + l.item() + `"`), Fields: l.fields("a", "b", "b.d", "e")}
		req.Context = structOf(l.t, `{"n": `+n+`, "ok": `+l.pick("true", "false")+
			l.pick("", `, "ip": "10.1.2.3"`, `, "ip": {"__extn":{"fn":"ip","arg":"::1"}}`)+
			l.pick("", `, "ids": [{"type":"Lab::Item","id":"i1"},{"type":"Lab::Item","id":"i2"}]`)+
			l.pick("", `, "price": "1.25"`)+`}`)
	}
	req.Principal = servertest.UID(`Lab::User::"` + l.user() + `"`)
	return req
}

func (l lab) fields(paths ...string) *cedarpostv1.FieldSelection {
	f := &cedarpostv1.FieldSelection{RequireAll: l.IntN(4) == 0}
	switch l.IntN(4) {
	case 0:
		return nil
	case 1:
		f.All = true
	default:
		l.Shuffle(len(paths), func(i, j int) { paths[i], paths[j] = paths[j], paths[i] })
		f.Paths = append([]string{l.pick("a", "not.catalogued")}, paths[:1+l.IntN(len(paths)-1)]...)
	}
	return f
}

// The replay of a decision has the same outcome, although policies and data have changed: on the
// server that decided, and on one that reads everything from the database.
func TestReplayOfEverythingIsEqual(t *testing.T) {
	t.Parallel() // it takes long
	s := servertest.New(t)
	s.MustLoadShop()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	asking := lab{rand.New(rand.NewPCG(seed, 1)), t, s}
	changing := lab{rand.New(rand.NewPCG(seed, 2)), t, s}
	if changing.publish(); t.Failed() {
		return
	}
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for n := 0; ; n++ {
			select {
			case <-done:
				return
			default:
			}
			if n%8 == 0 {
				changing.publish()
			} else {
				changing.change()
			}
		}
	})
	const questions, revisions = 400, 30 // at least
	var answered []*cedarpostv1.AuthorizeResponse
	changed := func() int64 {
		return answered[len(answered)-1].GetRevision().GetNumber() - answered[0].GetRevision().GetNumber()
	}
	for (len(answered) < questions || changed() < revisions) && !t.Failed() {
		if asking.IntN(4) > 0 {
			answered = append(answered, authorize(t, s, asking.question()))
			continue
		}
		batch := &cedarpostv1.AuthorizeBatchRequest{}
		for range 5 {
			batch.Checks = append(batch.Checks, asking.question())
		}
		res, err := s.Authorization.AuthorizeBatch(t.Context(), batch)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range res.Results {
			if r.GetResponse() == nil {
				t.Fatal(r)
			}
			answered = append(answered, r.GetResponse())
		}
	}
	close(done)
	wg.Wait()

	// The test is of no use unless each kind of outcome has occurred.
	kinds := map[string]int{}
	for _, r := range answered {
		kinds[fmt.Sprint(r.Decision, r.GetDeniedAt())]++
		for kind, yes := range map[string]bool{
			"error": len(r.Errors) > 0, "obligation": len(r.Obligations) > 0, "advice": len(r.Advice) > 0,
			"permitted": len(r.GetFields().GetPermitted()) > 0, "denied": len(r.GetFields().GetDenied()) > 0,
		} {
			if yes {
				kinds[kind]++
			}
		}
	}
	t.Log(kinds)
	if len(kinds) < 9 || changed() < revisions {
		t.Errorf("too little came up: %v", kinds)
	}

	fresh := servertest.On(t, s.URL)
	wrong := 0
	for i, r := range answered {
		server := s
		if i%2 == 0 {
			server = fresh
		}
		got := replay(t, server, r.DecisionId)
		if got.Outcome != replayedEqual || len(got.Differences) > 0 || got.Reason != "" {
			if wrong++; wrong < 4 {
				t.Errorf("%s: %v, reason %q\n%s\nrecorded %v", got.Outcome, got.Differences, got.Reason, r.DecisionId, got.Recorded)
			}
		}
	}
	if wrong > 0 {
		t.Errorf("%d of %d do not replay to the same", wrong, len(answered))
	}
}

// insert puts a made-up record into the log.
func insert(t *testing.T, s *servertest.Server, rec *cedarpostv1.DecisionRecord) string {
	t.Helper()
	id := uuid.Must(uuid.NewV7())
	rec.DecisionId = id.String()
	rec.Time = timestamppb.New(time.Unix(id.Time().UnixTime()).UTC().Truncate(time.Millisecond))
	w := s.DB.NewLogWriter("tamper", auditlog.Strict, 0)
	defer w.Close()
	if _, err := w.Append(t.Context(), []store.Decision{server.DecisionRow(rec)}, nil); err != nil {
		t.Fatal(err)
	}
	return rec.DecisionId
}

// The replay of an altered record finds what differs, whatever part was altered.
func TestReplayFindsDifferences(t *testing.T) {
	t.Parallel() // it takes long
	s := servertest.New(t)
	s.MustLoadShop()
	view := authorize(t, s, servertest.WithAllFields(servertest.AskShop("alice", "ViewOrder", "42", false)))
	refund := authorize(t, s, servertest.AskShop("erin", "RefundOrder", "42", true))
	stranger := authorize(t, s, servertest.AskShop("stranger", "ViewOrder", "42", true))
	own := authorize(t, s, servertest.AskShop("bob", "ViewOrder", "42", true))
	// Now carol owns the order of bob.
	later := s.MustPut(servertest.Entity(t, `{"uid":{"type":"Shop::Order","id":"42"},"attrs":{"owner":{"type":"Shop::User","id":"carol"},"region":"eu","status":"open","total":3},"parents":[]}`))
	for _, c := range []struct {
		name   string
		of     *cedarpostv1.AuthorizeResponse
		change func(*cedarpostv1.DecisionRecord)
		want   []string
	}{
		{"as it was", view, func(*cedarpostv1.DecisionRecord) {}, nil},
		{"another revision", own, func(r *cedarpostv1.DecisionRecord) { r.Revision = later.Number },
			[]string{"decision: recorded ALLOW, replayed DENY", "denied at: recorded nothing, replayed OBJECT", "policies: only recorded: shop/owner-views"}},
		{"decision", own, func(r *cedarpostv1.DecisionRecord) {
			r.Decision, r.DeniedAt, r.DeterminingPolicies = cedarpostv1.Decision_DENY, cedarpostv1.DeniedAt_FUNCTION.Enum(), nil
		}, []string{"decision: recorded DENY, replayed ALLOW", "denied at: recorded FUNCTION, replayed nothing", "policies: only replayed: shop/owner-views"}},
		{"permitted field", view, func(r *cedarpostv1.DecisionRecord) { r.Fields.Permitted = append(r.Fields.Permitted, "total") },
			[]string{"permitted fields: only recorded: total"}},
		{"denied field", view, func(r *cedarpostv1.DecisionRecord) { r.Fields.Denied = r.Fields.Denied[1:] },
			[]string{"denied fields: only replayed: customer.email"}},
		{"no fields", view, func(r *cedarpostv1.DecisionRecord) { r.Fields = nil }, []string{"fields: recorded none decided, replayed decided", "permitted fields: only replayed: id, items, status", "denied fields: only replayed: "}},
		{"order of policies", view, func(r *cedarpostv1.DecisionRecord) { slices.Reverse(r.DeterminingPolicies) },
			[]string{"policies: recorded shop/support-fields, shop/support-views, replayed shop/support-views, shop/support-fields"}},
		{"advice", view, func(r *cedarpostv1.DecisionRecord) { r.Advice[0].Paths = r.Advice[0].Paths[1:] },
			[]string{"advice: recorded step_up_mfa of shop/pii-needs-mfa for customer.name, shipping.address, replayed step_up_mfa of shop/pii-needs-mfa for customer.email, "}},
		{"obligation", refund, func(r *cedarpostv1.DecisionRecord) { r.Obligations = nil },
			[]string{"obligations: only replayed: notify_customer of shop/finance-refunds"}},
		{"error", stranger, func(r *cedarpostv1.DecisionRecord) { r.Errors[0].Message = "is fine" },
			[]string{"errors: recorded shop/suspended (is fine), replayed shop/suspended (entity `Shop::User::\"stranger\"` does not exist)"}},
		{"errors omitted", stranger, func(r *cedarpostv1.DecisionRecord) { r.ErrorsOmitted = 3 }, []string{"errors omitted: recorded 3, replayed 0"}},
		{"principal", own, func(r *cedarpostv1.DecisionRecord) { r.Principal.Id = "carol" }, []string{"decision: recorded ALLOW, replayed DENY", "denied at", "policies"}},
		{"context", view, func(r *cedarpostv1.DecisionRecord) { r.Context = structOf(t, `{"mfa": true}`) }, []string{"permitted fields: only replayed: customer.email", "denied fields", "advice"}},
		{"no context", own, func(r *cedarpostv1.DecisionRecord) { r.Context = nil }, []string{`decision: recorded ALLOW, replayed to an error: context: required attribute "mfa" is missing`}},
		{"everything gone", own, func(r *cedarpostv1.DecisionRecord) {
			proto.Reset(r)
			r.Revision = own.Revision.Number
		}, []string{"decision: recorded DECISION_UNSPECIFIED, replayed to an error: "}},
	} {
		t.Run(c.name, func(t *testing.T) {
			rec, _ := recordOf(t, s, c.of)
			c.change(rec)
			for _, engine := range []string{rec.Engine, "cedarpost-0"} {
				rec.Engine = engine
				got := replay(t, s, insert(t, s, rec))
				want := replayedDifferent
				if len(c.want) == 0 {
					want = replayedEqual
				}
				if got.Outcome != want || len(got.Differences) != len(c.want) || !slices.EqualFunc(got.Differences, c.want, strings.HasPrefix) {
					t.Errorf("%s:\n%s\nwant\n%s", got.Outcome, strings.Join(got.Differences, "\n"), strings.Join(c.want, "\n"))
				}
				if said := strings.Contains(got.Reason, "recorded cedarpost-0, replayed cedarpost-3"); said != (engine == "cedarpost-0" && len(c.want) > 0) {
					t.Errorf("engine %s: reason %q", engine, got.Reason)
				}
				if failed := strings.Contains(strings.Join(c.want, ""), "replayed to an error"); !proto.Equal(got.Recorded, rec) || (got.Replayed == nil) != failed {
					t.Errorf("recorded %v\nreplayed %v", got.Recorded, got.Replayed)
				}
			}
		})
	}
}

// If a decision cannot be replayed, the answer says why. Each replay is recorded as a read of
// the log.
func TestReplayNotPossible(t *testing.T) {
	t.Parallel() // it takes long
	s := servertest.New(t)
	s.MustApply("h", maskedBundle...)
	s.MustLoadShop()
	masked := authorize(t, s, maskedRequest(t, "756.1234", "5"))
	first := authorize(t, s, servertest.AskShop("bob", "ViewOrder", "42", true))
	impossible := func(id, reason string) {
		t.Helper()
		got := replay(t, s, id)
		if got.Outcome != notReplayable || !strings.Contains(got.Reason, reason) || len(got.Differences) > 0 || got.Replayed != nil || got.Recorded == nil {
			t.Errorf("%v, want %q", got, reason)
		}
	}
	impossible(masked.DecisionId, "values are masked: context.codes, context.pin, entities[0].attrs.ssn")
	rec, _ := recordOf(t, s, first)
	rec.Revision += 1000
	impossible(insert(t, s, rec), "this database has no such revision")
	if got := replay(t, s, first.DecisionId); got.Outcome != replayedEqual {
		t.Errorf("before history was swept: %v", got)
	}
	s.MustPut(servertest.Entity(t, `{"uid":{"type":"Shop::Role","id":"new"}}`))
	exec(t, s.URL, fmt.Sprintf("update history set oldest = %d", first.Revision.Number+1))
	impossible(first.DecisionId, "history no longer goes back to its revision")

	unknown := uuid.Must(uuid.NewV7()).String()
	_, err := s.Audit.ReplayDecision(t.Context(), &cedarpostv1.ReplayDecisionRequest{DecisionId: unknown})
	servertest.WantCode(t, err, connect.CodeNotFound, unknown)
	for _, id := range []string{masked.DecisionId, first.DecisionId, unknown} {
		if n := rowsWith(t, s.URL, "events", id); n == 0 {
			t.Errorf("nothing in the log says that %s was replayed", id)
		}
	}
}

// If several members of a record fail, each answer and each replay has the message of the member
// whose name comes first.
func TestReplayOfErrorsInRecords(t *testing.T) {
	s := servertest.New(t)
	s.MustApply("v", "schema.cedarschema", `namespace V { entity U { n: Long }; action A appliesTo { principal: [U], resource: [U], context: { m: Long } }; }`,
		"p.cedar", `@id("p") permit (principal, action, resource) when { {a: context.m + context.m, b: principal.n, c: context.m * 2} == {a: 1, b: 1, c: 2} };`)
	told := map[string]bool{}
	for range 20 {
		res := authorize(t, s, &cedarpostv1.AuthorizeRequest{
			Principal: servertest.UID(`V::U::"u"`), Action: servertest.UID(`V::Action::"A"`), Resource: servertest.UID(`V::U::"u"`),
			Context: structOf(t, `{"m": "9223372036854775807"}`),
		})
		told[res.Errors[0].Message] = true
		if got := replay(t, s, res.DecisionId); got.Outcome != replayedEqual {
			t.Fatal(got.Differences)
		}
	}
	if len(told) != 1 {
		t.Errorf("the message varies: %v", told)
	}
}
