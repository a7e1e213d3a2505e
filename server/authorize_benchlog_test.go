package server

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/policies"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/entityfile"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// TestBenchLog measures the cost of recording, for make bench-log: it drives a server with the
// recorder and one without in turns, on a Postgres that syncs to disk. It prints Markdown.
func TestBenchLog(t *testing.T) {
	if os.Getenv("CEDARPOST_BENCH") == "" {
		t.Skip("a benchmark: make bench-log")
	}
	pg := storetest.NewServer(t)
	if err := store.Migrate(t.Context(), pg.URL(), nil); err != nil {
		t.Fatal(err)
	}
	conn, err := pgx.Connect(t.Context(), pg.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	strict := benchServer(t, pg.URL(), Config{})
	off := benchServer(t, pg.URL(), Config{unrecorded: true})
	buffered := benchServer(t, pg.URL(), Config{Record: auditlog.Buffered})
	strict.loadShop(t)
	for _, s := range []*bench{off, buffered} {
		if _, err := s.server.follower.AtLeast(t.Context(), strict.server.follower.Latest().Position.Number); err != nil {
			t.Fatal(err)
		}
	}

	fmt.Printf("A commit alone, as `update` of one row: %v.\n\n", bareCommit(t, conn))
	fmt.Println("| callers | checks a call | mode | decisions/s | of not recorded | p50 | p99 |")
	fmt.Println("|---:|---:|---|---:|---:|---:|---:|")
	for _, c := range []struct{ callers, checks, calls int }{
		{1, 1, 2000}, {16, 1, 12000}, {64, 1, 24000}, {256, 1, 24000}, {1, 50, 300}, {16, 50, 1500},
	} {
		const rounds = 3
		runs := map[string][]run{}
		for range rounds {
			for name, s := range map[string]*bench{"not recorded": off, "strict": strict, "buffered": buffered} {
				runs[name] = append(runs[name], s.drive(t, c.callers, c.checks, c.calls))
			}
		}
		base := median(runs["not recorded"]).rate
		for _, name := range []string{"not recorded", "strict", "buffered"} {
			r := median(runs[name])
			fmt.Printf("| %d | %d | %s | %.0f | %.2f | %v | %v |\n", c.callers, c.checks, name, r.rate*float64(c.checks), r.rate/base, round(r.p50), round(r.p99))
		}
	}

	began := time.Now()
	done, err := decisionlog.VerifyLog(t.Context(), strict.db, decisionlog.Verification{})
	if err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	fmt.Printf("\nVerifying %d decisions in %d batches took %v: %.0f decisions/s.\n", done.Decisions, done.Batches, took.Round(time.Millisecond), float64(done.Decisions)/took.Seconds())

	// The rest writes copies of the records, with other ids.
	fmt.Print("\n| rows in a batch | batches/s | rows/s | bare COPY of the same rows, rows/s | ratio |\n|---:|---:|---:|---:|---:|\n")
	rows := someDecisions(t, strict.db)
	for _, n := range []int{1, 10, 50, 200, 1000} {
		var appended, copied []float64
		for range 3 {
			appended = append(appended, appendRate(t, strict.db, rows, n))
			copied = append(copied, copyRate(t, conn, rows, n))
		}
		slices.Sort(appended)
		slices.Sort(copied)
		fmt.Printf("| %d | %.0f | %.0f | %.0f | %.2f |\n", n, appended[1], appended[1]*float64(n), copied[1]*float64(n), appended[1]/copied[1])
	}

	var count, heap, indexes, batches, batchBytes int64
	err = conn.QueryRow(t.Context(), `
		select (select count(*) from decisions),
		       (select sum(pg_table_size(inhrelid)) from pg_inherits where inhparent = 'decisions'::regclass),
		       (select sum(pg_indexes_size(inhrelid)) from pg_inherits where inhparent = 'decisions'::regclass),
		       (select count(*) from audit_batches), pg_total_relation_size('audit_batches')`).
		Scan(&count, &heap, &indexes, &batches, &batchBytes)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("\nBytes for each decision: %d, and %d in indexes. For each batch: %d, with its indexes.\n", heap/count, indexes/count, batchBytes/batches)
}

// bench is a server under load.
type bench struct {
	db     *store.DB
	server *Server
	key    string
}

func benchServer(t *testing.T, url string, cfg Config) *bench {
	t.Helper()
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(url), Event: decisionlog.ChangeEvents("bench")})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "key")
	if _, err := access.BootstrapKey(t.Context(), db, file, true); err != nil {
		t.Fatal(err)
	}
	key, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	cfg.DB, cfg.Name, cfg.Log = db, "bench", slog.New(slog.DiscardHandler)
	cfg.Listen, cfg.AdminListen, cfg.OpsListen = "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0"
	b := &bench{db: db, key: strings.TrimSpace(string(key))}
	if b.server, err = New(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- b.server.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		db.Close()
	})
	return b
}

