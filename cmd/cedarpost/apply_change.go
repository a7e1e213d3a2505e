package main

import (
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"connectrpc.com/connect/v2"

	"github.com/cedarpost/cedarpost/bundle"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// breakGlassFlag is the flag of commands that can publish past rules.
type breakGlassFlag struct {
	BreakGlass *string `help:"Publish past a freeze, windows of a freeze, declines, missing approvals and missing reports, for this reason. It takes the role break-glass, too, and is recorded as an event of its own kind." placeholder:"REASON"`
}

func (f breakGlassFlag) check() error {
	if f.BreakGlass != nil && strings.TrimSpace(*f.BreakGlass) == "" {
		return misuse("--break-glass needs a reason")
	}
	return nil
}

// needsChange reports whether a publish failed because of missing approvals or a missing report of
// its impact, which a change can have: a frozen bundle is not to be published at all.
func needsChange(err error) (needs bool) {
	blocked, _ := detailOf[*cedarpostv1.PublishBlocked](err)
	for _, b := range blocked.GetBlocks() {
		switch b.GetRule() {
		case "approvals", "impact":
			needs = true
		case "freeze_window": // it may have ended when the change is approved
		default:
			return false
		}
	}
	return needs
}

// propose opens a change with the files of the folder, or updates the caller's own one. Its error has the
// exit code that says that nothing is published yet.
func (a *applyCmd) propose(ctx context.Context, c *console, admin *peer, name string, b *bundle.Bundle) error {
	// A bundle that is not valid is not proposed.
	if _, err := upload(ctx, admin, &cedarpostv1.BundleHeader{Name: name, DryRun: true}, b.Files); err != nil {
		return c.refusedPublish(admin, err, relative(a.Dir), a.json())
	}
	folder := bundleFolder{a.Dir, a.Name, a.json()}
	_, base, edits, err := folder.edits(c, admin, liveFiles(ctx, admin))
	if err != nil {
		return err
	}
	source := sourceOf(a.Dir)
	change, err := ownChange(ctx, admin, name, base, source)
	if err != nil {
		return err
	}
	done := "opened"
	switch {
	case change == nil:
		change, err = a.create(ctx, admin, name, base, source, edits)
	case change.GetDigest() == b.Digest():
		done = "is open already"
	default:
		done = "updated"
		change, err = a.update(ctx, c, admin, change)
	}
	if err != nil {
		return err
	}
	if err := c.printChange(change, a.json()); err != nil {
		return err
	}
	return &exitError{codeChange, fmt.Errorf("nothing is published yet: changes of the bundle %s need approvals or a report of their impact, so the change %s %s; `cedarpost change show %s` says what is missing, and `cedarpost change publish %s` publishes it",
		name, change.GetId(), done, change.GetId(), change.GetId())}
}

// sourceOf is how a change says that it was made of a folder. Pipelines call it by the same name, wherever
// they check it out.
func sourceOf(dir string) string {
	text := "apply " + filepath.ToSlash(relative(dir))
	return strings.ToValidUTF8(text[max(0, len(text)-200):], "")
}

// ownChange finds the open change that the caller alone made of a source and a version. It is nil if there
// is none.
func ownChange(ctx context.Context, admin *peer, name string, base int64, source string) (*cedarpostv1.BundleChange, error) {
	me, err := call(ctx, admin, admin.access().WhoAmI, &cedarpostv1.WhoAmIRequest{})
	if err != nil {
		return nil, err
	}
	req := &cedarpostv1.ListChangesRequest{Bundle: name, State: cedarpostv1.BundleChange_OPEN, PageSize: 1000}
	for {
		res, err := call(ctx, admin, admin.policies().ListChanges, req)
		if err != nil {
			return nil, err
		}
		for _, one := range res.GetChanges() {
			if one.GetSource() == source && one.GetBaseVersion() == base && slices.Equal(one.GetAuthors(), []string{me.GetCaller()}) {
				return one, nil
			}
		}
		if req.PageToken = res.GetNextPageToken(); req.GetPageToken() == "" {
			return nil, nil //nolint:nilnil // none
		}
	}
}

func (a *applyCmd) create(ctx context.Context, admin *peer, name string, base int64, source string, edits []bundle.Edit) (*cedarpostv1.BundleChange, error) {
	title, _, _ := strings.Cut(a.Message, "\n")
	if title == "" {
		title = source
	}
	title = strings.ToValidUTF8(title[:min(len(title), 200)], "")
	parts := messages(edits)
	res, err := admin.policies().CreateChange(ctx, &cedarpostv1.CreateChangeRequest{Bundle: name, Title: title, Reason: a.Message, BaseVersion: &base, Edits: parts[0], Source: source})
	if connect.CodeOf(err) == connect.CodePermissionDenied {
		return nil, fmt.Errorf("the bundle %s needs approvals, so a change of it has to be opened: %w", name, admin.explain(err))
	}
	if err != nil {
		return nil, admin.explain(err)
	}
	return send(ctx, admin, res.GetChange(), parts[1:])
}

func (a *applyCmd) update(ctx context.Context, c *console, admin *peer, change *cedarpostv1.BundleChange) (*cedarpostv1.BundleChange, error) {
	edit := &editChangeCmd{changeArgs: changeArgs{ID: change.GetId()}, Dir: a.Dir, Name: a.Name}
	req := &cedarpostv1.UpdateChangeRequest{Id: change.GetId()}
	rest, err := edit.folder(ctx, c, admin, req)
	if err != nil {
		return nil, err
	}
	res, err := admin.policies().UpdateChange(ctx, req)
	if err != nil {
		return nil, c.refusedPublish(admin, err, change.GetId(), a.json())
	}
	return send(ctx, admin, res.GetChange(), rest)
}
