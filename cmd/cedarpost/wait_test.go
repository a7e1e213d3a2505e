package main

import (
	"strings"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// A publish that waits fails and names the server that is behind, and stays published. When that server
// hears of it, the same command succeeds.
func TestWaitForServers(t *testing.T) {
	named := func(name string) servertest.Option {
		return func(c *server.Config) { c.Name, c.MaxStaleness = name, time.Hour } // live for an hour, also if it is silent
	}
	a := servertest.New(t, named("a"))
	network := servertest.NewProxy(t, a.URL)
	servertest.On(t, network.URL(), named("slow"))
	sh := newShell("CEDARPOST_ADMIN_URL="+a.Admin, "CEDARPOST_TOKEN="+a.Token)
	dir := notes(t, "owners")
	sh.exits(t, 0, says("notes: published", "applied by 2 of 2 servers"), "apply", dir, "--wait")

	network.Blackhole(true)
	write(t, dir, "read.cedar", file(t, dir, "read.cedar")+"// another version\n")
	sh.exits(t, 1, says("notes: published", "notes: version 2 was published, and not all servers have applied it within 1s: ", "slow ("), "apply", dir, "--wait", "--wait-timeout=1s")
	servertest.Eventually(t, "one of two has applied it", func() bool {
		return strings.Contains(sh.exits(t, 0, says("2 live"), "versions", "notes").out, "1 of 2 servers")
	})
	network.Blackhole(false)
	network.Cut()
	sh.exits(t, 0, says("nothing changed", "applied by 2 of 2 servers"), "apply", dir, "--wait")
}
