package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/cedarpost/cedarpost/bundle"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

type editChangeCmd struct {
	changeArgs
	Dir    string   `arg:"" optional:"" help:"Bundle folder: the change becomes the edits between its base and this folder." type:"path"`
	Name   string   `help:"Name of the bundle, if bundle.yaml does not give it (default: the name of the folder). It must be that of the change." placeholder:"NAME"`
	Title  *string  `help:"Another title." placeholder:"TEXT"`
	Reason *string  `help:"Another reason." placeholder:"TEXT"`
	Revert []string `help:"Take back the edit of this file; can be given several times." placeholder:"PATH" sep:"none"`
	Rebase bool     `help:"Make the live version the base. Without a folder, it is a conflict if the change and a later version both change a file."`
}

// Help is the long help of change edit.
func (*editChangeCmd) Help() string {
	return `Edits an open change. If that changes the resulting bundle, approvals do not count any more.

Exits with 3 if the folder cannot be read as a bundle, or if --rebase finds a conflict: then the change stays as it is.`
}

// Run edits the change.
func (e *editChangeCmd) Run(ctx context.Context, c *console) error {
	if e.Dir == "" && e.Title == nil && e.Reason == nil && len(e.Revert) == 0 && !e.Rebase {
		return misuse("give a folder, --title, --reason, --revert or --rebase")
	}
	if e.Title != nil && strings.TrimSpace(*e.Title) == "" {
		return misuse("--title must say what the change is for")
	}
	if e.Name != "" && e.Dir == "" {
		return misuse("--name is the name of the bundle in a folder: give the folder, too")
	}
	if e.Dir != "" && len(e.Revert) > 0 {
		return misuse("give either a folder or --revert")
	}
	admin, err := e.dial()
	if err != nil {
		return err
	}
	req := &cedarpostv1.UpdateChangeRequest{Id: e.ID, Title: e.Title, Reason: e.Reason, Revert: e.Revert, Rebase: e.Rebase}
	var rest [][]*cedarpostv1.FileEdit
	if e.Dir != "" {
		if rest, err = e.folder(ctx, c, admin, req); err != nil {
			return err
		}
	}
	if err := e.reverts(ctx, admin); err != nil {
		return err
	}
	res, err := admin.policies().UpdateChange(ctx, req)
	if err != nil {
		return c.refusedPublish(admin, err, e.ID, e.json())
	}
	change, err := send(ctx, admin, res.GetChange(), rest)
	if err != nil {
		return err
	}
	return c.printChange(change, e.json())
}

// reverts refuses to take back the edit of a file that the change does not edit.
func (e *editChangeCmd) reverts(ctx context.Context, admin *peer) error {
	if len(e.Revert) == 0 {
		return nil
	}
	now, err := call(ctx, admin, admin.policies().GetChange, &cedarpostv1.GetChangeRequest{Id: e.ID})
	if err != nil {
		return err
	}
	for _, path := range e.Revert {
		if !slices.ContainsFunc(now.GetFiles(), func(f *cedarpostv1.FileDiff) bool { return f.GetPath() == path }) {
			return fmt.Errorf("the change %s does not edit the file %s; `cedarpost change show %s` lists what it edits", e.ID, path, e.ID)
		}
	}
	return nil
}

// folder adds the edits of a folder to a request, in place of those that the change has. It returns those
// that do not fit into the request.
func (e *editChangeCmd) folder(ctx context.Context, c *console, admin *peer, req *cedarpostv1.UpdateChangeRequest) ([][]*cedarpostv1.FileEdit, error) {
	now, err := call(ctx, admin, admin.policies().GetChange, &cedarpostv1.GetChangeRequest{Id: e.ID})
	if err != nil {
		return nil, err
	}
	change := now.GetChange()
	base := liveFiles(ctx, admin)
	if !e.Rebase && change.GetBaseVersion() != now.GetLiveVersion() {
		base = func(name string) (int64, []bundle.File, error) {
			if change.GetBaseVersion() == 0 {
				return 0, nil, nil
			}
			stream, err := admin.policies().GetVersion(ctx, &cedarpostv1.GetVersionRequest{Bundle: name, Version: change.GetBaseVersion()})
			if err != nil {
				return 0, nil, err
			}
			files, err := receiveBundle(stream, func(*cedarpostv1.GetVersionResponse) {})
			return change.GetBaseVersion(), files, err
		}
	}
	name, _, edits, err := bundleFolder{e.Dir, e.Name, e.json()}.edits(c, admin, base)
	if err != nil {
		return nil, err
	}
	if name != change.GetBundle() {
		return nil, fmt.Errorf("the folder has the bundle %s, and the change is of %s; the name is that of the folder, unless bundle.yaml or --name gives it", name, change.GetBundle())
	}
	edited := map[string]bool{}
	for _, one := range edits {
		edited[one.Path] = true
	}
	for _, f := range now.GetFiles() {
		if !edited[f.GetPath()] {
			req.Revert = append(req.Revert, f.GetPath())
		}
	}
	req.IfDigest = change.GetDigest()
	parts := messages(edits)
	req.Edits = parts[0]
	return parts[1:], nil
}
