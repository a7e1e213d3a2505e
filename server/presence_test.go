package server_test

import (
	"fmt"
	"strings"
	"testing"
	"time"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// applied writes a list of servers as text, such as "a yes, b no".
func applied(list []*cedarpostv1.LiveServer) string {
	var parts []string
	for _, l := range list {
		parts = append(parts, fmt.Sprintf("%s %s", l.Name, map[bool]string{true: "yes", false: "no"}[l.Applied]))
	}
	return strings.Join(parts, ", ")
}

// The servers that run are listed with what they have applied: one that does not hear from its database
// is behind until it does, and one that has ended is gone.
func TestServersThatHaveApplied(t *testing.T) {
	t.Parallel()
	named := func(name string) servertest.Option {
		return func(c *server.Config) {
			c.Name, c.MaxStaleness, c.Start.Version = name, time.Hour, "v1.2.3" // live for an hour, also if it is silent
		}
	}
	a := docServer(t, named("a"))
	network := servertest.NewProxy(t, a.URL)
	b := servertest.On(t, network.URL(), named("b"))
	auditor := policiesOf(t, a, "auditor", grant(access.Auditor, "doc"))
	ofVersion := func(n int64) []*cedarpostv1.LiveServer {
		t.Helper()
		v, _ := version(t, a, "doc", n)
		return v.Servers
	}
	servertest.Eventually(t, "both have applied version 1", func() bool { return applied(ofVersion(1)) == "a yes, b yes" })
	first := ofVersion(1)[0]
	if first.Version != "v1.2.3" || len(first.Id) != 36 || first.Revision < 1 || first.SeenAt.AsTime().IsZero() {
		t.Errorf("%v", first)
	}

	made, err := a.Policies.CreateChange(t.Context(), &cedarpostv1.CreateChangeRequest{Bundle: "doc", Title: "x", Edits: []*cedarpostv1.FileEdit{extra(3)}})
	if err != nil {
		t.Fatal(err)
	}
	id := made.Change.Id
	ofChange := func() string {
		t.Helper()
		res, err := auditor.GetChange(t.Context(), &cedarpostv1.GetChangeRequest{Id: id})
		if err != nil {
			t.Fatal(err)
		}
		return applied(res.Servers)
	}
	if got := ofChange(); got != "" {
		t.Errorf("a change that is not published: %s", got)
	}
	network.Blackhole(true)
	if err := publish(t, a.Policies, made.Change); err != nil {
		t.Fatal(err)
	}
	servertest.Eventually(t, "one of two has applied it", func() bool { return ofChange() == "a yes, b no" })
	if got := applied(ofVersion(2)); got != "a yes, b no" {
		t.Errorf("version 2: %s", got)
	}
	if got := applied(ofVersion(1)); got != "a yes, b yes" {
		t.Errorf("version 1: %s", got)
	}
	list, err := auditor.ListVersions(t.Context(), &cedarpostv1.ListVersionsRequest{Bundle: "doc"})
	if err != nil || applied(list.Versions[0].Servers) != "a yes, b no" || list.Versions[1].Servers != nil {
		t.Errorf("%v, %v", list, err)
	}
	network.Blackhole(false)
	network.Cut()
	servertest.Eventually(t, "both have applied it", func() bool { return ofChange() == "a yes, b yes" })
	b.Stop()
	if got := ofChange(); got != "a yes" {
		t.Errorf("after one has ended: %s", got)
	}
}
