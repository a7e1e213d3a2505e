package servertest

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"golang.org/x/mod/sumdb/note"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/cedarpost/cedarpost/auditlog"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/entityfile"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/localpg"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// DocSchema is the schema of a small application: users in groups in groups, and papers
// that a group may read.
const DocSchema = `namespace Doc {
  entity Group in [Group];
  entity User in [Group] { level: Long, nick?: String };
  entity Paper { readers: Group };
  @source("request") entity Draft { author: User, size: Long };
  action Read appliesTo { principal: [User], resource: [Paper], context: {} };
  action Publish appliesTo { principal: [User], resource: [Draft], context: {} };
}`

// DocPolicies are policies of that application.
const DocPolicies = `
@id("readers") permit (principal, action == Doc::Action::"Read", resource) when { principal in resource.readers };
@id("authors") permit (principal, action == Doc::Action::"Publish", resource) when { resource.author == principal && resource.size < 10 };
`

// Entity reads one entity in Cedar's JSON format.
func Entity(t testing.TB, text string) *cedarpostv1.Entity {
	t.Helper()
	list, err := entityfile.Parse([]byte("[" + text + "]"))
	if err != nil {
		t.Fatal(err)
	}
	return list[0]
}

// DocUser makes a user of that application, in groups.
func DocUser(t testing.TB, id string, groups ...string) *cedarpostv1.Entity {
	var parents []string
	for _, g := range groups {
		parents = append(parents, fmt.Sprintf(`{"type":"Doc::Group","id":%q}`, g))
	}
	return Entity(t, fmt.Sprintf(`{"uid":{"type":"Doc::User","id":%q},"attrs":{"level":1},"parents":[%s]}`, id, strings.Join(parents, ",")))
}

// Write commits operations on entities.
func Write(t testing.TB, s *Server, ops ...*cedarpostv1.EntityOperation) (*cedarpostv1.WriteEntitiesResponse, error) {
	t.Helper()
	return s.Entities.WriteEntities(t.Context(), &cedarpostv1.WriteEntitiesRequest{Operations: ops})
}

// WantCode fails the test unless err has a code and its message contains a text.
func WantCode(t testing.TB, err error, code connect.Code, text string) {
	t.Helper()
	if connect.CodeOf(err) != code || err == nil || !strings.Contains(err.Error(), text) {
		t.Errorf("got %v, want %s with %q", err, code, text)
	}
}

// Eventually waits for what must come, for longer than any machine takes.
func Eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	// The longer it takes, the less often it looks: most looks are calls of a server.
	pause := 20 * time.Millisecond
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(pause) {
		if ok() {
			return
		}
		pause = min(pause*5/4, 200*time.Millisecond)
	}
	t.Fatalf("never happened: %s", what)
}

// Session is one beside the server's.
func Session(t *testing.T, url string) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// MustExec executes SQL.
func MustExec(t *testing.T, conn *pgx.Conn, sql string) {
	t.Helper()
	if _, err := conn.Exec(t.Context(), sql); err != nil {
		t.Fatal(err)
	}
}

// AskShop is one question to the shop.
func AskShop(user, action, order string, mfa bool) *cedarpostv1.AuthorizeRequest {
	ctx, _ := structpb.NewStruct(map[string]any{"mfa": mfa})
	return &cedarpostv1.AuthorizeRequest{
		Principal: UID(`Shop::User::"` + user + `"`),
		Action:    UID(`Shop::Action::"` + action + `"`),
		Resource:  UID(`Shop::Order::"` + order + `"`),
		Context:   ctx,
	}
}

// WithAllFields asks for all fields, too.
func WithAllFields(r *cedarpostv1.AuthorizeRequest) *cedarpostv1.AuthorizeRequest {
	r.Fields = &cedarpostv1.FieldSelection{All: true}
	return r
}

// OwnCluster starts a server on a Postgres that the test may kill.
func OwnCluster(t *testing.T, opts ...Option) (*Server, *localpg.Server) {
	t.Helper()
	pg := storetest.NewServer(t)
	if err := store.Migrate(t.Context(), pg.URL(), nil); err != nil {
		t.Fatal(err)
	}
	s := On(t, pg.URL(), opts...)
	s.MustLoadShop()
	return s, pg
}

// DecisionIDs reads the ids of all decisions from their table. It fails the test if one is
// there twice.
func DecisionIDs(t *testing.T, url string) map[string]bool {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	rows, err := conn.Query(t.Context(), `select decision_id::text from decisions`)
	if err != nil {
		t.Fatal(err)
	}
	ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]bool{}
	for _, id := range ids {
		if out[id] {
			t.Errorf("decision %s is in the log twice", id)
		}
		out[id] = true
	}
	return out
}

// Soak skips a test that takes minutes, unless it is asked for.
func Soak(t *testing.T) {
	t.Helper()
	if os.Getenv("CEDARPOST_SOAK") == "" {
		t.Skip("long: make soak")
	}
}

