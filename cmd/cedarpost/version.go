package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/cedarpost/cedarpost/server/engine"
)

// release is the version that scripts/release.sh builds, such as v1.2.3. A release has no record of
// git, so that its bytes depend on the source alone.
var release string

// buildVersion returns the version of a release, or else the version and the commit that Go recorded
// in this binary.
func buildVersion() (version, commit string) {
	if release != "" {
		return release, ""
	}
	version = "devel"
	if info, ok := debug.ReadBuildInfo(); ok {
		if m := info.Main.Version; m != "" && m != "(devel)" {
			version = m
		}
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				commit = s.Value
			}
		}
	}
	return version, commit
}

type versionCmd struct {
	outputFlags
}

// Run prints the version.
func (v *versionCmd) Run(c *console) error {
	version, commit := buildVersion()
	if v.json() {
		return c.object(map[string]string{"version": version, "commit": commit, "engine": engine.Version, "go": runtime.Version()})
	}
	fmt.Fprintf(c.out, "cedarpost %s\n", version)
	c.pair("commit", commit)
	c.pair("engine", engine.Version)
	c.pair("go", runtime.Version())
	return nil
}
