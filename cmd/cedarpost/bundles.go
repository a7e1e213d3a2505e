package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/cedarpost/cedarpost/bundle"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

const filePart = 1 << 20 // bytes of a file in one message

type bundlesCmd struct {
	List listBundlesCmd `cmd:"" default:"withargs" help:"List the published bundles."`
	Get  getBundleCmd   `cmd:"" help:"Fetch a published bundle into a folder."`

	Delete deleteBundleCmd `cmd:"" help:"Delete a bundle; its versions stay."`
}

type listBundlesCmd struct {
	outputFlags
	adminFlags
}

// Run lists the bundles. As JSON, each bundle is a line.
func (l *listBundlesCmd) Run(ctx context.Context, c *console) error {
	admin, err := l.dial()
	if err != nil {
		return err
	}
	res, err := call(ctx, admin, admin.policies().ListBundles, &cedarpostv1.ListBundlesRequest{})
	if err != nil {
		return err
	}
	rows := [][]string{{"BUNDLE", "VERSION", "POLICIES", "NAMESPACES", "PUBLISHED", "BY", "REVISION", ""}}
	for _, b := range res.GetBundles() {
		if l.json() {
			if err := c.message(b); err != nil {
				return err
			}
			continue
		}
		frozen := ""
		if b.GetFreeze() != nil {
			frozen = "frozen"
		}
		rows = append(rows, []string{
			b.GetName(), fmt.Sprint(b.GetVersion()), fmt.Sprint(b.GetPolicies()), strings.Join(b.GetNamespaces(), ", "),
			localTime(b.GetPublishedAt()), b.GetPublishedBy(), fmt.Sprint(b.GetRevision().GetNumber()), frozen,
		})
	}
	if !l.json() {
		c.table(rows)
	}
	return nil
}

type getBundleCmd struct {
	outputFlags
	Name string `arg:"" help:"Name of the bundle."`
	Dir  string `arg:"" help:"Folder to write, new or empty." type:"path"`
	adminFlags
}

// Run fetches the bundle. As JSON, it prints the description of the bundle.
func (g *getBundleCmd) Run(ctx context.Context, c *console) error {
	admin, err := g.dial()
	if err != nil {
		return err
	}
	about, files, err := liveBundle(ctx, admin, g.Name)
	if err != nil {
		return admin.explain(err)
	}
	if err := bundle.WriteDir(g.Dir, files); err != nil {
		return err
	}
	if g.json() {
		return c.message(about)
	}
	fmt.Fprintf(c.out, "%s: version %d, %s in %s\n",
		clean(about.GetName()), about.GetVersion(), count(len(files), "file", "files"), clean(relative(g.Dir)))
	return nil
}
