package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/cedarpost/cedarpost/bundle"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

type applyCmd struct {
	outputFlags
	Dir           string `arg:"" help:"Bundle folder." type:"path"`
	Name          string `help:"Name of the bundle, if bundle.yaml does not give it (default: the name of the folder)." placeholder:"NAME"`
	DryRun        bool   `help:"Check the bundle against the bundles and the data of the server, and publish nothing."`
	Message       string `help:"Why it is published, for the list of versions." placeholder:"TEXT"`
	ExpectVersion *int64 `help:"Publish only if this version is live; 0: only if the bundle is new." placeholder:"N"`
	NoChange      bool   `help:"Open no change if the bundle needs approvals."`
	breakGlassFlag
	AllowBreaking bool `help:"Publish also if callers who ask as before would break."`
	waitFlags
	adminFlags
}

// Help is the long help of apply.
func (*applyCmd) Help() string {
	return `Publishes the folder in place of the bundle of the same name. Other bundles and all entities stay as they are. If a check fails, nothing is published, and the findings are on stderr. A bundle that is frozen, or in a window of its freeze, is not published, nor, without --allow-breaking, one that breaks callers who ask as before: the findings name what breaks and, if you may read the log of the bundle, who asked lately.

If the bundle needs approvals, nothing is published, and a change is opened with the files of the folder, as "cedarpost change create" does. An open change that you made of the same folder and the same live version becomes the files of the folder, so that a pipeline that runs again opens no second one; its approvals stay if the files are the same. Then the exit code is 9, and -o json prints the change. Others approve it, and "cedarpost change publish" publishes it. This takes the role policy-author, too. With --no-change, the exit code is 1, and no change is opened.

Exits with 3 if the bundle does not compile or validate, would break another bundle or callers, or does not fit the stored entities, and with 4 if only tests failed.`
}

// Run publishes.
func (a *applyCmd) Run(ctx context.Context, c *console) error {
	b, err := readBundle(a.Dir, a.Name)
	if err != nil {
		return c.refusedFolder(a.Dir, err, a.json())
	}
	admin, err := a.dial()
	if err != nil {
		return err
	}
	name := b.Name
	if a.ExpectVersion != nil && *a.ExpectVersion < 0 {
		return misuse("--expect-version must not be negative")
	}
	if err := a.check(); err != nil {
		return err
	}
	res, err := upload(ctx, admin, &cedarpostv1.BundleHeader{Name: name, DryRun: a.DryRun, Message: a.Message, ExpectVersion: a.ExpectVersion, BreakGlass: a.BreakGlass, AllowBreaking: a.AllowBreaking}, b.Files)
	if err != nil && !a.NoChange && needsChange(err) {
		return a.propose(ctx, c, admin, name, b)
	}
	if err != nil {
		return c.refusedPublish(admin, err, relative(a.Dir), a.json())
	}
	if a.json() {
		if err := c.message(res); err != nil {
			return err
		}
		return a.wait(ctx, c, admin, res)
	}
	c.printFindings(c.out, relative(a.Dir), findingsFromProto(res.GetWarnings()))
	c.printIgnored(name, b.Ignored)
	outcome := c.paint(green, "published")
	switch {
	case a.DryRun:
		outcome = "checked, nothing was published (dry run)"
	case !res.GetPublished():
		outcome = "nothing changed, the same is published already"
	}
	fmt.Fprintf(c.out, "%s: %s\n", clean(res.GetBundle().GetName()), outcome)
	if !a.DryRun {
		c.pair("version", fmt.Sprint(res.GetBundle().GetVersion()))
	}
	c.pair("break-glass", res.GetBundle().GetBreakGlass())
	c.pair("policies", fmt.Sprint(res.GetBundle().GetPolicies()))
	c.pair("digest", res.GetBundle().GetDigest())
	c.printRevision(res.GetRevision())
	return a.wait(ctx, c, admin, res)
}

// wait waits for the servers if it is asked for, also if the same was published already.
func (a *applyCmd) wait(ctx context.Context, c *console, admin *peer, res *cedarpostv1.ApplyBundleResponse) error {
	if a.DryRun {
		return nil
	}
	return a.forServers(ctx, c, admin, res.GetBundle().GetName(), res.GetBundle().GetVersion())
}

// headline is the first part of the message of a refusal, which repeats some of the findings after it.
func headline(message string) string {
	first, _, _ := strings.Cut(message, ": ")
	return first
}

// upload sends a bundle's files. Its error is as the server sent it.
func upload(ctx context.Context, admin *peer, header *cedarpostv1.BundleHeader, files []bundle.File) (*cedarpostv1.ApplyBundleResponse, error) {
	stream, err := admin.policies().ApplyBundle(ctx)
	if err != nil {
		return nil, err
	}
	err = stream.Send(&cedarpostv1.ApplyBundleRequest{Part: &cedarpostv1.ApplyBundleRequest_Header{Header: header}})
	for _, f := range files {
		parts := slices.Collect(slices.Chunk(f.Content, filePart))
		if len(parts) == 0 {
			parts = [][]byte{nil}
		}
		for _, data := range parts {
			if err == nil {
				err = stream.Send(&cedarpostv1.ApplyBundleRequest{Part: &cedarpostv1.ApplyBundleRequest_File{
					File: &cedarpostv1.FilePart{Path: f.Path, Data: data},
				}})
			}
		}
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	// io.EOF means that the server has answered before the end of the upload.
	return stream.CloseAndReceive()
}
