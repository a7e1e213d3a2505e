package server_test

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// people returns a message with the users from one number up to another.
func people(t testing.TB, o *cedarpostv1.ImportOptions, from, to int) *cedarpostv1.ImportEntitiesRequest {
	t.Helper()
	msg := &cedarpostv1.ImportEntitiesRequest{Options: o}
	for i := from; i < to; i++ {
		msg.Entities = append(msg.Entities, servertest.DocUser(t, fmt.Sprintf("u%d", i), "staff"))
	}
	return msg
}

// importAll sends messages in one stream.
func importAll(t testing.TB, s *servertest.Server, messages ...*cedarpostv1.ImportEntitiesRequest) (*cedarpostv1.ImportEntitiesResponse, error) {
	t.Helper()
	stream, err := s.Entities.ImportEntities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range messages {
		if stream.Send(m) != nil {
			break // the answer says why
		}
	}
	return stream.CloseAndReceive()
}

// cutOff sends messages, and breaks the stream off when so many entities are stored.
func cutOff(t testing.TB, s *servertest.Server, admin *connect.Client, stored int64, messages ...*cedarpostv1.ImportEntitiesRequest) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	stream, err := cedarpostv1connect.NewEntityServiceClient(admin).ImportEntities(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range messages {
		if err := stream.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	waitStored(t, s, messages[0].Options.ImportId, stored)
}

func waitStored(t testing.TB, s *servertest.Server, id string, stored int64) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if unfinished(t, s, id) == stored {
			return
		}
	}
	t.Fatalf("never stored: %d entities of import %q", stored, id)
}

// unfinished returns how many entities of an unfinished import are stored, or -1 if there is no
// such import.
func unfinished(t testing.TB, s *servertest.Server, id string) int64 {
	t.Helper()
	res, err := s.Entities.GetImport(t.Context(), &cedarpostv1.GetImportRequest{ImportId: id})
	if connect.CodeOf(err) == connect.CodeNotFound && err != nil {
		return -1
	}
	if err != nil {
		t.Fatal(err)
	}
	return res.Entities
}

func listed(t testing.TB, s *servertest.Server) int {
	t.Helper()
	res, err := s.Entities.ListEntities(t.Context(), &cedarpostv1.ListEntitiesRequest{Type: "Doc::User", PageSize: 1000})
	if err != nil {
		t.Fatal(err)
	}
	return len(res.Entities)
}

// An import that was cut off goes on where it ended, and does not undo changes that were made
// meanwhile.
func TestImportGoesOn(t *testing.T) {
	s := docServer(t)
	id := &cedarpostv1.ImportOptions{ImportId: "people"}
	_, err := s.Entities.GetImport(t.Context(), &cedarpostv1.GetImportRequest{ImportId: "people"})
	servertest.WantCode(t, err, connect.CodeNotFound, "no unfinished import of that id")
	began := time.Now()
	cutOff(t, s, s.Client(s.Admin, s.Token), 20, people(t, id, 0, 10), people(t, nil, 10, 20))

	got, err := s.Entities.GetImport(t.Context(), &cedarpostv1.GetImportRequest{ImportId: "people"})
	if err != nil || got.Entities != 20 || got.Caller != "bootstrap" || got.UpdatedAt.AsTime().Before(began) || got.UpdatedAt.AsTime().After(time.Now()) {
		t.Fatalf("%v, %v", got, err)
	}
	read, err := s.Entities.GetEntity(t.Context(), &cedarpostv1.GetEntityRequest{Uid: servertest.UID(`Doc::User::"u19"`), At: got.Revision})
	if err != nil || read.Entity.ChangedAt.Number != got.Revision.Number {
		t.Errorf("the last chunk is not of revision %v: %v, %v", got.Revision, read, err)
	}
	s.MustPut(servertest.DocUser(t, "u5")) // revoked: no longer of the staff
	skip := func(n int64) *cedarpostv1.ImportOptions {
		return &cedarpostv1.ImportOptions{ImportId: "people", Skip: n}
	}
	for _, wrong := range []int64{10, 19, 21} {
		_, err := importAll(t, s, people(t, skip(wrong), int(wrong), 30))
		servertest.WantCode(t, err, connect.CodeFailedPrecondition, fmt.Sprintf("20 entities of this import are stored, not %d", wrong))
	}
	res, err := importAll(t, s, people(t, skip(20), 20, 25), people(t, nil, 25, 30))
	if err != nil || res.Entities != 10 || res.Changed != 10 {
		t.Errorf("%v, %v", res, err)
	}
	if n := unfinished(t, s, "people"); n != -1 {
		t.Errorf("%d entities of an import that ended", n)
	}
	if n := listed(t, s); n != 30 {
		t.Errorf("%d users of 30", n)
	}
	read, err = s.Entities.GetEntity(t.Context(), &cedarpostv1.GetEntityRequest{Uid: servertest.UID(`Doc::User::"u5"`)})
	if err != nil || len(read.Entity.Entity.Parents) != 0 {
		t.Errorf("what was revoked meanwhile is back: %v, %v", read, err)
	}
	_, err = importAll(t, s, people(t, skip(30), 30, 31))
	servertest.WantCode(t, err, connect.CodeFailedPrecondition, "no unfinished import of that id")
}

