package server

import (
	"context"
	"errors"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cedarpost/cedarpost/bundle"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/snapshot"
	"github.com/cedarpost/cedarpost/store"
)

// ListVersions implements cedarpost.v1.PolicyService.
func (s *policyService) ListVersions(ctx context.Context, req *cedarpostv1.ListVersionsRequest) (*cedarpostv1.ListVersionsResponse, error) {
	p, err := readPage[int64](&cedarpostv1.ListVersionsRequest{Bundle: req.GetBundle()}, req.GetPageToken())
	if err != nil {
		return nil, err
	}
	v, err := s.follower.Current()
	if err != nil {
		return nil, err
	}
	most := pageSize(req.GetPageSize())
	list, err := s.db.BundleVersions(ctx, req.GetBundle(), p.End, most+1)
	if err != nil {
		return nil, err
	}
	if len(list) == 0 && p.End == 0 {
		return nil, noBundle(req.GetBundle())
	}
	out := &cedarpostv1.ListVersionsResponse{}
	if len(list) > most {
		list = list[:most]
		out.NextPageToken = p.next(list[most-1].Version)
	}
	if out.Versions, err = s.versionsToProto(ctx, v, list); err != nil {
		return nil, err
	}
	for i, b := range list {
		if b.Live {
			out.Versions[i].Servers, err = s.serversAt(ctx, b.Since)
		}
	}
	return out, err
}

func noBundle(name string) error {
	return connect.Errorf(connect.CodeNotFound, "there is no bundle %q", name)
}

// versionsToProto adds to versions who approved the changes that they come from.
func (s *policyService) versionsToProto(ctx context.Context, v snapshot.View, list []store.BundleVersion) (out []*cedarpostv1.BundleVersion, err error) {
	var ids []string
	for _, b := range list {
		if b.Change != "" {
			ids = append(ids, b.Change)
		}
	}
	var changes map[string]store.BundleChange
	if len(ids) > 0 {
		if changes, err = s.db.BundleChangesByID(ctx, ids); err != nil {
			return nil, err
		}
	}
	for _, b := range list {
		one := &cedarpostv1.BundleVersion{
			Bundle: b.Name, Version: b.Version, Live: b.Live, Digest: b.Digest, PublishedAt: timestamppb.New(b.PublishedAt), PublishedBy: b.PublishedBy,
			Message: b.Message, Change: b.Change, ApprovedBy: verdictsToProto(approvalsOf(changes[b.Change])), RollbackOf: b.RollbackOf, Approvals: b.Approvals, BreakGlass: b.BreakGlass,
			Policies: b.PolicyCount, Revision: snapshot.EncodeRevision(v.Position, b.Since),
		}
		if b.DeletedAt != nil && b.DeletedBy != nil {
			one.DeletedAt, one.DeletedBy = timestamppb.New(*b.DeletedAt), *b.DeletedBy
		}
		out = append(out, one)
	}
	return out, nil
}

func verdictsToProto(list []store.Verdict) (out []*cedarpostv1.Verdict) {
	for _, d := range list {
		out = append(out, &cedarpostv1.Verdict{Caller: d.Caller, Reason: d.Reason, At: timestamppb.New(d.At), Report: d.Report})
	}
	return out
}

// version reads a version of a bundle.
func (s *policyService) version(ctx context.Context, name string, n int64) (store.BundleVersion, error) {
	b, err := s.db.BundleVersion(ctx, name, n)
	if errors.Is(err, store.ErrNotFound) {
		err = connect.Errorf(connect.CodeNotFound, "there is no version %d of a bundle %q", n, name)
	}
	return b, err
}

// live reads the live version of a bundle with its bundle.yaml, and without its policies. Unlike that of
// the snapshot, it is the newest one also while this server compiles it. Its version is 0 if there is none;
// of a bundle that was deleted, it has the rules that stay.
func (s *policyService) live(ctx context.Context, name string) (b store.Bundle, err error) {
	list, err := s.db.BundleVersions(ctx, name, 0, 1)
	if err != nil || len(list) == 0 {
		return b, err
	}
	if !list[0].Live {
		return s.departed(ctx, name)
	}
	b = list[0].Bundle
	b.Manifest, err = s.manifest(ctx, b)
	return b, err
}

