package server_test

import (
	"testing"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// A caller that may import entities of one bundle neither sees nor continues the import of another
// caller: it is as if there was none. Its own caller and one that may import everything see it.
func TestAttackImportOfAnotherCaller(t *testing.T) {
	t.Parallel()
	s := docServer(t)
	as := func(name string, g *cedarpostv1.Grant) *servertest.Server {
		one := *s
		one.Entities = cedarpostv1connect.NewEntityServiceClient(s.Client(s.Admin, newCaller(t, s, name, g)))
		return &one
	}
	owner, other := as("owner", grant(access.DataWriter, "doc")), as("other", grant(access.DataWriter, "doc"))
	narrowed := grant(access.DataWriter, "*")
	narrowed.EntityTypes = []string{"Doc::User"}
	options := &cedarpostv1.ImportOptions{ImportId: "people", More: true}
	if _, err := importAll(t, owner, people(t, options, 0, 3)); err != nil {
		t.Fatal(err)
	}
	seen := 0
	for _, spy := range []*servertest.Server{other, as("narrowed", narrowed)} {
		for _, id := range []string{"people", "none"} {
			if got := unfinished(t, spy, id); got >= 0 {
				t.Errorf("another caller sees %d entities of %q", got, id)
				seen++
			}
		}
		_, err := importAll(t, spy, people(t, &cedarpostv1.ImportOptions{ImportId: "people", Skip: 1}, 1, 2))
		servertest.WantCode(t, err, connect.CodeFailedPrecondition, "no unfinished import of that id")
		// Nor does it begin one with the same id, which would replace it.
		_, err = importAll(t, spy, people(t, &cedarpostv1.ImportOptions{ImportId: "people"}, 100, 101))
		servertest.WantCode(t, err, connect.CodeAlreadyExists, "import_id: an unfinished import of another caller has this id")
	}
	res, err := s.Entities.ListEntities(t.Context(), &cedarpostv1.ListEntitiesRequest{Type: "Doc::User"})
	if err != nil || len(res.Entities) != 3 {
		t.Errorf("%d users are stored, %v", len(res.GetEntities()), err)
	}
	for _, may := range []*servertest.Server{owner, s} {
		if got := unfinished(t, may, "people"); got != 3 {
			t.Errorf("%d entities of the import", got)
		}
	}
	options.Skip, options.More = 3, false
	if _, err := importAll(t, owner, people(t, options, 3, 4)); err != nil {
		t.Errorf("its own caller goes on: %v", err)
	}
	if _, err := importAll(t, other, people(t, &cedarpostv1.ImportOptions{ImportId: "people"}, 4, 5)); err != nil {
		t.Errorf("the id of an import that has ended: %v", err)
	}
	t.Logf("attack: 2 callers ask for an import of another caller, go on with it, and replace it: %d of 4 questions answered", seen)
}
