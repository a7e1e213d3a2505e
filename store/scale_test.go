package store_test

import (
	"context"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// scaleDays is the number of days that the rows are spread over.
const scaleDays = 30

// fillDay makes $2 decisions of one day ($1) like those of a shop: a few busy principals
// and many with one decision, one denial in twenty, and one in fifty of those at a field.
// A batch has a hundred.
const fillDay = `
	insert into decisions (decision_id, at, revision, caller, server,
	                       principal_type, principal_id, action_type, action_id, resource_type, resource_id,
	                       allowed, denied_at, policies, request_id, trace_id, fields, masked, record, batch, pos)
	select (left(ms, 8) || '-' || right(ms, 4) || '-7' || left(h, 3) || '-8' || substr(h, 4, 3) || '-' || substr(h, 7, 12))::uuid,
	       at, 1000 + i / 500,
	       (array['shop', 'billing', 'support', 'mobile', 'partner', 'batch'])[1 + floor(6 * r1 ^ 2)::int], 'pdp-' || i % 3,
	       'Shop::User', 'user-' || floor(100000 * r2 ^ 3), 'Shop::Action', 'Action' || floor(20 * r3 ^ 2),
	       'Shop::Order', floor(1000000 * r4 ^ 2)::text,
	       r5 >= 0.05, case when r5 >= 0.05 then null when r5 < 0.01 then 1 when r5 < 0.049 then 2 else 3 end,
	       case when r5 >= 0.05 then array['shop/policy-' || floor(40 * r6 ^ 2), 'shop/fields-' || floor(10 * r6)]
	            when r5 < 0.01 then array['guardrails/stop'] else '{}' end,
	       'req-' || h, h,
	       case when r6 < 0.4 then array['+id', '+items', '+status', '+total', '-internal.margin', '-internal.notes'] else '{}' end,
	       case when r6 > 0.98 then array[sha256(h::bytea)] else '{}' end,
	       decode(repeat(h, 28), 'hex'), md5($1::text || i / 100)::uuid, i % 100
	from (
		select i, at, lpad(to_hex(floor(extract(epoch from at) * 1000)::bigint), 12, '0') as ms, md5($1::text || i) as h,
		       random() as r1, random() as r2, random() as r3, random() as r4, random() as r5, random() as r6
		from generate_series(0, $2::int - 1) as i
		cross join lateral (
			select date_trunc('milliseconds', ($1::date)::timestamp at time zone 'UTC' + i * interval '1 day' / $2) as at) as t
	) as drawn`

const fillEvents = `
	insert into events (event_id, at, kind, caller, server, subject, revision, request_id, trace_id, record, batch, pos, crc)
	select (left(ms, 8) || '-' || right(ms, 4) || '-7' || left(h, 3) || '-8' || substr(h, 4, 3) || '-' || substr(h, 7, 12))::uuid,
	       at, (array['change', 'log_read', 'refused_right', 'authentication_failure'])[1 + i % 4],
	       'caller-' || i % 50, 'pdp-1', 'subject-' || i % 1000, null, null, h, decode(repeat(h, 8), 'hex'),
	       md5('events' || $1::text || i / 100)::uuid, i % 100, 0
	from (
		select i, at, lpad(to_hex(floor(extract(epoch from at) * 1000)::bigint), 12, '0') as ms, md5($1::text || i) as h
		from generate_series(0, $2::int - 1) as i
		cross join lateral (
			select date_trunc('milliseconds', ($1::date)::timestamp at time zone 'UTC' + i * interval '1 day' / $2) as at) as t
	) as drawn`

// fillBatches makes the batches of the rows of a day ($1), without their proofs.
const fillBatches = `
	insert into audit_batches (seq, batch, writer, writer_seq, rows, header, day, first_at, last_at)
	select (select coalesce(max(seq), -1) from audit_batches) + row_number() over (order by min(at)),
	       batch, batch, 0, count(*), '', $1::date, min(at), max(at)
	from (
		select batch, at from decisions where at >= $1::date::timestamp at time zone 'UTC' and at < ($1::date + 1)::timestamp at time zone 'UTC'
		union all
		select batch, at from events where at >= $1::date::timestamp at time zone 'UTC' and at < ($1::date + 1)::timestamp at time zone 'UTC') as r
	group by batch`

// TestQueriesAtScale fills a log and prints the time of each query as Markdown: `make
// bench-queries ROWS=10000000`. With CEDARPOST_QUERY_URL it uses the log of that
// database, and fills it if it is empty.
func TestQueriesAtScale(t *testing.T) {
	rows, _ := strconv.Atoi(os.Getenv("CEDARPOST_QUERY_ROWS"))
	if rows == 0 {
		t.Skip("not asked for with CEDARPOST_QUERY_ROWS")
	}
	url := os.Getenv("CEDARPOST_QUERY_URL")
	if url == "" {
		indexCost(t)
		url = storetest.NewServer(t).URL()
	}
	if err := store.Migrate(t.Context(), url, nil); err != nil {
		t.Fatal(err)
	}

	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	exec := func(sql string, args ...any) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), sql, args...); err != nil {
			t.Fatal(err)
		}
	}
	// Full days, up to yesterday.
	end := time.Now().UTC().Truncate(24 * time.Hour)
	var filled bool
	if err := conn.QueryRow(t.Context(), "select exists (select from decisions)").Scan(&filled); err != nil {
		t.Fatal(err)
	}
	if !filled {
		exec("set statement_timeout = 0")
		exec("select create_log_partitions($1::date, $2)", end.AddDate(0, 0, -scaleDays), scaleDays)
		began := time.Now()
		for day := range scaleDays {
			date := end.AddDate(0, 0, day-scaleDays)
			exec(fillDay, date.Format(time.DateOnly), rows/scaleDays)
			exec(fillEvents, date.Format(time.DateOnly), rows/scaleDays/20)
			exec(fillBatches, date.Format(time.DateOnly))
		}
		exec("vacuum (analyze) decisions")
		exec("vacuum (analyze) events")
		exec("vacuum (analyze) audit_batches")
		exec("checkpoint")
		fmt.Printf("%d decisions over %d days, filled in %v\n\n", rows/scaleDays*scaleDays, scaleDays, time.Since(began).Round(time.Second))
	}

	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(url)})
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	askAtScale(t, db, end, clockOf(t, conn))
}

