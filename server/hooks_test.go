package server

import (
	"encoding/hex"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/store"
)

// DecisionRow returns the row of a record.
func DecisionRow(rec *cedarpostv1.DecisionRecord) store.Decision {
	record, err := proto.Marshal(rec)
	if err != nil {
		panic(err)
	}
	row, err := decisionlog.DecisionRow(rec, record)
	if err != nil {
		panic(err)
	}
	return row
}

// Recorded returns a row with a record that has the values of its columns. Only the record
// has engine.
func Recorded(d store.Decision, engine string) store.Decision {
	rec := &cedarpostv1.DecisionRecord{
		DecisionId: d.ID.String(), Time: timestamppb.New(d.At), Revision: d.Revision, Caller: d.Caller, Server: d.Server,
		Principal: stored.ToProto(d.Principal), Action: stored.ToProto(d.Action), Resource: stored.ToProto(d.Resource),
		Decision: cedarpostv1.Decision_DENY, RequestId: d.RequestID, TraceId: d.TraceID, Engine: engine,
	}
	if d.Allowed {
		rec.Decision = cedarpostv1.Decision_ALLOW
	}
	if d.DeniedAt != 0 {
		rec.DeniedAt = cedarpostv1.DeniedAt(d.DeniedAt).Enum()
	}
	for _, p := range d.Policies {
		bundle, id, _ := strings.Cut(p, "/")
		rec.DeterminingPolicies = append(rec.DeterminingPolicies, &cedarpostv1.PolicyRef{Bundle: bundle, Id: id})
	}
	for _, f := range d.Fields {
		if rec.Fields == nil {
			rec.Fields = &cedarpostv1.Fields{}
		}
		if path, ok := strings.CutPrefix(f, "+"); ok {
			rec.Fields.Permitted = append(rec.Fields.Permitted, path)
		} else {
			rec.Fields.Denied = append(rec.Fields.Denied, f[1:])
		}
	}
	var masked []any
	for _, m := range d.Masked {
		masked = append(masked, map[string]any{"__masked": hex.EncodeToString(m)})
	}
	if masked != nil {
		var err error
		if rec.Context, err = structpb.NewStruct(map[string]any{"masked": masked}); err != nil {
			panic(err)
		}
	}
	d.Record = DecisionRow(rec).Record
	return d
}

// runRecorder runs a recorder until the test ends.
func runRecorder(t *testing.T, cfg decisionlog.Config) *decisionlog.Recorder {
	t.Helper()
	cfg.Metrics = prometheus.NewRegistry()
	r, err := decisionlog.NewRecorder(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

// PatientHealth is an option of a server that waits long for the messages of the health service.
func PatientHealth(c *Config) {
	c.times = defaultTimeouts
	c.times.health = 10 * time.Minute
}

// KeyWait is an option of a server that waits so long for the keys of issuers, for the tokens of users.
func KeyWait(d time.Duration) func(*Config) {
	return func(c *Config) {
		c.times = defaultTimeouts
		c.times.keys = d
	}
}

// Watchers is an option of a server that so many may watch at once.
func Watchers(n int) func(*Config) { return func(c *Config) { c.maxWatchers = n } }

// AnswerBytes is an option of a server with a budget for the answers of each plane.
func AnswerBytes(n int64) func(*Config) { return func(c *Config) { c.answerBytes = n } }

// The bounds on calls without a key.
const (
	MaxStrangers    = maxStrangers
	MaxWatches      = maxWatches
	MaxExports      = maxExports
	MaxCallerGrants = maxCallerGrants
	PageBytes       = pageBytes
)

// ReadSlowly lets callers take a minute to send a request.
func ReadSlowly(c *Config) {
	c.times = defaultTimeouts
	c.times.header, c.times.read = time.Minute, time.Minute
}

// ShadowNow returns an option and a function: a server with the option compares new decisions with those by
// changes in shadow when the function is called, and only then.
func ShadowNow() (option func(*Config), now func()) {
	looks := make(chan chan struct{})
	return func(c *Config) {
			c.shadowNow = looks
			c.times = defaultTimeouts
			c.times.shadow, c.times.late = time.Hour, 0
		}, func() {
			done := make(chan struct{})
			looks <- done
			<-done
		}
}

// ReasonNames are the names of the reasons why a server is not ready.
var ReasonNames = reasonNames

// DrainUntil makes a server that stops serve on until over is closed. The last part of that begins when
// leaving is closed.
func DrainUntil(leaving, over <-chan struct{}) func(*Config) {
	return func(c *Config) { c.DrainDelay, c.leaving, c.drained = time.Hour, leaving, over }
}
