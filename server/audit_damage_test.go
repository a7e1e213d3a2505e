package server_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
)

// flipped returns SQL for a column of bytes with one bit changed in the middle.
func flipped(column string) string {
	return fmt.Sprintf("set_byte(%[1]s, length(%[1]s) / 2, get_byte(%[1]s, length(%[1]s) / 2) # 1)", column)
}

// damages are ways to damage a row of decisions, each with the message that reports it.
var damages = map[string]struct{ set, says string }{
	"bytes that do not parse":              {`record = '\xff'`, "record"},
	"bytes that parse to something else":   {`record = '', crc = 0`, "record"},
	"a bit of the record":                  {"record = " + flipped("record"), "its record was altered"},
	"the checksum":                         {"crc = crc + 1", "its record was altered"},
	"a column":                             {"caller = 'nobody'", "column caller"},
	"the outcome":                          {"allowed = not allowed", "column allowed"},
	"a record that says so by itself":      {`record = record || '\xe2010178'::bytea, crc = CRC`, "its record"},
	"bytes that do not parse, but fit":     {`record = '\xff', crc = CRC`, "its record cannot be read"},
	"a record that is that of another row": {`record = OTHER`, "its record was altered"},
}

// A damaged row is shown as damaged, and all others are shown as they are.
func TestDamagedDecisions(t *testing.T) {
	t.Parallel() // it takes long
	s := servertest.New(t)
	s.MustLoadShop()
	ids := servertest.DecideSome(t, s, 5)
	victim := ids[2]
	servertest.MustExec(t, servertest.Session(t, s.URL), "create table whole as select * from decisions where decision_id = '"+victim+"'")
	for name, damage := range damages {
		t.Run(name, func(t *testing.T) {
			defer servertest.Tamper(t, s.URL, `update decisions set record = whole.record, crc = whole.crc, caller = whole.caller, allowed = whole.allowed
				from whole where decisions.decision_id = whole.decision_id`)
			set := strings.ReplaceAll(damage.set, "OTHER", "(select record from decisions where decision_id = '"+ids[0]+"')")
			if !strings.Contains(set, "CRC") {
				servertest.Tamper(t, s.URL, "update decisions set "+set+" where decision_id = '"+victim+"'")
			} else {
				record, _, _ := strings.Cut(strings.TrimPrefix(set, "record = "), ", crc")
				var bytes []byte
				conn := servertest.Session(t, s.URL)
				if err := conn.QueryRow(t.Context(), "select "+record+" from decisions where decision_id = $1", victim).Scan(&bytes); err != nil {
					t.Fatal(err)
				}
				servertest.MustExec(t, conn, "set session_replication_role = replica")
				servertest.MustExec(t, conn, fmt.Sprintf(`update decisions set record = '\x%x', crc = %d where decision_id = '%s'`, bytes, store.Checksum(bytes), victim))
			}

			page, err := s.Audit.QueryDecisions(t.Context(), &cedarpostv1.QueryDecisionsRequest{})
			if err != nil || len(page.Decisions) != len(ids) {
				t.Fatal(page, err)
			}
			for _, d := range page.Decisions {
				if d.DecisionId != victim {
					if d.Damaged != "" || d.Decision == 0 {
						t.Errorf("a whole one: %v", d)
					}
					continue
				}
				if !strings.Contains(d.Damaged, damage.says) || d.Time == nil || d.Decision != 0 || d.Principal != nil {
					t.Errorf("the damaged one: %v", d)
				}
			}
			_, err = s.Audit.GetDecision(t.Context(), &cedarpostv1.GetDecisionRequest{DecisionId: victim})
			servertest.WantCode(t, err, connect.CodeDataLoss, damage.says)
			_, err = s.Audit.ReplayDecision(t.Context(), &cedarpostv1.ReplayDecisionRequest{DecisionId: victim})
			servertest.WantCode(t, err, connect.CodeDataLoss, damage.says)
			if _, err := s.Audit.GetDecision(t.Context(), &cedarpostv1.GetDecisionRequest{DecisionId: ids[3]}); err != nil {
				t.Error(err)
			}
			counted, err := s.Audit.CountDecisions(t.Context(), &cedarpostv1.CountDecisionsRequest{
				Filter: &cedarpostv1.QueryDecisionsRequest{From: timestamppb.New(time.Now().Add(-time.Hour))}, Group: cedarpostv1.CountDecisionsRequest_OUTCOME})
			if err != nil || counted.Total != int64(len(ids)) {
				t.Error(counted, err)
			}

			var exported []string
			for _, b := range exportTo(t, s, &cedarpostv1.ExportDecisionsRequest{}) {
				for _, e := range b.Entries {
					d := e.GetDecision()
					if d == nil {
						continue
					}
					exported = append(exported, d.DecisionId)
					// An export does not contain the columns.
					seen := strings.Contains(set, "record") || strings.Contains(set, "crc")
					if bad := d.Damaged != ""; bad != (d.DecisionId == victim && seen) {
						t.Errorf("exported: %v", d)
					}
				}
			}
			if !slices.Equal(exported, ids) {
				t.Errorf("exported %v, want %v", exported, ids)
			}
		})
	}
}