func askAtScale(t *testing.T, db *store.DB, end time.Time, cpu cpuClock) {
	day := store.DecisionQuery{From: end.AddDate(0, 0, -10).Add(12 * time.Hour), To: end.AddDate(0, 0, -9).Add(12 * time.Hour)}
	sample, err := db.QueryDecisions(t.Context(), store.DecisionQuery{From: day.From, Limit: 1, BeforeAt: day.To})
	if err != nil || len(sample) != 1 {
		t.Fatal(err, len(sample))
	}
	one := sample[0]
	yes, no := true, false
	hot, rare, nobody := uid("Shop::User user-0"), one.Principal, uid("Shop::User nobody")
	hotOrder, order := uid("Shop::Order 0"), one.Resource
	rareAction, view := uid("Shop::Action none"), uid("Shop::Action Action3")
	all := store.DecisionQuery{}
	with := func(q store.DecisionQuery, set func(*store.DecisionQuery)) store.DecisionQuery { set(&q); return q }
	type question struct {
		name  string
		query store.DecisionQuery
		by    store.Group
	}
	var questions []question
	page := func(name string, q store.DecisionQuery, set func(*store.DecisionQuery)) {
		questions = append(questions, question{name, with(q, set), 0})
	}
	count := func(name string, by store.Group, q store.DecisionQuery, set func(*store.DecisionQuery)) {
		questions = append(questions, question{name, with(q, set), by})
	}
	nothing := func(*store.DecisionQuery) {}
	page("newest, no filter", all, nothing)
	page("the page after a decision 9 days back", all, func(q *store.DecisionQuery) { q.BeforeAt, q.BeforeID = one.At, one.ID })
	page("one day, no filter", day, nothing)
	page("principal, the busiest", all, func(q *store.DecisionQuery) { q.Principal = &hot })
	page("principal, one of many", all, func(q *store.DecisionQuery) { q.Principal = &rare })
	page("principal, unknown", all, func(q *store.DecisionQuery) { q.Principal = &nobody })
	page("principal, the busiest, denials", all, func(q *store.DecisionQuery) { q.Principal, q.Allowed = &hot, &no })
	page("principal, the busiest, field denials", all, func(q *store.DecisionQuery) { q.Principal, q.DeniedAt = &hot, 3 })
	page("principal, the busiest, one day, a policy that never decided", day, func(q *store.DecisionQuery) { q.Principal, q.Policy = &hot, "shop/none" })
	page(unbounded, all, func(q *store.DecisionQuery) { q.Principal, q.Policy = &hot, "shop/none" })
	page("resource, the busiest", all, func(q *store.DecisionQuery) { q.Resource = &hotOrder })
	page("resource, one of many", all, func(q *store.DecisionQuery) { q.Resource = &order })
	page("principal and resource", all, func(q *store.DecisionQuery) { q.Principal, q.Resource = &hot, &hotOrder })
	page("denials", all, func(q *store.DecisionQuery) { q.Allowed = &no })
	page("denials at FIELD", all, func(q *store.DecisionQuery) { q.DeniedAt = 3 })
	page("denials at OBJECT, one day", day, func(q *store.DecisionQuery) { q.DeniedAt = 2 })
	page("request id", all, func(q *store.DecisionQuery) { q.RequestID = one.RequestID })
	page("request id, unknown", all, func(q *store.DecisionQuery) { q.RequestID = "none" })
	page("one day, action", day, func(q *store.DecisionQuery) { q.Action = &view })
	page("one day, action that never was", day, func(q *store.DecisionQuery) { q.Action = &rareAction })
	page("one day, policy that never decided", day, func(q *store.DecisionQuery) { q.Policy = "shop/none" })
	page("one day, caller, unknown", day, func(q *store.DecisionQuery) { q.Caller = "nobody" })
	page("one day, trace id", day, func(q *store.DecisionQuery) { q.TraceID = one.TraceID })
	page("one day, revision", day, func(q *store.DecisionQuery) { q.Revision = one.Revision })
	page("one day, field, unknown", day, func(q *store.DecisionQuery) { q.Field = "none" })
	page("one day, masked value, unknown", day, func(q *store.DecisionQuery) { q.Masked = []byte{1} })
	page("one day, allowed", day, func(q *store.DecisionQuery) { q.Allowed = &yes })
	count("count one day by principal", store.ByPrincipal, day, nothing)
	count("count one day by action", store.ByAction, day, nothing)
	count("count one day by policy", store.ByPolicy, day, nothing)
	count("count one day by outcome", store.ByOutcome, day, nothing)
	count("count one day by action, one caller", store.ByAction, day, func(q *store.DecisionQuery) { q.Caller = "partner" })
	count("count all days by action, the busiest principal", store.ByAction, all, func(q *store.DecisionQuery) { q.Principal = &hot })
	count("count all days by principal, the busiest resource", store.ByPrincipal, all, func(q *store.DecisionQuery) { q.Resource = &hotOrder })
	count("count denials of all days by principal", store.ByPrincipal, all, func(q *store.DecisionQuery) { q.Allowed = &no })
	count("count denials of all days by outcome", store.ByOutcome, all, func(q *store.DecisionQuery) { q.Allowed = &no })
	count("count denials of all days by action", store.ByAction, all, func(q *store.DecisionQuery) { q.Allowed = &no })
	count("count field denials of all days by principal", store.ByPrincipal, all, func(q *store.DecisionQuery) { q.DeniedAt = 3 })

	fmt.Println("| question | rows | first | then | CPU | planning | plan |")
	fmt.Println("|---|---:|---:|---:|---:|---:|---|")
	var plans strings.Builder
	for _, ask := range questions {
		ask.query.Limit = 101
		row(t, cpu, ask.name, func() (n int, err error) {
			if ask.by != 0 {
				counts, err := db.CountDecisions(t.Context(), ask.query, ask.by)
				return len(counts), err
			}
			decisions, err := db.QueryDecisions(t.Context(), ask.query)
			return len(decisions), err
		}, func() []string {
			plan, err := db.Explain(t.Context(), ask.query, ask.by)
			if err != nil {
				t.Error(err)
			}
			fmt.Fprintf(&plans, "\n### %s\n\n```\n%s\n```\n", ask.name, strings.Join(plan, "\n"))
			return plan
		})
	}
	none := func() []string { return nil }
	row(t, cpu, askers, func() (int, error) {
		found, err := db.Askers(t.Context(), []store.UID{view, uid("Shop::Action Action7")}, end.AddDate(0, 0, -7), end, 3*time.Second)
		if err == nil && found.Since.After(end.AddDate(0, 0, -7)) {
			fmt.Printf("in 3 s, only the decisions of %v were read\n", end.Sub(found.Since))
		}
		return len(found.List), err
	}, none)
	row(t, cpu, "GetDecision", func() (int, error) { _, err := db.GetDecision(t.Context(), one.ID); return 1, err }, none)
	for _, ask := range []struct {
		name  string
		query store.EventQuery
	}{
		{"events, newest", store.EventQuery{}},
		{"events, kind", store.EventQuery{Kind: "log_read"}},
		{"events, caller", store.EventQuery{Caller: "caller-7"}},
		{"events, subject", store.EventQuery{Subject: "subject-7"}},
		{"events, subject, unknown", store.EventQuery{Subject: "none"}},
		{"events, caller and kind", store.EventQuery{Kind: "change", Caller: "caller-7"}},
	} {
		ask.query.Limit = 101
		row(t, cpu, ask.name, func() (int, error) { list, err := db.QueryEvents(t.Context(), ask.query); return len(list), err }, none)
	}
	if file := os.Getenv("CEDARPOST_QUERY_PLANS"); file != "" {
		if err := os.WriteFile(file, []byte(plans.String()), 0o644); err != nil {
			t.Error(err)
		}
	}
}

