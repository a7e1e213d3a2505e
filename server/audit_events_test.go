package server_test

import (
	"bytes"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/jackc/pgx/v5"
	"google.golang.org/protobuf/proto"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// events reads the events of a kind, oldest first.
func events(t *testing.T, s *servertest.Server, kind string) (list []*cedarpostv1.EventRecord) {
	t.Helper()
	rows, err := servertest.Session(t, s.URL).Query(t.Context(), "select record from events where kind = $1 order by at, event_id", kind)
	if err != nil {
		t.Fatal(err)
	}
	records, err := pgx.CollectRows(rows, pgx.RowTo[[]byte])
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range records {
		e := &cedarpostv1.EventRecord{}
		if err := proto.Unmarshal(r, e); err != nil {
			t.Fatal(err)
		}
		list = append(list, e)
	}
	return list
}

// Each change is in the log with hashes of the state before and after it. A refused change is
// not in the log.
func TestChangesAreRecorded(t *testing.T) {
	s := servertest.New(t)
	s.MustLoadShop()
	before := len(events(t, s, "change"))
	uid := servertest.UID(`Shop::User::"bob"`)
	set := func(region string) {
		t.Helper()
		op := &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_AddParents{AddParents: &cedarpostv1.ChangeParents{
			Uid: uid, Parents: []*cedarpostv1.EntityUid{servertest.UID(`Shop::Role::"` + region + `"`)},
		}}}
		if _, err := servertest.Write(t, s, op); err != nil {
			t.Fatal(err)
		}
	}
	set("r1")
	set("r1") // no change, so no record
	set("r2")
	_, err := servertest.Write(t, s, &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_SetAttributes{
		SetAttributes: &cedarpostv1.SetAttributes{Uid: servertest.UID(`Shop::User::"nobody"`)},
	}})
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "not stored")
	list := events(t, s, "change")[before:]
	if len(list) != 2 {
		t.Fatalf("%d records", len(list))
	}
	for i, e := range list {
		c := e.GetChange()
		if c.GetOperation() != "WriteEntities" || e.Subject != `Shop::User::"bob"` || e.Caller != "bootstrap" || c.EntityCount != 1 ||
			len(c.Before) != 32 || len(c.After) != 32 || bytes.Equal(c.Before, c.After) || e.Revision == 0 {
			t.Errorf("record %d: %v", i, e)
		}
	}
	if !bytes.Equal(list[0].GetChange().After, list[1].GetChange().Before) {
		t.Error("what the first left is not what the second found")
	}
	published := events(t, s, "change")[2].GetChange() // after the grants and the key
	if published.Operation != "ApplyBundle" || published.Version != 1 || len(published.Before) != 0 || len(published.After) == 0 {
		t.Errorf("the publish: %v", published)
	}
}

// The first failed authentication is recorded at once. Those that follow are recorded together.
func TestFailedAuthenticationIsRecorded(t *testing.T) {
	s := servertest.New(t)
	began := time.Now()
	call := func(token string) {
		t.Helper()
		client := cedarpostv1connect.NewAuthorizationServiceClient(s.Client(s.API, token))
		_, err := client.Authorize(t.Context(), servertest.AskShop("bob", "ViewOrder", "42", false))
		servertest.WantCode(t, err, connect.CodeUnauthenticated, "")
	}
	call("wrong")
	servertest.Eventually(t, "a record", func() bool { return len(events(t, s, "authentication_failure")) == 1 })
	for range 50 {
		call("wrong")
	}
	call("")
	servertest.Eventually(t, "a second record", func() bool { return len(events(t, s, "authentication_failure")) >= 2 })
	s.Stop()
	total := map[string]int64{}
	for _, e := range events(t, s, "authentication_failure") {
		f := e.GetAuthenticationFailure()
		if f.Address != "127.0.0.1" || e.Subject != f.Address || e.Caller != "" || f.Procedure != cedarpostv1connect.AuthorizationServiceAuthorizeProcedure {
			t.Errorf("%v", e)
		}
		total[f.Reason] += f.Count
	}
	most := 4 + 2*int(time.Since(began)/(10*time.Second)) // one for each reason in ten seconds
	if total["unknown key"] != 51 || total["no credentials"] != 1 || len(events(t, s, "authentication_failure")) > most {
		t.Errorf("%v in %d records", total, len(events(t, s, "authentication_failure")))
	}
}
