package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// waitEvery is how long a command waits between two looks at the live servers.
const waitEvery = 300 * time.Millisecond

// waitFlags let a publish wait for the servers.
type waitFlags struct {
	Wait        bool `help:"Wait until all live servers have applied it, and fail if they do not in time. It stays published."`
	WaitTimeout span `help:"How long to wait (default ${default})." default:"1m" placeholder:"DURATION"`
}

// forServers waits until all live servers have applied a version of a bundle, if --wait is given. It
// writes to stderr how many have.
func (w waitFlags) forServers(ctx context.Context, c *console, admin *peer, bundle string, version int64) error {
	if !w.Wait {
		return nil
	}
	var last string
	var behind []string
	for until := time.Now().Add(time.Duration(w.WaitTimeout)); ; {
		// A server that has applied the newest version has applied the earlier ones, too.
		res, err := call(ctx, admin, admin.policies().ListVersions, &cedarpostv1.ListVersionsRequest{Bundle: bundle, PageSize: 1})
		if ctx.Err() != nil {
			return err
		}
		if err == nil && len(res.GetVersions()) > 0 && res.GetVersions()[0].GetVersion() >= version {
			newest := res.GetVersions()[0]
			if !newest.GetLive() {
				return fmt.Errorf("%s: version %d was published, and is not live any more", bundle, version)
			}
			if now := appliedBy(newest.GetServers()); now != last {
				fmt.Fprintln(c.err, now)
				last = now
			}
			if behind = notApplied(newest.GetServers()); len(behind) == 0 && len(newest.GetServers()) > 0 {
				return nil
			}
		}
		if time.Now().After(until) {
			if err != nil {
				return fmt.Errorf("%s: version %d was published, and it is not known which servers have applied it: %w", bundle, version, err)
			}
			return fmt.Errorf("%s: version %d was published, and not all servers have applied it within %v: %s", bundle, version, time.Duration(w.WaitTimeout), strings.Join(behind, ", "))
		}
		select {
		case <-ctx.Done():
		case <-time.After(waitEvery):
		}
	}
}

// appliedBy says how many of the live servers have applied a version; "" if there are none.
func appliedBy(list []*cedarpostv1.LiveServer) string {
	if len(list) == 0 {
		return ""
	}
	return fmt.Sprintf("applied by %d of %s", len(list)-len(notApplied(list)), count(int32(len(list)), "server", "servers"))
}

// notApplied names the servers that have not applied a version.
func notApplied(list []*cedarpostv1.LiveServer) (names []string) {
	for _, s := range list {
		if !s.GetApplied() {
			names = append(names, fmt.Sprintf("%s (%s)", clean(s.GetName()), s.GetId()))
		}
	}
	return names
}

// printApplied prints how many servers have applied a version, and which have not.
func (c *console) printApplied(list []*cedarpostv1.LiveServer) {
	if text := appliedBy(list); text != "" {
		fmt.Fprintf(c.out, "  %s\n", text)
	}
	for _, name := range notApplied(list) {
		c.pair("behind", name)
	}
}