// unbounded is the query that docs/audit.md advises against: it reads all decisions of
// one principal.
const unbounded = "principal, the busiest, a policy that never decided"

// askers is the query of a publish that breaks callers. It has a bound of its own, of time.
const askers = "who asked about two actions, 7 days"

// row runs a query several times and prints the first time, the median of the later ones,
// and the CPU time of the server for one.
func row(t *testing.T, cpu cpuClock, name string, ask func() (int, error), explain func() []string) {
	const again = 5
	var times []time.Duration
	var n int
	var used time.Duration
	for i := range 1 + again {
		if i == 1 {
			used = cpu.read()
		}
		began := time.Now()
		var err error
		if n, err = ask(); err != nil {
			t.Errorf("%s: %v", name, err)
			return
		}
		times = append(times, time.Since(began))
	}
	used = (cpu.read() - used) / again
	first := times[0]
	slices.Sort(times[1:])
	then := times[1+again/2]
	planning, nodes := summary(explain())
	fmt.Printf("| %s | %d | %s | %s | %d ms | %s | %s |\n", name, n, ms(first), ms(then), used.Milliseconds(), planning, nodes)
	// On a busy machine, the CPU time is an upper bound of the time on an idle one.
	if used == 0 {
		used = then
	}
	if used > time.Second && name != unbounded && name != askers {
		t.Errorf("%s takes more than a second: %v", name, used)
	}
}

