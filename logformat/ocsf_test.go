package logformat

import (
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/google/uuid"

	"github.com/cedarpost/cedarpost/auditlog"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// at is the time of all rows here.
var at = timestamppb.New(time.Date(2026, 3, 4, 5, 6, 7, 890e6, time.UTC))

func uidOf(typ, id string) *cedarpostv1.EntityUid { return &cedarpostv1.EntityUid{Type: typ, Id: id} }

// oneDecision returns a decision with all fields that an export shows.
func oneDecision() *cedarpostv1.DecisionRecord {
	return &cedarpostv1.DecisionRecord{
		DecisionId: "01900000-0000-7000-8000-000000000001", Time: at, Revision: 7, Caller: "shop", Server: "pdp-1",
		Principal: uidOf("Shop::User", "bob"), Action: uidOf("Shop::Action", "ViewOrder"), Resource: uidOf("Shop::Order", "42"),
		Decision: cedarpostv1.Decision_ALLOW, Fields: &cedarpostv1.Fields{Permitted: []string{"id"}, Denied: []string{"internal.notes"}},
		DeterminingPolicies: []*cedarpostv1.PolicyRef{{Bundle: "shop", Id: "owner-views"}, {Bundle: "shop", Id: "owner-fields"}},
		RequestId:           "req-1", TraceId: "4bf92f3577b34da6a3ce929d0e0e4736", Engine: "e",
	}
}

// batchOf returns leaf 5 of a log, with an entry as its row 1.
func batchOf(e *cedarpostv1.LogEntry) *cedarpostv1.ExportDecisionsResponse {
	header := auditlog.Header{Batch: uuid.New(), Writer: uuid.New(), Server: "pdp-1", Mode: auditlog.Strict, Made: time.UnixMilli(1772600770001)}
	return &cedarpostv1.ExportDecisionsResponse{Leaf: 5, Header: header.Bytes(), Entries: []*cedarpostv1.LogEntry{missingEntry(), e}}
}

func missingEntry() *cedarpostv1.LogEntry {
	return &cedarpostv1.LogEntry{Entry: &cedarpostv1.LogEntry_Missing{Missing: "not there"}}
}

func decisionEntry(change func(*cedarpostv1.DecisionRecord)) *cedarpostv1.LogEntry {
	d := oneDecision()
	if change != nil {
		change(d)
	}
	return &cedarpostv1.LogEntry{Entry: &cedarpostv1.LogEntry_Decision{Decision: d}}
}

func eventEntry(v *cedarpostv1.EventRecord) *cedarpostv1.LogEntry {
	v.EventId, v.Time, v.Server = "01900000-0000-7000-8000-000000000002", at, "pdp-1"
	return &cedarpostv1.LogEntry{Entry: &cedarpostv1.LogEntry_Event{Event: v}}
}

func changeOf(operation, subject string, before, after []byte) *cedarpostv1.EventRecord {
	return &cedarpostv1.EventRecord{
		Kind: cedarpostv1.EventRecord_CHANGE, Caller: "ops", Subject: subject, Revision: 8, RequestId: "r", TraceId: "t",
		Detail: &cedarpostv1.EventRecord_Change{Change: &cedarpostv1.Change{
			Operation: operation, Before: before, After: after, Version: 3, EntityCount: 1, Entities: []*cedarpostv1.EntityUid{uidOf("Shop::User", "bob")}}},
	}
}

// entries has an entry of each kind, with the expected class, activity, severity and action.
var entries = []struct {
	name  string
	entry *cedarpostv1.LogEntry
	want  string
}{
	{"an allow", decisionEntry(nil), "6003.99 severity 1 allowed"},
	{"a deny", decisionEntry(func(d *cedarpostv1.DecisionRecord) {
		d.Decision, d.DeniedAt = cedarpostv1.Decision_DENY, cedarpostv1.DeniedAt_OBJECT.Enum()
		d.Fields, d.DeterminingPolicies, d.RequestId, d.TraceId = nil, nil, "", ""
		d.Principal.Id, d.Resource.Id = "", ""
	}), "6003.99 severity 2 denied"},
	{"a new bundle", eventEntry(changeOf("ApplyBundle", "shop", nil, []byte{1})), "3004.1 severity 1"},
	{"entities", eventEntry(changeOf("WriteEntities", "", []byte{1}, []byte{2})), "3004.3 severity 1"},
	{"a revoked key", eventEntry(changeOf("RevokeKey", "k", []byte{1}, nil)), "3004.4 severity 1"},
	{"an unknown key", eventEntry(&cedarpostv1.EventRecord{
		Kind: cedarpostv1.EventRecord_AUTHENTICATION_FAILURE, Detail: &cedarpostv1.EventRecord_AuthenticationFailure{
			AuthenticationFailure: &cedarpostv1.AuthenticationFailure{
				Reason: "unknown key", Address: "192.0.2.7", Procedure: "/p", Count: 12, First: at, Last: at}},
	}), "3002.1 severity 3 denied"},
	{"no key and no address", eventEntry(&cedarpostv1.EventRecord{
		Kind: cedarpostv1.EventRecord_AUTHENTICATION_FAILURE, Detail: &cedarpostv1.EventRecord_AuthenticationFailure{
			AuthenticationFailure: &cedarpostv1.AuthenticationFailure{Reason: "no credentials", Address: "@"}},
	}), "3002.1 severity 3 denied"},
	{"a bundle refused", eventEntry(&cedarpostv1.EventRecord{
		Kind: cedarpostv1.EventRecord_PUBLISH_REFUSED, Caller: "ci", Subject: "shop", TraceId: "t",
		Detail: &cedarpostv1.EventRecord_PublishRefused{PublishRefused: &cedarpostv1.PublishRefused{
			Bundle: "shop", DryRun: true, Reason: "the bundle is not valid", FindingCount: 7, Findings: []string{"p.cedar:1: no"}, Count: 3, First: at, Last: at}},
	}), "6003.99 severity 3 denied"},
	{"invalid questions", eventEntry(&cedarpostv1.EventRecord{
		Kind: cedarpostv1.EventRecord_PROBING, Caller: "shop", Subject: `Shop::User::"bob"`,
		Detail: &cedarpostv1.EventRecord_Probing{Probing: &cedarpostv1.Probing{
			Reason: "invalid_question", Principal: `Shop::User::"bob"`, Example: "no such type", Count: 3, First: at, Last: at}},
	}), "6003.99 severity 2"},
	{"calls over the rate", eventEntry(&cedarpostv1.EventRecord{
		Kind: cedarpostv1.EventRecord_PROBING, Caller: "shop",
		Detail: &cedarpostv1.EventRecord_Probing{Probing: &cedarpostv1.Probing{Reason: "rate_limited", Count: 1, First: at, Last: at}},
	}), "6003.99 severity 2"},
	{"a right refused", eventEntry(&cedarpostv1.EventRecord{
		Kind: cedarpostv1.EventRecord_REFUSED_RIGHT, Caller: "shop", TraceId: "t",
		Detail: &cedarpostv1.EventRecord_RefusedRight{RefusedRight: &cedarpostv1.RefusedRight{Procedure: "/p", Reason: "no policy permits it"}},
	}), "6003.99 severity 3 denied"},
	{"a read", eventEntry(&cedarpostv1.EventRecord{
		Kind: cedarpostv1.EventRecord_LOG_READ, Caller: "auditor", Subject: "/p",
		Detail: &cedarpostv1.EventRecord_LogRead{LogRead: &cedarpostv1.LogRead{Procedure: "/p", Request: "{}", Rows: 3}},
	}), "6003.2 severity 1 allowed"},
	{"a dropped day", eventEntry(&cedarpostv1.EventRecord{
		Kind: cedarpostv1.EventRecord_RETENTION_DROP, Subject: "2026-01-31",
		Detail: &cedarpostv1.EventRecord_RetentionDrop{RetentionDrop: &cedarpostv1.RetentionDrop{Day: "2026-01-31", Decisions: 5}},
	}), "3004.4 severity 2"},
	{"a checkpoint key", eventEntry(&cedarpostv1.EventRecord{
		Kind: cedarpostv1.EventRecord_CHECKPOINT_KEY, Detail: &cedarpostv1.EventRecord_CheckpointKey{CheckpointKey: &cedarpostv1.CheckpointKey{VerifierKey: "log+1+2"}},
	}), "3004.1 severity 1"},
	{"a state root", eventEntry(&cedarpostv1.EventRecord{
		Kind: cedarpostv1.EventRecord_STATE_ROOT, Subject: "8", Revision: 8,
		Detail: &cedarpostv1.EventRecord_StateRoot{StateRoot: &cedarpostv1.StateRoot{Revision: 8, Root: make([]byte, 32), Entities: 5, Bundles: 1, Keys: 1}},
	}), "3004.1 severity 1"},
	{"a new id of the database", eventEntry(&cedarpostv1.EventRecord{
		Kind: cedarpostv1.EventRecord_DATABASE_RENEWED, Subject: "b",
		Detail: &cedarpostv1.EventRecord_DatabaseRenewed{DatabaseRenewed: &cedarpostv1.DatabaseRenewed{Before: "a", After: "b", Copied: true}},
	}), "3004.3 severity 3"},
	{"a start of a server", eventEntry(&cedarpostv1.EventRecord{
		Kind: cedarpostv1.EventRecord_SERVER_STARTED, Subject: "server 1",
		Detail: &cedarpostv1.EventRecord_ServerStarted{ServerStarted: &cedarpostv1.ServerStarted{Version: "v1.0.0", SettingsDigest: "00", PreviousEventId: "x",
			Differences: []*cedarpostv1.ServerStarted_Difference{{Name: "max-staleness", Before: "5s", After: "1s"}}}},
	}), "3004.3 severity 1"},
	{"a publish past rules", eventEntry(&cedarpostv1.EventRecord{
		Kind: cedarpostv1.EventRecord_BREAK_GLASS, Caller: "ann", Subject: "shop", Revision: 9,
		Detail: &cedarpostv1.EventRecord_BreakGlass{BreakGlass: &cedarpostv1.BreakGlass{Bundle: "shop", Version: 8, Change: "shop-3", Reason: "production is down", Rules: []string{"the bundle shop is frozen"}}},
	}), "3004.3 severity 4"},
	{"batches lost", eventEntry(&cedarpostv1.EventRecord{
		Kind: cedarpostv1.EventRecord_LOG_TRUNCATED, Subject: "log 7 to 5",
		Detail: &cedarpostv1.EventRecord_LogTruncated{LogTruncated: &cedarpostv1.LogTruncated{Statement: "cedarpost-truncation-v1\n"}},
	}), "3004.4 severity 3"},
	{"answers used again", eventEntry(&cedarpostv1.EventRecord{
		Kind: cedarpostv1.EventRecord_REUSE, Caller: "shop", Subject: "r",
		Detail: &cedarpostv1.EventRecord_Reuse{Reuse: &cedarpostv1.ReuseReport{ReportId: "r", Lost: 2, Reuses: []*cedarpostv1.Reuse{
			{DecisionId: "01900000-0000-7000-8000-000000000001", Hits: 3, First: at, Last: at}}}},
	}), "6003.99 severity 1"},
	{"only lost ones", eventEntry(&cedarpostv1.EventRecord{
		Kind: cedarpostv1.EventRecord_REUSE, Detail: &cedarpostv1.EventRecord_Reuse{Reuse: &cedarpostv1.ReuseReport{ReportId: "r", Lost: 2}},
	}), "6003.99 severity 1"},
	{"checks let through", eventEntry(&cedarpostv1.EventRecord{
		Kind: cedarpostv1.EventRecord_FAILED_OPEN, Caller: "shop", Subject: "r",
		Detail: &cedarpostv1.EventRecord_FailedOpen{FailedOpen: &cedarpostv1.FailedOpen{ReportId: "r", FailOpens: []*cedarpostv1.FailOpen{
			{Principal: uidOf("Shop::User", "bob"), Action: uidOf("Shop::Action", "ViewOrder"), Resource: uidOf("Shop::Order", "42"),
				Reason: "catalogue", Code: "unavailable", Count: 4, First: at, Last: at}}}},
	}), "6003.99 severity 3 allowed"},
	{"an unknown kind", eventEntry(&cedarpostv1.EventRecord{Kind: 99, Caller: "shop"}), "6003.99 severity 1"},
	{"a decision whose row is damaged", &cedarpostv1.LogEntry{Entry: &cedarpostv1.LogEntry_Decision{Decision: &cedarpostv1.DecisionRecord{
		DecisionId: "01900000-0000-7000-8000-000000000001", Time: at, Damaged: "its record was altered"}}}, "6003.99 severity 3"},
	{"an event whose row is damaged", eventEntry(&cedarpostv1.EventRecord{Damaged: "its record was altered"}), "6003.99 severity 3"},
}

// ocsfSchema has the rules of schema version 1.6.0 for the objects in use: required attributes,
// attributes of which at least one is required, and optional attributes in use. "" is an event of
// any class.
var ocsfSchema = map[string]struct{ required, oneOf, optional string }{
	"": {"activity_id category_uid class_uid metadata severity_id time type_uid", "",
		"activity_name category_name class_name message severity status status_id status_detail type_name unmapped " +
			"action action_id disposition disposition_id authorizations policy count start_time end_time"},
	"6003":           {"actor api src_endpoint", "", "dst_endpoint resources trace"},
	"3002":           {"user", "service dst_endpoint", "src_endpoint is_remote"},
	"3004":           {"entity", "", "actor comment"},
	"metadata":       {"product version", "", "uid log_name correlation_uid event_code profiles"},
	"product":        {"", "name uid", "vendor_name version"},
	"actor":          {"", "user app_name", ""},
	"user":           {"", "name uid", "type type_id"},
	"api":            {"operation", "", "service request"},
	"service":        {"", "name uid", ""},
	"request":        {"uid", "", ""},
	"src_endpoint":   {"", "ip name", ""},
	"dst_endpoint":   {"", "ip name", ""},
	"resources":      {"", "name uid", "type"},
	"policy":         {"", "name uid", "is_applied"},
	"authorizations": {"", "", "decision policy"},
	"trace":          {"uid", "", ""},
	"entity":         {"", "name uid", "type type_id data"},
}

// ocsfProfiles are the attributes that an event may have only with a profile.
var ocsfProfiles = map[string]string{
	"security_control": "action action_id disposition disposition_id authorizations policy",
	"trace":            "trace",
}

// Attributes that are not a text or an object, by type.
const (
	ocsfNumbers = "activity_id category_uid class_uid severity_id time type_uid status_id action_id disposition_id count start_time end_time type_id"
	ocsfTruths  = "is_remote is_applied"
	ocsfArrays  = "resources authorizations profiles"
	ocsfAnyJSON = "unmapped data"
)

func words(s string) []string { return strings.Fields(s) }

// checkOCSF checks an object against the schema, with the objects in it.
func checkOCSF(t *testing.T, where string, o map[string]any, rules ...string) {
	t.Helper()
	var known []string
	for _, name := range rules {
		r, ok := ocsfSchema[name]
		if !ok {
			t.Errorf("%s: an object that the table does not have", where)
			return
		}
		known = append(known, words(r.required+" "+r.oneOf+" "+r.optional)...)
		for _, key := range words(r.required) {
			if _, ok := o[key]; !ok {
				t.Errorf("%s: %s is missing", where, key)
			}
		}
		if one := words(r.oneOf); len(one) > 0 && !slices.ContainsFunc(one, func(key string) bool { _, ok := o[key]; return ok }) {
			t.Errorf("%s: none of %v", where, one)
		}
	}
	for key, v := range o {
		name := where + "." + key
		if !slices.Contains(known, key) {
			t.Errorf("%s is not of the schema", name)
		}
		is := func(list string) bool { return slices.Contains(words(list), key) }
		switch v := v.(type) {
		case map[string]any:
			if !is(ocsfAnyJSON) {
				checkOCSF(t, name, v, key)
			}
		case []any:
			for _, e := range v {
				if e, ok := e.(map[string]any); ok {
					checkOCSF(t, name, e, key)
				}
			}
			if !is(ocsfArrays) || len(v) == 0 {
				t.Errorf("%s: an array", name)
			}
		case float64:
			if !is(ocsfNumbers) || v != math.Trunc(v) {
				t.Errorf("%s: %v", name, v)
			}
		case bool:
			if !is(ocsfTruths) {
				t.Errorf("%s: %v", name, v)
			}
		case string:
			if is(ocsfNumbers) || is(ocsfTruths) || v == "" {
				t.Errorf("%s: %q", name, v)
			}
		default:
			t.Errorf("%s: %v", name, v)
		}
	}
}

// Each kind of row becomes an event that conforms to the schema.
func TestOCSF(t *testing.T) {
	kinds := maps.Clone(cedarpostv1.EventRecord_Kind_name)
	delete(kinds, 0)
	for _, c := range entries {
		delete(kinds, int32(c.entry.GetEvent().GetKind()))
	}
	if len(kinds) > 0 {
		t.Errorf("not tried: %v", kinds)
	}
	for _, c := range entries {
		line, err := OCSF(batchOf(c.entry), 1, "v1")
		if err != nil || strings.Count(line, "\n") != 1 {
			t.Fatalf("%s: %q, %v", c.name, line, err)
		}
		var o map[string]any
		if err := json.Unmarshal([]byte(line), &o); err != nil {
			t.Fatal(err)
		}
		class := fmt.Sprint(o["class_uid"])
		checkOCSF(t, c.name, o, "", class)
		got := fmt.Sprintf("%s.%v severity %v", class, o["activity_id"], o["severity_id"])
		if action, ok := o["action"].(string); ok {
			got += " " + strings.ToLower(action)
		}
		if got != c.want {
			t.Errorf("%s is %s, want %s", c.name, got, c.want)
		}
		number := func(key string) int { return int(o[key].(float64)) }
		if number("type_uid") != 100*number("class_uid")+number("activity_id") || number("category_uid") != number("class_uid")/1000 {
			t.Errorf("%s: type %d of class %d", c.name, number("type_uid"), number("class_uid"))
		}
		if number("time") != 1772600767890 {
			t.Errorf("%s: at %d", c.name, number("time"))
		}
		meta, unmapped := o["metadata"].(map[string]any), o["unmapped"].(map[string]any)
		if meta["version"] != ocsfVersion || !strings.HasPrefix(meta["uid"].(string), "01900000-") || unmapped["leaf"] != 5.0 || unmapped["row"] != 1.0 {
			t.Errorf("%s: %v, %v", c.name, meta, unmapped)
		}
		// Attributes of a profile need the profile.
		profiles := fmt.Sprint(meta["profiles"])
		for profile, keys := range ocsfProfiles {
			for _, key := range words(keys) {
				if _, used := o[key]; used && !strings.Contains(profiles, profile) {
					t.Errorf("%s: %s without the profile %s", c.name, key, profile)
				}
			}
		}
	}
}

// A missing row has the time of its batch, because the schema requires a time. If the header of the
// batch is damaged as well, the event has no time rather than a wrong one.
func TestOCSFMissing(t *testing.T) {
	b := batchOf(missingEntry())
	for header, want := range map[string]float64{string(b.GetHeader()): 1772600770001, "damaged": 0} {
		b.Header = []byte(header)
		line, err := OCSF(b, 1, "v1")
		var o map[string]any
		if err := errors.Join(err, json.Unmarshal([]byte(line), &o)); err != nil {
			t.Fatal(err)
		}
		if want == 0 {
			if _, ok := o["time"]; ok {
				t.Errorf("a time that is not known: %s", line)
			}
			continue
		}
		checkOCSF(t, "missing", o, "", "6003")
		if o["time"] != want || !strings.Contains(line, "leaf 5 row 1") || !strings.Contains(line, "missing: not there") {
			t.Error(line)
		}
	}
}

func TestOCSFDecision(t *testing.T) {
	o := ocsfDecision(oneDecision())
	text, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`"actor":{"app_name":"shop","user":{"name":"bob","type":"Shop::User","type_id":99,"uid":"Shop::User::\"bob\""}}`,
		`"operation":"Shop::Action::\"ViewOrder\""`, `"request":{"uid":"req-1"}`, `"correlation_uid":"req-1"`,
		`"trace":{"uid":"4bf92f3577b34da6a3ce929d0e0e4736"}`, `"profiles":["security_control","trace"]`,
		`"resources":[{"name":"42","type":"Shop::Order","uid":"Shop::Order::\"42\""}]`,
		`"policy":{"is_applied":true,"name":"owner-views","uid":"shop/owner-views"}`, `"uid":"shop/owner-fields"`,
		`"fields_denied":["internal.notes"],"fields_permitted":["id"]`, `"status_detail":"ALLOW"`, `"disposition":"Allowed"`,
	} {
		if !strings.Contains(string(text), want) {
			t.Errorf("no %s in\n%s", want, text)
		}
	}
	if keys := slices.Sorted(maps.Keys(o)); slices.Contains(keys, "context") {
		t.Error("the context of a decision is exported")
	}
}
