package logformat

import (
	"encoding/csv"
	"slices"
	"strings"
	"testing"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

func TestCSV(t *testing.T) {
	var text strings.Builder
	text.WriteString(CSVHead())
	for _, c := range entries {
		line, err := CSV(batchOf(c.entry), 1)
		if err != nil {
			t.Fatal(err)
		}
		text.WriteString(line)
	}
	missing, err := CSV(batchOf(missingEntry()), 1)
	if err != nil {
		t.Fatal(err)
	}
	text.WriteString(missing)
	odd := decisionEntry(func(d *cedarpostv1.DecisionRecord) {
		d.Caller, d.RequestId, d.TraceId = `=cmd|"/c calc"!A1`, "+1", "a,\"b\"\nc"
	})
	line, err := CSV(batchOf(odd), 1)
	if err != nil {
		t.Fatal(err)
	}
	rows, err := csv.NewReader(strings.NewReader(text.String() + line)).ReadAll()
	if err != nil || len(rows) != len(entries)+3 {
		t.Fatal(len(rows), err)
	}
	cell := func(row int, column string) string { // a negative row counts from the end
		return rows[(row+len(rows))%len(rows)][slices.Index(csvColumns, column)]
	}
	for _, c := range []struct {
		row          int
		column, want string
	}{
		{0, "denied_at", "denied_at"},
		{1, "leaf", "5"},
		{1, "kind", "decision"},
		{1, "time", "2026-03-04T05:06:07.890Z"},
		{1, "principal", `Shop::User::"bob"`},
		{1, "policies", `["shop/owner-views","shop/owner-fields"]`},
		{1, "fields_denied", `["internal.notes"]`},
		{2, "decision", "DENY"},
		{2, "denied_at", "OBJECT"},
		{2, "policies", `[]`},
		{2, "fields_denied", ""},
		{3, "kind", "change"},
		{3, "subject", "shop"},
		{3, "decision", ""},
		{6, "detail", `{"reason":"unknown key","address":"192.0.2.7","procedure":"/p","count":"12","first":"2026-03-04T05:06:07.890Z","last":"2026-03-04T05:06:07.890Z"}`},
		{-4, "kind", "damaged"},
		{-4, "id", "01900000-0000-7000-8000-000000000001"},
		{-4, "time", "2026-03-04T05:06:07.890Z"},
		{-4, "decision", ""},
		{-4, "subject", "decision"},
		{-4, "detail", "its record was altered"},
		{-3, "subject", "event"},
		{-2, "kind", "missing"},
		{-2, "time", ""},
		{-2, "detail", "not there"},
		{-1, "caller", `'=cmd|"/c calc"!A1`},
		{-1, "request_id", "'+1"},
		{-1, "trace_id", "a,\"b\"\nc"},
	} {
		if got := cell(c.row, c.column); got != c.want {
			t.Errorf("row %d, %s: %q, want %q", c.row, c.column, got, c.want)
		}
	}
	for _, cells := range rows {
		for _, c := range cells {
			if c != "" && strings.ContainsAny(c[:1], "=+-@\t\r") {
				t.Errorf("a formula: %q", c)
			}
		}
	}
	if !strings.HasSuffix(CSVHead(), "\r\n") || csvLine([]string{"", "-", "\t"}) != ",'-,'\t\r\n" {
		t.Error("not RFC 4180")
	}
}