// cpuClock is a Postgres server on this machine, by the id of its first process.
type cpuClock int

func clockOf(t *testing.T, conn *pgx.Conn) cpuClock {
	var backend int
	if err := conn.QueryRow(t.Context(), "select pg_backend_pid()").Scan(&backend); err != nil {
		t.Fatal(err)
	}
	return cpuClock(processOf(backend).parent)
}

// read returns the CPU time of all processes of the server, with those that ended. It is
// 0 if the system does not have it.
func (c cpuClock) read() (used time.Duration) {
	dirs, _ := os.ReadDir("/proc")
	for _, dir := range dirs {
		pid, err := strconv.Atoi(dir.Name())
		if err != nil {
			continue
		}
		if p := processOf(pid); p.parent == int(c) || pid == int(c) {
			used += p.used
		}
	}
	return used
}

type process struct {
	parent int
	used   time.Duration // by the process, and by children that ended
}

func processOf(pid int) (p process) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, rest, ok := strings.Cut(string(text), ") ")
	if fields := strings.Fields(rest); err == nil && ok && len(fields) > 14 {
		p.parent, _ = strconv.Atoi(fields[1])
		for _, f := range fields[11:15] {
			ticks, _ := strconv.Atoi(f)
			p.used += time.Duration(ticks) * 10 * time.Millisecond
		}
	}
	return p
}

func ms(d time.Duration) string { return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000) }

var (
	scanNode     = regexp.MustCompile(`(Seq Scan|Index Only Scan|Index Scan|Bitmap Heap Scan)( Backward)?(?: using decisions_\d{8}_(\w+))? on decisions_\d{8}.* \(cost=\d+\.\d+\.\.(\d+\.\d+)`)
	keysNode     = regexp.MustCompile(`Bitmap Index Scan on decisions_\d{8}_(array_idx|keys)`)
	planningTime = regexp.MustCompile(`Planning Time: ([\d.]+ ms)`)
)