// GetVersion implements cedarpost.v1.PolicyService.
func (s *policyService) GetVersion(ctx context.Context, req *cedarpostv1.GetVersionRequest, stream cedarpostv1connect.PolicyServiceGetVersionServerStream) error {
	v, err := s.follower.Current()
	if err != nil {
		return err
	}
	read, cancel := context.WithTimeout(ctx, adminTimeout)
	defer cancel()
	b, err := s.version(read, req.GetBundle(), req.GetVersion())
	if err != nil {
		return err
	}
	versions, err := s.versionsToProto(read, v, []store.BundleVersion{b})
	if err != nil {
		return err
	}
	if versions[0].Servers, err = s.serversAt(read, b.Since); err != nil {
		return err
	}
	err = stream.Send(&cedarpostv1.GetVersionResponse{Part: &cedarpostv1.GetVersionResponse_Version{Version: versions[0]}})
	if err != nil {
		return err
	}
	still := need{"GetVersion", access.Target{Bundle: req.GetBundle()}}
	return s.sendFiles(ctx, b.Since, req.GetBundle(), func(part *cedarpostv1.FilePart) error {
		if err := s.stillMay(ctx, cedarpostv1connect.PolicyServiceGetVersionProcedure, still); err != nil { // as in GetBundle
			return err
		}
		return stream.Send(&cedarpostv1.GetVersionResponse{Part: &cedarpostv1.GetVersionResponse_File{File: part}})
	})
}

// DiffVersions implements cedarpost.v1.PolicyService.
func (s *policyService) DiffVersions(ctx context.Context, req *cedarpostv1.DiffVersionsRequest) (*cedarpostv1.DiffVersionsResponse, error) {
	from, err := s.version(ctx, req.GetBundle(), req.GetFrom())
	if err != nil {
		return nil, err
	}
	to, err := s.version(ctx, req.GetBundle(), req.GetTo())
	if err != nil {
		return nil, err
	}
	files, err := s.db.ChangedFiles(ctx, req.GetBundle(), from.Since, to.Since)
	if err != nil {
		return nil, err
	}
	// Two files and the text of the difference are in memory.
	size := 0
	for _, f := range files {
		for _, bytes := range []*int{f.Before, f.After} {
			if bytes != nil && !large(bytes) {
				size += *bytes
			}
		}
	}
	if err := replyFrom(ctx).take(min(2*size, 2*bundle.MaxDiffFile+bundle.MaxDiffText)); err != nil {
		return nil, err
	}
	out := &cedarpostv1.DiffVersionsResponse{}
	var d bundle.Differ
	for _, f := range files {
		before, err := s.side(ctx, from.Bundle, f.Path, f.Before)
		if err != nil {
			return nil, err
		}
		after, err := s.side(ctx, to.Bundle, f.Path, f.After)
		if err != nil {
			return nil, err
		}
		out.Files = append(out.Files, diffToProto(d.Diff(f.Path, before, after, large(f.Before) || large(f.After))))
	}
	return out, nil
}

func large(bytes *int) bool { return bytes != nil && *bytes > bundle.MaxDiffFile }

// side reads one side of a file that differs, unless it is large. It is nil if there is no file.
func (s *policyService) side(ctx context.Context, b store.Bundle, path string, bytes *int) ([]byte, error) {
	switch {
	case bytes == nil:
		return nil, nil
	case large(bytes) || *bytes == 0:
		return []byte{}, nil
	}
	return s.db.ReadBundleFile(ctx, b.Since, b.Name, path, 0, bundle.MaxDiffFile)
}

func diffToProto(d bundle.FileDiff) *cedarpostv1.FileDiff {
	kind := cedarpostv1.FileDiff_CHANGED
	if d.Added {
		kind = cedarpostv1.FileDiff_ADDED
	} else if d.Removed {
		kind = cedarpostv1.FileDiff_REMOVED
	}
	return &cedarpostv1.FileDiff{Path: d.Path, Kind: kind, Text: d.Text, Omitted: d.Omitted}
}
