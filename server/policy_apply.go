package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/cedarpost/cedarpost/bundle"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/offline"
	"github.com/cedarpost/cedarpost/server/snapshot"
	"github.com/cedarpost/cedarpost/server/stored"
	"github.com/cedarpost/cedarpost/store"
)

const (
	maxBundleBytes = 256 << 20
	maxBundleFiles = 10_000
	filePart       = 1 << 20
	maxMisfits     = 20               // stored entities that a refusal names
	maxUploads     = 4                // at once, each of up to maxBundleBytes
	uploadWait     = 10 * time.Second // until another upload ends
	maxMentions    = 10_000           // entities named by policies that are looked up in the store
	maxUnstored    = 50               // warnings of such entities that are not stored
)

// policyService publishes and reads bundles.
type policyService struct {
	db       *store.DB
	follower *snapshot.Follower
	uploads  chan struct{} // holds one element for each upload
}

func newPolicyService(db *store.DB, f *snapshot.Follower) *policyService {
	return &policyService{db: db, follower: f, uploads: make(chan struct{}, maxUploads)}
}

// ApplyBundle implements cedarpost.v1.PolicyService.
func (s *policyService) ApplyBundle(ctx context.Context, stream cedarpostv1connect.PolicyServiceApplyBundleServerStream) (*cedarpostv1.ApplyBundleResponse, error) {
	select {
	case s.uploads <- struct{}{}:
		defer func() { <-s.uploads }()
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-time.After(uploadWait):
		return nil, connect.NewError(connect.CodeResourceExhausted, "other bundles are being uploaded; try again in a moment")
	}
	header, files, err := receiveBundle(stream)
	if err != nil {
		return nil, err
	}
	b, err := bundle.FromFiles(header.GetName(), files)
	var problems bundle.Problems
	if errors.As(err, &problems) {
		return nil, refusal(connect.CodeInvalidArgument, "the bundle cannot be read", problemsToProto(problems))
	}
	if err != nil {
		return nil, err
	}
	if b.Name != header.GetName() {
		return nil, connect.Errorf(connect.CodeInvalidArgument, "bundle.yaml names the bundle %q, the upload names it %q", b.Name, header.GetName())
	}
	var last error
	for range publishRetries {
		out, err := s.publish(ctx, b, header.GetDryRun())
		if outdated(err) {
			last = err
			if _, err := s.follower.FullyConsistent(ctx); err != nil {
				return nil, err
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		return out, nil
	}
	return nil, last
}

// receiveBundle reads an upload. Its size is bounded.
func receiveBundle(stream cedarpostv1connect.PolicyServiceApplyBundleServerStream) (*cedarpostv1.BundleHeader, []bundle.File, error) {
	var header *cedarpostv1.BundleHeader
	var files []bundle.File
	total := 0
	seen := map[string]bool{}
	for {
		msg, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			if header == nil {
				return nil, nil, connect.NewError(connect.CodeInvalidArgument, "the upload has no header")
			}
			return header, files, nil
		}
		if err != nil {
			return nil, nil, err
		}
		if h := msg.GetHeader(); h != nil {
			if header != nil {
				return nil, nil, connect.NewError(connect.CodeInvalidArgument, "the upload has two headers")
			}
			header = h
			continue
		}
		if header == nil {
			return nil, nil, connect.NewError(connect.CodeInvalidArgument, "the first message of an upload is its header")
		}
		part := msg.GetFile()
		if total += len(part.GetData()); total > maxBundleBytes {
			return nil, nil, connect.Errorf(connect.CodeInvalidArgument, "the bundle is larger than %d bytes", maxBundleBytes)
		}
		if n := len(files); n > 0 && files[n-1].Path == part.GetPath() {
			files[n-1].Content = append(files[n-1].Content, part.GetData()...)
			continue
		}
		if seen[part.GetPath()] {
			return nil, nil, connect.Errorf(connect.CodeInvalidArgument, "file %q was sent twice", part.GetPath())
		}
		seen[part.GetPath()] = true
		if len(files) == maxBundleFiles {
			return nil, nil, connect.Errorf(connect.CodeInvalidArgument, "the bundle has more than %d files", maxBundleFiles)
		}
		files = append(files, bundle.File{Path: part.GetPath(), Content: part.GetData()})
	}
}

// publish checks a bundle against the newest snapshot, and commits it unless another bundle
// was published meanwhile.
func (s *policyService) publish(ctx context.Context, b *bundle.Bundle, dryRun bool) (*cedarpostv1.ApplyBundleResponse, error) {
	v, err := s.follower.Current()
	if err != nil {
		return nil, err
	}
	var others []engine.Source
	for _, o := range v.Bundles {
		if o.Name == b.Name {
			continue
		}
		src, err := stored.Source(o)
		if err != nil {
			return nil, err
		}
		others = append(others, src)
	}
	report, set := offline.Check(b, others, v.Set)
	if !report.Valid() || report.Failed() > 0 {
		return nil, reportRefusal(b.Name, report)
	}
	if !dryRun {
		if i := slices.IndexFunc(v.Bundles, func(o store.Bundle) bool { return o.Name == b.Name }); i >= 0 && v.Bundles[i].Digest == b.Digest() {
			return applied(v, v.Bundles[i], v.Position.Number, false, report), nil
		}
	}
	changed := set.ChangedTypes(v.Set)
	if err := s.checkStored(ctx, v, set, changed); err != nil {
		return nil, err
	}
	if err := s.mentions(ctx, v, set, b.Name, report); err != nil {
		return nil, err
	}
	p, err := stored.Publication(b, set)
	if err != nil {
		return nil, err
	}
	if dryRun {
		return applied(v, p.Bundle, v.Position.Number, false, report), nil
	}
	p.Caller = callerFrom(ctx)
	p.Bundle.PublishedBy = p.Caller
	p.BaseRevision, p.EntitiesRevision, p.At = v.PolicyRevision, v.Position.Number, v.Position
	p.Recheck = func(entities []store.Entity) error {
		return misfits(set, slices.DeleteFunc(entities, func(e store.Entity) bool { return !slices.Contains(changed, e.Type) }))
	}
	made, err := s.db.PublishBundle(ctx, p)
	var refused *connect.Error
	if err != nil && !errors.As(err, &refused) && !outdated(err) {
		err = connect.NewError(connect.CodeUnavailable, outcomeUnknown).WithCause(err)
	}
	if err != nil {
		return nil, err
	}
	// It is committed. If this server is late to apply it, the publish succeeded nevertheless.
	base := v
	if now, err := s.follower.AtLeast(ctx, made.Revision); err == nil {
		v = now
	}
	out := applied(v, p.Bundle, made.Revision, true, report)
	out.Revision = written(base, made.Revision, made.Mark)
	for _, o := range v.Bundles {
		if o.Name == b.Name {
			out.Bundle = bundleToProto(v, o)
		}
	}
	return out, nil
}

// mentions warns of entities that the policies name and that are not stored. It replaces the
// warnings of the check, which are about entities.json.
func (s *policyService) mentions(ctx context.Context, v snapshot.View, set *engine.Set, name string, report *offline.Report) error {
	mentions := set.Mentions(name)
	if len(mentions) > maxMentions {
		mentions = mentions[:maxMentions]
	}
	uids := make([]store.UID, len(mentions))
	for i, m := range mentions {
		uids[i] = stored.UID(m.UID)
	}
	rows, err := s.db.LoadEntitiesAt(ctx, v.Position, uids)
	if err != nil {
		return err
	}
	present := map[store.UID]bool{}
	for _, row := range rows {
		present[row.UID] = true
	}
	warned := 0
	for i, m := range mentions {
		missing := m.Missing()
		report.Findings = slices.DeleteFunc(report.Findings, func(f engine.Finding) bool { return f == missing })
		if !present[uids[i]] && warned < maxUnstored {
			warned++
			report.Findings = append(report.Findings, missing)
		}
	}
	return nil
}

// checkStored checks that the stored entities of types that changed fit the new schema.
func (s *policyService) checkStored(ctx context.Context, v snapshot.View, set *engine.Set, types []string) error {
	if len(types) == 0 {
		return nil
	}
	var bad misfitList
	err := s.db.EachEntity(ctx, v.Position.Number, types, func(e store.Entity) error {
		bad.check(set, e)
		return nil
	})
	return cmp.Or(err, bad.err())
}

// misfits returns an error if entities do not fit the schema of a set.
func misfits(set *engine.Set, entities []store.Entity) error {
	var bad misfitList
	for _, e := range entities {
		bad.check(set, e)
	}
	return bad.err()
}

// misfitList collects stored entities that do not fit a new schema.
type misfitList struct {
	count int
	named []*cedarpostv1.Finding
}

func (m *misfitList) check(set *engine.Set, e store.Entity) {
	if _, err := stored.ReadEntity(set, e); err != nil {
		if m.count++; len(m.named) < maxMisfits {
			m.named = append(m.named, &cedarpostv1.Finding{
				Severity: cedarpostv1.Finding_ERROR, File: bundle.SchemaName, Message: err.Error(),
				Hint: "change or delete the entity first",
			})
		}
	}
}

func (m *misfitList) err() error {
	if m.count == 0 {
		return nil
	}
	return refusal(connect.CodeFailedPrecondition, fmt.Sprintf("%d stored entities do not fit the new schema", m.count), m.named)
}

// applied returns the response of ApplyBundle.
func applied(v snapshot.View, b store.Bundle, revision int64, published bool, r *offline.Report) *cedarpostv1.ApplyBundleResponse {
	return &cedarpostv1.ApplyBundleResponse{
		Bundle: bundleToProto(v, b), Revision: snapshot.EncodeRevision(v.Position, revision),
		Published: published, Warnings: findingsToProto(b.Name, r.Findings),
	}
}