// summary counts the scans of a plan that were run, by index. Partitions of future days
// are empty, and their scans cost nothing.
func summary(plan []string) (planning, nodes string) {
	indexes := []struct{ columns, name string }{
		{"pkey", "primary key"}, {"at_decision_id_denied_at", "denials"}, {"at_allowed_denied_at", "denied actions"}, {"request", "request id"},
	}
	scans := map[string]int{}
	for _, line := range plan {
		if keysNode.MatchString(line) && !strings.Contains(line, "never executed") {
			scans["Bitmap Index Scan keys"]++
		}
		if m := scanNode.FindStringSubmatch(line); m != nil && !strings.Contains(line, "never executed") && m[4] != "0.00" {
			name := m[1]
			for _, x := range indexes {
				if strings.HasPrefix(m[3], x.columns) {
					name += " " + x.name
				}
			}
			scans[name]++
		}
		if m := planningTime.FindStringSubmatch(line); m != nil {
			planning = m[1]
		}
	}
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(scans)) {
		parts = append(parts, fmt.Sprintf("%s × %d", name, scans[name]))
	}
	return planning, strings.Join(parts, ", ")
}

// indexCost measures the cost of the indexes for a writer, and the time to read what it
// wrote.
func indexCost(t *testing.T) {
	fmt.Println("| indexes | rows/s | µs a row | table, bytes a row | indexes, bytes a row | read back as batches, rows/s |")
	fmt.Println("|---|---:|---:|---:|---:|---:|")
	const batches, size = 300, 1000
	for _, c := range []struct {
		name string
		drop []string
	}{
		{"all", nil},
		{"primary key only", []string{"decisions_keys", "decisions_denials", "decisions_denied_actions", "decisions_request"}},
		{"all, again", nil},
		{"primary key only, again", []string{"decisions_keys", "decisions_denials", "decisions_denied_actions", "decisions_request"}},
	} {
		url := storetest.NewServer(t).URL()
		if err := store.Migrate(t.Context(), url, nil); err != nil {
			t.Fatal(err)
		}
		for _, index := range c.drop {
			mustRaw(t, url, "drop index "+index)
		}
		db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(url)})
		if err != nil {
			t.Fatal(err)
		}
		w := db.NewLogWriter("s1", auditlog.Strict, 0)
		var wrote, read time.Duration
		for b := range batches {
			rows := drawn(size, b*size)
			began := time.Now()
			if _, err := w.Append(t.Context(), rows, nil); err != nil {
				t.Fatal(err)
			}
			wrote += time.Since(began)
		}
		w.Close()
		began := time.Now()
		for leaf := int64(0); leaf < batches; {
			list, err := db.Batches(t.Context(), leaf, 1)
			if err != nil {
				t.Fatal(err)
			}
			if n, err := db.ReadEntries(t.Context(), list, 8<<20); err != nil || n != 1 || len(list[0].Entries) != size {
				t.Fatal(err, n)
			}
			leaf++
		}
		read = time.Since(began)
		db.Close()
		table, indexes := sizes(t, url, "decisions_"+time.Now().UTC().Format("20060102"))
		fmt.Printf("| %s | %.0f | %.1f | %d | %d | %.0f |\n", c.name, batches*size/wrote.Seconds(),
			wrote.Seconds()*1e6/batches/size, table/batches/size, indexes/batches/size, batches*size/read.Seconds())
	}
	fmt.Println()
}

func sizes(t *testing.T, url, table string) (heap, indexes int64) {
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if err := conn.QueryRow(t.Context(), "select pg_table_size($1::text::regclass), pg_indexes_size($1::text::regclass)", table).Scan(&heap, &indexes); err != nil {
		t.Fatal(err)
	}
	return heap, indexes
}

// drawn makes decisions like those of fillDay.
func drawn(n, from int) []store.Decision {
	out := make([]store.Decision, n)
	for i := range out {
		id := uuid.Must(uuid.NewV7())
		k := uint32(from+i) * 2654435761 // spread out
		d := decision(time.Now(), 0)
		d.ID, d.RequestID, d.TraceID = id, "req-"+strings.ReplaceAll(id.String(), "-", ""), strings.ReplaceAll(id.String(), "-", "")
		d.Principal, d.Resource = uid(fmt.Sprint("Shop::User user-", k%100000)), uid(fmt.Sprint("Shop::Order ", k%1000003))
		d.Action, d.Policies = uid(fmt.Sprint("Shop::Action Action", k%20)), []string{fmt.Sprint("shop/policy-", k%40), "shop/fields-1"}
		d.Fields, d.Masked, d.Record = nil, nil, []byte(strings.Repeat(id.String(), 12))
		if k%20 == 0 {
			d.Allowed, d.DeniedAt = false, 2
		}
		out[i] = d
	}
	return out
}
