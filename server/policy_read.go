package server

import (
	"context"
	"slices"

	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/snapshot"
	"github.com/cedarpost/cedarpost/store"
)

func bundleToProto(v snapshot.View, b store.Bundle) *cedarpostv1.Bundle {
	out := &cedarpostv1.Bundle{
		Name: b.Name, Version: b.Version, Digest: b.Digest, Description: b.Description, Owners: b.Owners,
		Namespaces: b.Namespaces, Policies: b.PolicyCount, OnForbidError: b.OnForbidError, PublishedBy: b.PublishedBy,
		Message: b.Message, Change: b.Change, RollbackOf: b.RollbackOf, Approvals: b.Approvals, BreakGlass: b.BreakGlass,
	}
	if b.Since > 0 {
		out.Revision = snapshot.EncodeRevision(v.Position, b.Since)
		out.PublishedAt = timestamppb.New(b.PublishedAt)
	}
	return out
}

// ListBundles implements cedarpost.v1.PolicyService.
func (s *policyService) ListBundles(ctx context.Context, _ *cedarpostv1.ListBundlesRequest) (*cedarpostv1.ListBundlesResponse, error) {
	v, err := s.follower.Current()
	if err != nil {
		return nil, err
	}
	out := &cedarpostv1.ListBundlesResponse{Revision: snapshot.EncodeRevision(v.Position, v.Position.Number)}
	names, all := bundlesFor(ctx, v.Snapshot, "ListBundles")
	freezes, err := s.db.BundleFreezes(ctx)
	if err != nil {
		return nil, err
	}
	for _, b := range v.Bundles {
		if !all && !slices.Contains(names, b.Name) {
			continue
		}
		one := bundleToProto(v, b)
		if f, ok := freezes[b.Name]; ok {
			one.Freeze = freezeToProto(f)
		}
		out.Bundles = append(out.Bundles, one)
	}
	return out, nil
}

// GetBundle implements cedarpost.v1.PolicyService.
func (s *policyService) GetBundle(ctx context.Context, req *cedarpostv1.GetBundleRequest, stream cedarpostv1connect.PolicyServiceGetBundleServerStream) error {
	v, err := s.follower.Current()
	if err != nil {
		return err
	}
	b, ok := v.Bundle(req.GetName())
	if !ok {
		return noBundle(req.GetName())
	}
	one := bundleToProto(v, b)
	read, cancel := context.WithTimeout(ctx, adminTimeout)
	now, err := s.db.PolicyState(read, b.Name, "")
	cancel()
	if err != nil {
		return err
	}
	if now.Freeze != nil {
		one.Freeze = freezeToProto(*now.Freeze)
	}
	if err := stream.Send(&cedarpostv1.GetBundleResponse{Part: &cedarpostv1.GetBundleResponse_Bundle{Bundle: one}}); err != nil {
		return err
	}
	still := need{"GetBundle", access.Target{Bundle: b.Name}}
	return s.sendFiles(ctx, v.Position.Number, b.Name, func(part *cedarpostv1.FilePart) error {
		// The caller can read slowly, and its key or its grant can end meanwhile.
		if err := s.stillMay(ctx, cedarpostv1connect.PolicyServiceGetBundleProcedure, still); err != nil {
			return err
		}
		return stream.Send(&cedarpostv1.GetBundleResponse{Part: &cedarpostv1.GetBundleResponse_File{File: part}})
	})
}

// sendFiles sends the files of a bundle as they were at a revision, in parts.
func (s *policyService) sendFiles(ctx context.Context, at int64, name string, send func(*cedarpostv1.FilePart) error) error {
	read, cancel := context.WithTimeout(ctx, adminTimeout)
	files, err := s.db.BundleFiles(read, at, name)
	cancel()
	for _, f := range files {
		for from := 0; err == nil && (from < f.Bytes || from == 0); from += filePiece {
			err = s.sendPiece(ctx, send, at, name, f, from)
		}
	}
	return err
}

// filePiece is how many bytes of a file are in memory while a bundle is sent. Postgres decompresses
// the beginning of a file for each piece, so smaller ones cost much more.
const filePiece = 4 << 20

// sendPiece sends a piece of a file of a bundle. The call holds the bytes of the piece meanwhile,
// and not those of the whole bundle.
func (s *policyService) sendPiece(ctx context.Context, send func(*cedarpostv1.FilePart) error, at int64, name string, f store.FileSize, from int) error {
	a := replyFrom(ctx)
	defer a.release()
	if err := a.take(min(f.Bytes-from, filePiece)); err != nil {
		return err
	}
	// The deadline is for the database: how long the caller may take to read is bounded elsewhere.
	read, cancel := context.WithTimeout(ctx, adminTimeout)
	data, err := s.db.ReadBundleFile(read, at, name, f.Path, from, filePiece)
	cancel()
	if err != nil {
		return err
	}
	parts := slices.Collect(slices.Chunk(data, filePart))
	if len(parts) == 0 {
		parts = [][]byte{nil}
	}
	for _, data := range parts {
		if err := send(&cedarpostv1.FilePart{Path: f.Path, Data: data}); err != nil {
			return err
		}
	}
	return nil
}
