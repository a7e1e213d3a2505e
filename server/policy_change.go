package server

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/cedarpost/cedarpost/bundle"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/store"
)

const (
	maxOpenChanges = 200 // of one bundle
	maxAuthors     = 100 // of one change
	maxVerdicts    = 100 // of one change, of each kind
	maxShownEdits  = 8 << 20
)

var changeStates = map[string]cedarpostv1.BundleChange_State{
	store.ChangeOpen: cedarpostv1.BundleChange_OPEN, store.ChangePublished: cedarpostv1.BundleChange_PUBLISHED, store.ChangeDiscarded: cedarpostv1.BundleChange_DISCARDED,
}

func noChange(id string) error {
	return connect.Errorf(connect.CodeNotFound, "there is no change %q", id)
}

// openChange returns the change that a write names, unless it is not open.
func openChange(id string, now store.PolicyState) (c store.BundleChange, err error) {
	if now.Change == nil {
		return c, noChange(id)
	}
	return *now.Change, refuseEnded(*now.Change)
}

func refuseEnded(c store.BundleChange) error {
	switch c.State {
	case store.ChangePublished:
		return connect.Errorf(connect.CodeFailedPrecondition, "the change %s was published as version %d", c.ID, c.Version)
	case store.ChangeDiscarded:
		return connect.Errorf(connect.CodeFailedPrecondition, "the change %s was discarded", c.ID)
	}
	return nil
}

// refuseOther refuses a call about another state of a change than that which the caller has seen.
func refuseOther(c store.BundleChange, digest string) error {
	if digest == c.Digest {
		return nil
	}
	return connect.Errorf(connect.CodeAborted, "the change %s was edited: its digest is %s, not %s; look at it again", c.ID, c.Digest, digest)
}

// draft is a change in memory, with the files of its base.
type draft struct {
	change store.BundleChange
	base   []bundle.File
	edits  []bundle.Edit
}

// files returns the files of the bundle with the edits.
func (d *draft) files() []bundle.File { return bundle.Apply(d.base, d.edits) }

// settle leaves out edits that do nothing, and sets the digest and the rules of the change.
func (d *draft) settle() error {
	files := d.files()
	size := 0
	for _, f := range files {
		size += len(f.Content)
	}
	if len(files) > maxBundleFiles {
		return connect.Errorf(connect.CodeInvalidArgument, "the bundle has more than %d files", maxBundleFiles)
	}
	if size > maxBundleBytes {
		return connect.Errorf(connect.CodeInvalidArgument, "the bundle is larger than %d bytes", maxBundleBytes)
	}
	d.edits, d.change.Digest = bundle.Edits(d.base, files), bundle.Digest(files)
	d.change.Rules = encodeRules(candidateRules(files))
	return nil
}

// draft reads a change with its edits and the files of its base.
func (s *policyService) draft(ctx context.Context, h *heldFiles, id string) (d draft, err error) {
	c, edits, err := s.db.ChangeEdits(ctx, id, math.MaxInt32, maxBundleBytes)
	if errors.Is(err, store.ErrNotFound) {
		return d, noChange(id)
	}
	if err != nil {
		return d, err
	}
	d.change = c
	for _, e := range edits {
		if err := h.add(e.Bytes); err != nil {
			return d, err
		}
		d.edits = append(d.edits, bundle.Edit(e.ChangeEdit))
	}
	d.base, err = s.versionFiles(ctx, h, c.Bundle, c.BaseVersion)
	return d, err
}

// versionFiles reads the files of a version. Version 0 has none.
func (s *policyService) versionFiles(ctx context.Context, h *heldFiles, name string, version int64) ([]bundle.File, error) {
	if version == 0 {
		return nil, nil
	}
	b, err := s.version(ctx, name, version)
	if err != nil {
		return nil, err
	}
	return s.storedFiles(ctx, h, name, b.Since)
}