// A damaged event is shown as damaged. The uses of a decision in a damaged report are
// incomplete.
func TestDamagedEvents(t *testing.T) {
	s := servertest.New(t)
	s.MustLoadShop()
	id := servertest.DecideSome(t, s, 1)[0]
	mustReport(t, s, report(used(id, 3, 0)))
	mustReport(t, s, report(used(id, 4, 0)))
	servertest.Tamper(t, s.URL, "update events set record = '\\xff' where event_id = (select min(event_id::text)::uuid from events where kind = 'reuse')")
	page, err := s.Audit.QueryEvents(t.Context(), &cedarpostv1.QueryEventsRequest{Kind: cedarpostv1.EventRecord_REUSE})
	if err != nil || len(page.Events) != 2 {
		t.Fatal(page, err)
	}
	damaged := page.Events[1]
	if page.Events[0].Damaged != "" || damaged.Damaged == "" || damaged.EventId == "" || damaged.Time == nil || damaged.Kind != 0 {
		t.Errorf("%v", page)
	}
	got, err := s.Audit.GetDecision(t.Context(), &cedarpostv1.GetDecisionRequest{DecisionId: id})
	if err != nil || got.Uses.GetHits() != 4 || !got.Uses.GetIncomplete() {
		t.Errorf("%v, %v", got.GetUses(), err)
	}
	found := 0
	for _, b := range exportTo(t, s, &cedarpostv1.ExportDecisionsRequest{}) {
		for _, e := range b.Entries {
			if e.GetEvent().GetDamaged() != "" {
				found++
			}
		}
	}
	if found != 1 {
		t.Errorf("%d damaged events are exported", found)
	}
}

// A missing row keeps its place in an export, unless its whole day was dropped.
func TestMissingRows(t *testing.T) {
	s := servertest.New(t)
	s.MustLoadShop()
	now := time.Now()
	mustLog(t, s, recordedAt(now, nil), recordedAt(now, nil), recordedAt(now, nil))
	mustLog(t, s, recordedAt(now, nil))
	servertest.Tamper(t, s.URL, "delete from decisions where pos = 1 or batch in (select batch from decisions group by batch having count(*) = 1)")
	var rows []string
	for _, b := range exportTo(t, s, &cedarpostv1.ExportDecisionsRequest{}) {
		row := ""
		for _, e := range b.Entries {
			switch {
			case e.GetDecision() != nil:
				row += "d"
			case e.GetMissing() != "":
				row += "-"
			}
		}
		if row != "" {
			rows = append(rows, row)
		}
	}
	if !slices.Equal(rows, []string{"d-d", "-"}) {
		t.Errorf("%q", rows)
	}
}

// The error of a read does not say that no decision was given.
func TestReadsThatFail(t *testing.T) {
	s := servertest.New(t)
	s.MustLoadShop()
	id := servertest.DecideSome(t, s, 1)[0]
	servertest.MustExec(t, servertest.Session(t, s.URL), "alter table decisions rename to gone")
	for name, call := range map[string]func(context.Context) error{
		"query": func(ctx context.Context) error {
			_, err := s.Audit.QueryDecisions(ctx, &cedarpostv1.QueryDecisionsRequest{})
			return err
		},
		"get": func(ctx context.Context) error {
			_, err := s.Audit.GetDecision(ctx, &cedarpostv1.GetDecisionRequest{DecisionId: id})
			return err
		},
		"replay": func(ctx context.Context) error {
			_, err := s.Audit.ReplayDecision(ctx, &cedarpostv1.ReplayDecisionRequest{DecisionId: id})
			return err
		},
	} {
		err := call(t.Context())
		if err == nil || strings.Contains(err.Error(), "decided") || !strings.Contains(err.Error(), "nothing was read") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