// TaskFailures counts what failed in the background.
func TaskFailures(t *testing.T, s *Server) (n int) {
	t.Helper()
	for _, m := range regexp.MustCompile(`(?m)^cedarpost_background_failures_total\{.*} (\d+)$`).FindAllStringSubmatch(Metrics(t, s), -1) {
		failed, err := strconv.Atoi(m[1])
		if err != nil {
			t.Fatal(err)
		}
		n += failed
	}
	return n
}

// DecisionAt makes a decision of a time, with an id that says so.
func DecisionAt(at time.Time) store.Decision {
	id := uuid.Must(uuid.NewV7())
	for i := range 6 {
		id[i] = byte(at.UnixMilli() >> (8 * (5 - i)))
	}
	uid := store.UID{Type: "T", ID: "x"}
	return store.Decision{ID: id, Principal: uid, Action: uid, Resource: uid, Allowed: true, Record: id[:]}
}

// LogKey makes a key file, and the verifier for it.
func LogKey(t *testing.T, name string) (file string, verifier note.Verifier) {
	t.Helper()
	secret, public, err := note.GenerateKey(rand.Reader, name)
	if err != nil {
		t.Fatal(err)
	}
	file = filepath.Join(t.TempDir(), "audit.key")
	if err := os.WriteFile(file, []byte(secret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if verifier, err = note.NewVerifier(public); err != nil {
		t.Fatal(err)
	}
	return file, verifier
}

// Signing has the server sign its log with a key, and keep the checkpoints in a file.
func Signing(key, checkpoints string) Option {
	return func(c *server.Config) {
		c.Signing = decisionlog.Signing{KeyFiles: []string{key}, CheckpointFile: checkpoints}
	}
}

// DecideSome makes decisions, singly and in batches, and returns their ids.
func DecideSome(t *testing.T, s *Server, n int) (ids []string) {
	t.Helper()
	for i := 0; len(ids) < n; i++ {
		if i%3 > 0 {
			r, err := s.Authorization.Authorize(t.Context(), WithAllFields(AskShop("bob", "ViewOrder", fmt.Sprint(40+i%5), i%2 == 0)))
			if err != nil {
				t.Fatal(err)
			}
			ids = append(ids, r.DecisionId)
			continue
		}
		req := &cedarpostv1.AuthorizeBatchRequest{}
		for k := range 4 {
			req.Checks = append(req.Checks, AskShop("alice", "ViewOrder", fmt.Sprint(k), false))
		}
		res, err := s.Authorization.AuthorizeBatch(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range res.Results {
			ids = append(ids, r.GetResponse().DecisionId)
		}
	}
	return ids
}

// Covered waits until a checkpoint covers all that is committed, and returns it.
func Covered(t *testing.T, s *Server, verifier note.Verifier) (c auditlog.Checkpoint, signed string) {
	t.Helper()
	var batches int64
	if err := Session(t, s.URL).QueryRow(t.Context(), "select count(*) from audit_batches").Scan(&batches); err != nil {
		t.Fatal(err)
	}
	Eventually(t, "a checkpoint that covers the log", func() bool {
		r, err := s.Audit.GetCheckpoint(t.Context(), &cedarpostv1.GetCheckpointRequest{})
		if err != nil {
			if connect.CodeOf(err) != connect.CodeNotFound {
				t.Fatal(err)
			}
			return false
		}
		signed = r.Checkpoint
		c, err = auditlog.OpenCheckpoint([]byte(signed), verifier)
		return err == nil && c.Size >= batches
	})
	return c, signed
}

// Tamper changes the log behind its back, as somebody who owns the database can.
func Tamper(t *testing.T, url, sql string) {
	t.Helper()
	conn := Session(t, url)
	MustExec(t, conn, "set session_replication_role = replica") // no triggers
	tag, err := conn.Exec(t.Context(), sql)
	if err != nil || tag.RowsAffected() == 0 {
		t.Fatalf("%s: %v, %v", sql, tag, err)
	}
}

// OpenAuditor opens a database as the verifier of a log does.
func OpenAuditor(t *testing.T, url string) *store.DB {
	t.Helper()
	db, err := store.OpenAuditor(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	return db
}

// Metrics reads what a server counts.
func Metrics(t *testing.T, s *Server) string {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, s.Ops+"/metrics", http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// AddCaller stores a caller with all roles whose API key has the given text.
func AddCaller(t testing.TB, db *store.DB, name, text string) {
	t.Helper()
	hash := sha256.Sum256([]byte(text))
	_, err := db.ChangeAccess(t.Context(), "test", func(context.Context, store.Access) (store.AccessChange, error) {
		return store.AccessChange{Put: access.AllGrants(name, "test"), Add: []store.Key{{ID: name, Name: name, Hash: hash[:]}}}, nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