// editFiles applies the edits of a request to those of a change. reverted are the paths whose edits are taken
// back.
func editFiles(edits []bundle.Edit, asked []*cedarpostv1.FileEdit, reverted []string) ([]bundle.Edit, error) {
	at := map[string]int{}
	edits = slices.DeleteFunc(slices.Clone(edits), func(e bundle.Edit) bool { return slices.Contains(reverted, e.Path) })
	for i, e := range edits {
		at[e.Path] = i
	}
	seen := map[string]bool{}
	for _, a := range asked {
		part, problem := bundle.CheckPath(a.GetPath())
		if problem != nil {
			return nil, connect.Errorf(connect.CodeInvalidArgument, "edits: %s", problem)
		}
		if !part {
			return nil, connect.Errorf(connect.CodeInvalidArgument, "edits: %q is not part of a bundle: it has policies in files that end in .cedar or .cedar.json, a schema in files that end in .cedarschema or .cedarschema.json, and some files with fixed names", a.GetPath())
		}
		i, there := at[a.GetPath()]
		e := bundle.Edit{Path: a.GetPath(), Removed: a.GetRemoved(), Content: a.GetContent()}
		switch more, isMore := a.GetEdit().(*cedarpostv1.FileEdit_Append); {
		case isMore && (!there || edits[i].Removed):
			return nil, connect.Errorf(connect.CodeInvalidArgument, "edits: nothing puts the file %q, so nothing can be appended to it", a.GetPath())
		case isMore:
			e.Content = slices.Concat(edits[i].Content, more.Append)
		case seen[a.GetPath()]:
			return nil, connect.Errorf(connect.CodeInvalidArgument, "edits: %q is edited twice", a.GetPath())
		case !e.Removed && e.Content == nil:
			e.Content = []byte{}
		}
		seen[a.GetPath()] = true
		if there {
			edits[i] = e
			continue
		}
		at[e.Path] = len(edits)
		edits = append(edits, e)
	}
	slices.SortFunc(edits, func(a, b bundle.Edit) int { return cmp.Compare(a.Path, b.Path) })
	return edits, nil
}

// CreateChange implements cedarpost.v1.PolicyService.
func (s *policyService) CreateChange(ctx context.Context, req *cedarpostv1.CreateChangeRequest) (*cedarpostv1.CreateChangeResponse, error) {
	live, err := s.live(ctx, req.GetBundle())
	if err != nil {
		return nil, err
	}
	d := draft{change: store.BundleChange{
		Bundle: req.GetBundle(), Title: req.GetTitle(), Reason: req.GetReason(), State: store.ChangeOpen, BaseVersion: live.Version, Authors: []string{callerFrom(ctx)}, Source: req.GetSource(),
	}}
	if req.BaseVersion != nil {
		if d.change.BaseVersion = req.GetBaseVersion(); d.change.BaseVersion == 0 && live.Version > 0 {
			return nil, connect.Errorf(connect.CodeAborted, "the bundle %s is not new: version %d is live", live.Name, live.Version)
		}
	}
	held, err := hold(ctx, s.dryRuns)
	if err != nil {
		return nil, err
	}
	defer held.leave()
	if d.base, err = s.versionFiles(ctx, held, req.GetBundle(), d.change.BaseVersion); err != nil {
		return nil, err
	}
	if d.edits, err = editFiles(nil, req.GetEdits(), nil); err != nil {
		return nil, err
	}
	if err := d.settle(); err != nil {
		return nil, err
	}
	c := &d.change
	c.CreatedAt = time.Now().UTC().Truncate(time.Microsecond)
	c.UpdatedAt = c.CreatedAt
	answer := func(_ store.Changes, at *cedarpostv1.Revision) *cedarpostv1.CreateChangeResponse {
		return &cedarpostv1.CreateChangeResponse{Change: s.shown(*c), Revision: at}
	}
	const procedure = cedarpostv1connect.PolicyServiceCreateChangeProcedure
	return writeOnce(ctx, s.db, procedure, req.GetIdempotencyKey(), req, &cedarpostv1.CreateChangeResponse{},
		func(o *once) (*cedarpostv1.CreateChangeResponse, error) {
			return changeState(ctx, s, procedure, req, o, c.Bundle, "", answer, func(now store.PolicyState) (w store.PolicyWrite, err error) {
				if now.OpenChanges >= maxOpenChanges {
					return w, connect.Errorf(connect.CodeFailedPrecondition, "the bundle %s has %d open changes, which is the limit; publish or discard some", c.Bundle, now.OpenChanges)
				}
				c.Number = now.NextChange
				c.ID = fmt.Sprintf("%s-%d", c.Bundle, c.Number)
				return store.PolicyWrite{Change: c, Edits: storedEdits(d.edits), Reason: c.Title}, nil
			})
		})
}

func storedEdits(list []bundle.Edit) (out []store.ChangeEdit) {
	for _, e := range list {
		out = append(out, store.ChangeEdit(e))
	}
	return out
}