// An error of validation names the entity as other errors do: its number in the import, from 1,
// and its uid.
func TestImportNamesTheEntity(t *testing.T) {
	s := docServer(t)
	many := people(t, nil, 3, 5)
	for range 1001 {
		many.Entities[1].Parents = append(many.Entities[1].Parents, servertest.UID(`Doc::Group::"g"`))
	}
	const what = `entity %d: Doc::User::"u4": parents: `
	_, err := importAll(t, s, many)
	servertest.WantCode(t, err, connect.CodeInvalidArgument, fmt.Sprintf(what, 2))
	_, err = importAll(t, s, people(t, nil, 0, 3), many)
	servertest.WantCode(t, err, connect.CodeInvalidArgument, fmt.Sprintf(what, 5))
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "the 3 entities before this chunk are stored")
	nameless := people(t, nil, 5, 7)
	nameless.Entities[1].Uid = nil
	_, err = importAll(t, s, nameless)
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "entity 2: uid: ")
}

// An entity that occurs twice in one commit is refused: only the author of the file knows which
// one is right.
func TestImportOfOneEntityTwice(t *testing.T) {
	s := docServer(t)
	twice := people(t, nil, 3, 5)
	twice.Entities = append(twice.Entities, servertest.DocUser(t, "u3"))
	_, err := importAll(t, s, people(t, nil, 0, 3), twice)
	servertest.WantCode(t, err, connect.CodeInvalidArgument, `entity 6: Doc::User::"u3" is in the import twice, it is also entity 4; an import puts each entity once; the 3 entities before this chunk are stored`)
	if n := listed(t, s); n != 3 {
		t.Errorf("%d users of 3", n)
	}
	_, err = importAll(t, s, people(t, &cedarpostv1.ImportOptions{Atomic: true}, 10, 20), people(t, nil, 20, 25), people(t, nil, 19, 20))
	servertest.WantCode(t, err, connect.CodeInvalidArgument, `entity 16: Doc::User::"u19" is in the import twice, it is also entity 10`)
	if n := listed(t, s); n != 3 {
		t.Errorf("%d users of 3", n)
	}
	// In two messages the second one wins, as in two imports.
	res, err := importAll(t, s, people(t, nil, 0, 3), people(t, nil, 2, 5))
	if err != nil || res.Entities != 6 {
		t.Errorf("%v, %v", res, err)
	}
}