// loadShop publishes the example with calls of the services in process.
func (b *bench) loadShop(t *testing.T) {
	t.Helper()
	files, err := bundle.Read(policies.Shop(), "shop")
	if err != nil {
		t.Fatal(err)
	}
	p := newPolicyService(b.db, b.server.gate, b.server.recorder, b.server.noted, defaultTimeouts)
	p.stillMay = anybodyMay
	if _, err := p.publish(t.Context(), plainPublication(files, false), nil); err != nil {
		t.Fatal(err)
	}
	list, err := entityfile.Parse(files.Entities)
	if err != nil {
		t.Fatal(err)
	}
	e := &entityService{db: b.db, follower: b.server.follower}
	req := &cedarpostv1.WriteEntitiesRequest{}
	for _, entity := range list {
		req.Operations = append(req.Operations, &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_Put{Put: entity}})
	}
	if _, err := e.WriteEntities(t.Context(), req); err != nil {
		t.Fatal(err)
	}
}

// run is the result of one call of drive.
type run struct {
	rate     float64 // calls a second
	p50, p99 time.Duration
}

func median(runs []run) run {
	slices.SortFunc(runs, func(a, b run) int { return int(a.rate - b.rate) })
	return runs[len(runs)/2]
}

func round(d time.Duration) time.Duration { return d.Round(10 * time.Microsecond) }

// drive calls over HTTP/1.1 with JSON, four fields in each check. The client does as little work
// as possible, because it runs on the same machine: it makes the request once, and reads the
// answer without decoding it.
func (b *bench) drive(t *testing.T, callers, checks, calls int) run {
	t.Helper()
	request := b.request(checks)
	times := make([][]time.Duration, callers)
	var wg sync.WaitGroup
	began := time.Now()
	for c := range callers {
		wg.Go(func() {
			conn, err := net.Dial("tcp", b.server.Addr("decision"))
			if err != nil {
				t.Error(err)
				return
			}
			defer func() { _ = conn.Close() }()
			answer := bufio.NewReaderSize(conn, 64<<10)
			for range calls / callers {
				sent := time.Now()
				if _, err := conn.Write(request); err != nil {
					t.Error(err)
					return
				}
				if err := readAnswer(answer); err != nil {
					t.Error(err)
					return
				}
				times[c] = append(times[c], time.Since(sent))
			}
		})
	}
	wg.Wait()
	took := time.Since(began)
	all := slices.Sorted(slices.Values(slices.Concat(times...)))
	if len(all) == 0 {
		t.Fatal("no answer")
	}
	return run{float64(len(all)) / took.Seconds(), all[len(all)/2], all[len(all)*99/100]}
}