// UpdateChange implements cedarpost.v1.PolicyService.
func (s *policyService) UpdateChange(ctx context.Context, req *cedarpostv1.UpdateChangeRequest) (*cedarpostv1.UpdateChangeResponse, error) {
	var out store.BundleChange
	answer := func(_ store.Changes, at *cedarpostv1.Revision) *cedarpostv1.UpdateChangeResponse {
		return &cedarpostv1.UpdateChangeResponse{Change: s.shown(out), Revision: at}
	}
	const procedure = cedarpostv1connect.PolicyServiceUpdateChangeProcedure
	return writeOnce(ctx, s.db, procedure, req.GetIdempotencyKey(), req, &cedarpostv1.UpdateChangeResponse{},
		func(o *once) (*cedarpostv1.UpdateChangeResponse, error) {
			before, after, err := s.update(ctx, req)
			if err != nil {
				return nil, err
			}
			return changeState(ctx, s, procedure, req, o, before.change.Bundle, req.GetId(), answer, func(now store.PolicyState) (w store.PolicyWrite, err error) {
				c, err := openChange(req.GetId(), now)
				if err != nil {
					return w, err
				}
				if c.Digest != before.change.Digest || c.BaseVersion != before.change.BaseVersion {
					return w, connect.Errorf(connect.CodeAborted, "the change %s was edited meanwhile; look at it again", c.ID)
				}
				w, err = updated(ctx, req, c, before, after)
				if out = c; w.Change != nil {
					out = *w.Change
				}
				return w, err
			})
		})
}

// update applies a request to a change in memory.
func (s *policyService) update(ctx context.Context, req *cedarpostv1.UpdateChangeRequest) (before, after draft, err error) {
	held, err := hold(ctx, s.dryRuns)
	if err != nil {
		return before, after, err
	}
	defer held.leave()
	if before, err = s.draft(ctx, held, req.GetId()); err != nil {
		return before, after, err
	}
	if err := refuseEnded(before.change); err != nil {
		return before, after, err
	}
	if req.GetIfDigest() != "" {
		if err := refuseOther(before.change, req.GetIfDigest()); err != nil {
			return before, after, err
		}
	}
	after = before
	if after.edits, err = editFiles(before.edits, req.GetEdits(), req.GetRevert()); err != nil {
		return before, after, err
	}
	if req.GetRebase() {
		if err := s.rebase(ctx, held, req, &after); err != nil {
			return before, after, err
		}
	}
	return before, after, after.settle()
}

// rebase makes the live version the base of a change.
func (s *policyService) rebase(ctx context.Context, h *heldFiles, req *cedarpostv1.UpdateChangeRequest, d *draft) error {
	live, err := s.live(ctx, d.change.Bundle)
	if err != nil {
		return err
	}
	if live.Version == d.change.BaseVersion {
		return nil
	}
	files, err := s.versionFiles(ctx, h, d.change.Bundle, live.Version)
	if err != nil {
		return err
	}
	// What this call edits or reverts is made with the live version in mind.
	resolved := slices.Clone(req.GetRevert())
	for _, e := range req.GetEdits() {
		resolved = append(resolved, e.GetPath())
	}
	conflicts := slices.DeleteFunc(bundle.Conflicts(d.base, files, d.edits), func(path string) bool { return slices.Contains(resolved, path) })
	if len(conflicts) > 0 {
		var found []*cedarpostv1.Finding
		for _, path := range conflicts {
			found = append(found, &cedarpostv1.Finding{Severity: cedarpostv1.Finding_ERROR, File: path,
				Message: fmt.Sprintf("the change and a version since %d both change it", d.change.BaseVersion), Hint: "edit the file anew, or revert the edit, together with the rebase"})
		}
		return refusal(connect.CodeFailedPrecondition, fmt.Sprintf("the change %s conflicts with version %d in %s", d.change.ID, live.Version, countOf(len(conflicts), "file")), found)
	}
	d.base, d.change.BaseVersion = files, live.Version
	return nil
}