// An import can have several streams. It ends with the last one.
func TestImportInSeveralStreams(t *testing.T) {
	s := docServer(t)
	for _, step := range []struct {
		skip     int64
		more     bool
		from, to int
		left     int64
	}{
		{0, true, 0, 10, 10},
		{10, true, 10, 15, 15},
		{15, true, 10, 15, 20}, // nothing changes
		{20, true, 0, 0, 20},   // no entities, and more to come
		{20, false, 0, 0, -1},  // the end
		{0, true, 0, 10, 10},
		{0, true, 0, 5, 5}, // begins anew
		{5, false, 5, 10, -1},
	} {
		o := &cedarpostv1.ImportOptions{ImportId: "people", Skip: step.skip, More: step.more}
		res, err := importAll(t, s, people(t, o, step.from, step.to))
		if err != nil || res.Entities != int64(step.to-step.from) || res.Revision.GetToken() == "" {
			t.Errorf("%+v: %v, %v", step, res, err)
		}
		if n := unfinished(t, s, "people"); n != step.left {
			t.Errorf("%+v: %d entities", step, n)
		}
	}
}

// If two callers continue the same import, one of them gets an error.
func TestImportContinuedTwice(t *testing.T) {
	s := docServer(t)
	id := &cedarpostv1.ImportOptions{ImportId: "people"}
	first, err := s.Entities.ImportEntities(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Send(people(t, id, 0, 10)); err != nil {
		t.Fatal(err)
	}
	waitStored(t, s, "people", 10)
	cutOff(t, s, s.Client(s.Admin, s.Token), 15, people(t, &cedarpostv1.ImportOptions{ImportId: "people", Skip: 10}, 10, 15))
	if err := first.Send(people(t, nil, 10, 20)); err != nil {
		t.Fatal(err)
	}
	_, err = first.CloseAndReceive()
	servertest.WantCode(t, err, connect.CodeAborted, "somebody else continues this import; the 10 entities before this chunk are stored")
	if n := unfinished(t, s, "people"); n != 15 {
		t.Errorf("%d entities, want the 15 of the other", n)
	}
}

func TestImportsThatAreRefused(t *testing.T) {
	s := docServer(t)
	bad := &cedarpostv1.ImportEntitiesRequest{Entities: []*cedarpostv1.Entity{servertest.DocUser(t, "good"), servertest.Entity(t, `{"uid":{"type":"Doc::User","id":"bad"}}`)}}
	loop := &cedarpostv1.ImportEntitiesRequest{Entities: []*cedarpostv1.Entity{servertest.Entity(t, `{"uid":{"type":"Doc::Group","id":"g"},"parents":[{"type":"Doc::Group","id":"g"}]}`)}}
	options := func(o *cedarpostv1.ImportOptions) *cedarpostv1.ImportEntitiesRequest { return people(t, o, 0, 3) }
	type messages []*cedarpostv1.ImportEntitiesRequest
	for _, c := range []struct {
		name     string
		messages messages
		says     string
	}{
		{"nothing", nil, "nothing to import"},
		{"no entities", messages{{}}, "entities: a message has 1 to 1000"},
		{"no entities later", messages{options(nil), {}}, "entities: a message has 1 to 1000; the 3 entities before this chunk are stored"},
		{"options later", messages{options(nil), options(&cedarpostv1.ImportOptions{})}, "options: only the first message of a stream has them; the 3 entities"},
		{"skip without id", messages{options(&cedarpostv1.ImportOptions{Skip: 1})}, "import_id: skip and more need one"},
		{"more without id", messages{options(&cedarpostv1.ImportOptions{More: true})}, "import_id: skip and more need one"},
		{"atomic with id", messages{options(&cedarpostv1.ImportOptions{Atomic: true, ImportId: "x"})}, "atomic: "},
		{"NUL in the id", messages{options(&cedarpostv1.ImportOptions{ImportId: "a\x00"})}, "import_id"},
		{"an entity of the second message", messages{options(nil), bad}, `entity 5: Doc::User::"bad": required attribute "level" is missing; the 3 entities before this chunk are stored`},
		{"its own ancestor", messages{options(nil), loop}, `entity 4: Doc::Group::"g": these parents would make it its own ancestor; the 3 entities`},
	} {
		_, err := importAll(t, s, c.messages...)
		servertest.WantCode(t, err, connect.CodeInvalidArgument, c.says)
		if n := listed(t, s); n != 0 && n != 3 {
			t.Errorf("%s: %d users", c.name, n)
		}
	}
	// Errors count entities from the start of the import, skipped entities included.
	id := &cedarpostv1.ImportOptions{ImportId: "people"}
	_, err := importAll(t, s, people(t, id, 0, 3), bad)
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "entity 5: ")
	bad.Options = &cedarpostv1.ImportOptions{ImportId: "people", Skip: 3}
	_, err = importAll(t, s, bad)
	servertest.WantCode(t, err, connect.CodeInvalidArgument, `entity 5: Doc::User::"bad"`)
	if n := unfinished(t, s, "people"); n != 3 {
		t.Errorf("%d entities", n)
	}
}