func (b *bench) request(checks int) []byte {
	const check = `{"principal":{"type":"Shop::User","id":"bob"},"action":{"type":"Shop::Action","id":"ViewOrder"},` +
		`"resource":{"type":"Shop::Order","id":"42"},"context":{"mfa":false},"fields":{"paths":["id","status","total","internal.notes"]}}`
	path, body := cedarpostv1connect.AuthorizationServiceAuthorizeProcedure, check
	if checks > 1 {
		path = cedarpostv1connect.AuthorizationServiceAuthorizeBatchProcedure
		body = `{"checks":[` + strings.Repeat(check+",", checks-1) + check + `]}`
	}
	return []byte(fmt.Sprintf("POST %s HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		path, b.key, len(body), body))
}

// readAnswer reads one answer. Its status must be 200.
func readAnswer(r *bufio.Reader) error {
	res, err := http.ReadResponse(r, nil)
	if err != nil {
		return err
	}
	defer func() { _ = res.Body.Close() }()
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		return err
	}
	if res.StatusCode != http.StatusOK {
		return errors.New(res.Status)
	}
	return nil
}

// bareCommit returns the median time of a commit.
func bareCommit(t *testing.T, conn *pgx.Conn) time.Duration {
	t.Helper()
	if _, err := conn.Exec(t.Context(), "create table bench (n int); insert into bench values (0)"); err != nil {
		t.Fatal(err)
	}
	var times []time.Duration
	for range 500 {
		began := time.Now()
		if _, err := conn.Exec(t.Context(), "update bench set n = n + 1"); err != nil {
			t.Fatal(err)
		}
		times = append(times, time.Since(began))
	}
	slices.Sort(times)
	return round(times[len(times)/2])
}

// someDecisions reads rows to copy.
func someDecisions(t *testing.T, db *store.DB) []store.Decision {
	t.Helper()
	rows, err := db.QueryDecisions(t.Context(), store.DecisionQuery{Limit: 1000})
	if err != nil || len(rows) < 1000 {
		t.Fatalf("%d rows, %v", len(rows), err)
	}
	return rows
}

func freshIDs(rows []store.Decision) {
	for i := range rows {
		rows[i].ID = uuid.Must(uuid.NewV7())
	}
}

// appendRate returns how many batches of so many rows are appended each second.
func appendRate(t *testing.T, db *store.DB, rows []store.Decision, n int) float64 {
	t.Helper()
	w := db.NewLogWriter("bench", auditlog.Strict, 0)
	defer w.Close()
	rounds := max(20, 2000/n)
	began := time.Now()
	for range rounds {
		freshIDs(rows[:n])
		if _, err := w.Append(t.Context(), rows[:n], nil); err != nil {
			t.Fatal(err)
		}
	}
	return float64(rounds) / time.Since(began).Seconds()
}

// copyRate returns the same rate for rows in a table with the same indexes that are not hashed
// and have no place in the log.
func copyRate(t *testing.T, conn *pgx.Conn, rows []store.Decision, n int) float64 {
	t.Helper()
	rounds := max(20, 2000/n)
	began := time.Now()
	for range rounds {
		freshIDs(rows[:n])
		_, err := conn.CopyFrom(t.Context(), pgx.Identifier{"decisions"}, []string{"decision_id", "at", "revision", "caller", "server",
			"principal_type", "principal_id", "action_type", "action_id", "resource_type", "resource_id",
			"allowed", "denied_at", "policies", "request_id", "trace_id", "fields", "masked", "record", "batch", "pos", "crc"},
			pgx.CopyFromSlice(n, func(i int) ([]any, error) {
				d := &rows[i]
				return []any{d.ID, time.Now(), d.Revision, d.Caller, d.Server, d.Principal.Type, d.Principal.ID, d.Action.Type, d.Action.ID,
					d.Resource.Type, d.Resource.ID, d.Allowed, nil, d.Policies, nil, nil, d.Fields, d.Masked, d.Record, d.Batch, i, 0}, nil
			}))
		if err != nil {
			t.Fatal(err)
		}
	}
	return float64(rounds) / time.Since(began).Seconds()
}