// updated returns the write of an edit of the stored change c.
func updated(ctx context.Context, req *cedarpostv1.UpdateChangeRequest, c store.BundleChange, before, after draft) (w store.PolicyWrite, err error) {
	was := c
	if req.Title != nil {
		c.Title = req.GetTitle()
	}
	if req.Reason != nil {
		c.Reason = req.GetReason()
	}
	c.BaseVersion, c.Digest, c.Rules = after.change.BaseVersion, after.change.Digest, after.change.Rules
	stored := map[string]bundle.Edit{}
	for _, e := range before.edits {
		stored[e.Path] = e
	}
	for _, e := range after.edits {
		if old, ok := stored[e.Path]; !ok || old.Removed != e.Removed || !bytes.Equal(old.Content, e.Content) {
			w.Edits = append(w.Edits, store.ChangeEdit(e))
		}
		delete(stored, e.Path)
	}
	for path := range stored {
		w.Unedited = append(w.Unedited, path)
	}
	if c.Title == was.Title && c.Reason == was.Reason && c.BaseVersion == was.BaseVersion && c.Digest == was.Digest && len(w.Edits)+len(w.Unedited) == 0 {
		return w, nil
	}
	if c.Digest != was.Digest {
		c.Approvals = nil
	}
	if caller := callerFrom(ctx); !slices.Contains(c.Authors, caller) {
		if len(c.Authors) == maxAuthors {
			return w, connect.Errorf(connect.CodeFailedPrecondition, "the change %s has %d authors, which is the limit", c.ID, maxAuthors)
		}
		c.Authors = append(slices.Clone(c.Authors), caller)
	}
	c.UpdatedAt = time.Now().UTC().Truncate(time.Microsecond)
	w.Change, w.Reason = &c, c.Title
	return w, nil
}

// countOf returns "1 approval" or "2 approvals".
func countOf(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

// DiscardChange implements cedarpost.v1.PolicyService.
func (s *policyService) DiscardChange(ctx context.Context, req *cedarpostv1.DiscardChangeRequest) (*cedarpostv1.DiscardChangeResponse, error) {
	var c store.BundleChange
	answer := func(_ store.Changes, at *cedarpostv1.Revision) *cedarpostv1.DiscardChangeResponse {
		return &cedarpostv1.DiscardChangeResponse{Change: s.shown(c), Revision: at}
	}
	const procedure = cedarpostv1connect.PolicyServiceDiscardChangeProcedure
	return writeOnce(ctx, s.db, procedure, req.GetIdempotencyKey(), req, &cedarpostv1.DiscardChangeResponse{},
		func(o *once) (*cedarpostv1.DiscardChangeResponse, error) {
			return changeState(ctx, s, procedure, req, o, bundleOfChange(req.GetId()), req.GetId(), answer, func(now store.PolicyState) (w store.PolicyWrite, err error) {
				if c, err = openChange(req.GetId(), now); err != nil {
					return w, err
				}
				c.State, c.UpdatedAt = store.ChangeDiscarded, time.Now().UTC().Truncate(time.Microsecond)
				return store.PolicyWrite{Change: &c, Reason: req.GetReason()}, nil
			})
		})
}

// ListChanges implements cedarpost.v1.PolicyService.
func (s *policyService) ListChanges(ctx context.Context, req *cedarpostv1.ListChangesRequest) (*cedarpostv1.ListChangesResponse, error) {
	type place struct {
		Bundle string
		Number int64
	}
	p, err := readPage[place](&cedarpostv1.ListChangesRequest{Bundle: req.GetBundle(), State: req.GetState()}, req.GetPageToken())
	if err != nil {
		return nil, err
	}
	q := store.BundleChangeQuery{Bundle: req.GetBundle(), Limit: pageSize(req.GetPageSize()) + 1, AfterBundle: p.End.Bundle, BeforeNumber: p.End.Number}
	for name, state := range changeStates {
		if state == req.GetState() {
			q.State = name
		}
	}
	if names, all := bundlesFor(ctx, s.follower.Latest(), "ListChanges"); !all {
		q.Among = append([]string{}, names...)
		r := access.RightsFrom(ctx)
		for _, g := range r.Grants() { // a bundle that is not published yet can have changes
			if g.Bundle != access.AllBundles && r.May("ListChanges", access.Target{Bundle: g.Bundle}) {
				q.Among = append(q.Among, g.Bundle)
			}
		}
	}
	list, err := s.db.BundleChanges(ctx, q)
	if err != nil {
		return nil, err
	}
	out := &cedarpostv1.ListChangesResponse{}
	if len(list) == q.Limit {
		list = list[:q.Limit-1]
		last := list[len(list)-1]
		out.NextPageToken = p.next(place{last.Bundle, last.Number})
	}
	snapshot, now := s.follower.Latest(), time.Now()
	live := map[string]*bundle.Rules{}
	for _, c := range list {
		if b, published := snapshot.Bundle(c.Bundle); published && live[c.Bundle] == nil {
			r := liveRules(b)
			live[c.Bundle] = &r
		}
		out.Changes = append(out.Changes, changeToProto(c, s.stricter(live[c.Bundle], decodeRules(c.Rules)), now))
	}
	return out, nil
}