// An atomic import is one revision or nothing.
func TestAtomicImport(t *testing.T) {
	t.Parallel() // it takes long
	s := docServer(t)
	atomic := &cedarpostv1.ImportOptions{Atomic: true}
	bad := &cedarpostv1.ImportEntitiesRequest{Entities: []*cedarpostv1.Entity{servertest.Entity(t, `{"uid":{"type":"Doc::User","id":"bad"}}`)}}
	_, err := importAll(t, s, people(t, atomic, 0, 10), bad)
	servertest.WantCode(t, err, connect.CodeInvalidArgument, `entity 11: Doc::User::"bad": required attribute "level" is missing`)
	if err != nil && strings.Contains(err.Error(), "stored") {
		t.Errorf("of what is not stored: %v", err)
	}
	cut, cancel := context.WithCancel(t.Context())
	stream, err := s.Entities.ImportEntities(cut)
	if err != nil || stream.Send(people(t, atomic, 0, 10)) != nil {
		t.Fatal(err)
	}
	cancel()
	if n := listed(t, s); n != 0 {
		t.Fatalf("%d users of imports that failed", n)
	}

	before := s.MustPut(servertest.Entity(t, `{"uid":{"type":"Doc::Group","id":"staff"}}`))
	var messages []*cedarpostv1.ImportEntitiesRequest
	for i := range 10 {
		messages = append(messages, people(t, nil, i*1000, (i+1)*1000))
	}
	messages[0].Options = atomic
	res, err := importAll(t, s, messages...)
	if err != nil || res.Entities != 10_000 || res.Changed != 10_000 || res.Revision.Number != before.Number+1 {
		t.Errorf("%v, %v", res, err)
	}
	_, err = importAll(t, s, append(messages, people(t, nil, 10_000, 10_001))...)
	servertest.WantCode(t, err, connect.CodeInvalidArgument, "at most 10000 entities")
}

// An import does not end with a stream that breaks off, in any protocol.
func TestImportBrokenOff(t *testing.T) {
	t.Parallel() // it takes long
	s := docServer(t)
	plain := &http.Transport{}
	t.Cleanup(plain.CloseIdleConnections)
	for name, admin := range map[string]*connect.Client{
		"HTTP/1.1": connect.NewClient(connecthttp.NewTransport(&http.Client{Transport: plain}, s.Admin), withKey(s.Token)),
		"HTTP/2":   s.Client(s.Admin, s.Token),
		"gRPC":     s.Client(s.Admin, s.Token, connecthttp.WithGRPC()),
	} {
		cutOff(t, s, admin, 5, people(t, &cedarpostv1.ImportOptions{ImportId: name}, 0, 5))
	}
	s.Stop() // after the calls have ended
	s = servertest.On(t, s.URL)
	for _, name := range []string{"HTTP/1.1", "HTTP/2", "gRPC"} {
		if n := unfinished(t, s, name); n != 5 {
			t.Errorf("%s: %d entities", name, n)
		}
	}
}

func withKey(key string) connect.ClientInterceptor {
	return func(next connect.ClientFunc) connect.ClientFunc {
		return func(ctx context.Context, spec connect.Spec) (connect.ClientStream, error) {
			if info, ok := connect.CallInfoForClientContext(ctx); ok {
				info.RequestHeader().Set("Authorization", "Bearer "+key)
			}
			return next(ctx, spec)
		}
	}
}
