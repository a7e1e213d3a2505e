package server

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectproto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cedarpost/cedarpost/bundle"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/offline"
	"github.com/cedarpost/cedarpost/store"
)

const (
	maxBundleBytes = 256 << 20
	maxBundleFiles = 10_000
	filePart       = 1 << 20
	maxMisfits     = 20               // stored entities that a refusal names
	maxUploads     = 4                // bundles at once, each up to maxBundleBytes
	uploadWait     = 10 * time.Second // for a place
	maxMentions    = 10_000           // entities named by policies that are looked up
	maxUnstored    = 50               // warnings of such entities
)

// policyService publishes and reads bundles.
type policyService struct {
	db       *store.DB
	follower *follower
	uploads  chan struct{} // a place for each upload at once
}

func newPolicyService(db *store.DB, f *follower) *policyService {
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
			if err := (&entityService{db: s.db, follower: s.follower}).catchUp(ctx); err != nil {
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

// receiveBundle reads an upload within its caps.
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

// publish checks a bundle against the current snapshot and commits it if no
// other publish came between.
func (s *policyService) publish(ctx context.Context, b *bundle.Bundle, dryRun bool) (*cedarpostv1.ApplyBundleResponse, error) {
	snap, err := s.follower.current()
	if err != nil {
		return nil, err
	}
	var others []engine.Source
	for _, o := range snap.bundles {
		if o.Name == b.Name {
			continue
		}
		src, err := sourceFromStore(o)
		if err != nil {
			return nil, err
		}
		others = append(others, src)
	}
	report, set := offline.Check(b, others, snap.set)
	if !report.Valid() || report.Failed() > 0 {
		return nil, reportRefusal(b.Name, report)
	}
	if !dryRun {
		if i := slices.IndexFunc(snap.bundles, func(o store.Bundle) bool { return o.Name == b.Name }); i >= 0 && snap.bundles[i].Digest == b.Digest() {
			return applied(snap, snap.bundles[i], snap.position.Number, false, report), nil
		}
	}
	changed := set.ChangedTypes(snap.set)
	if err := s.checkStored(ctx, snap, set, changed); err != nil {
		return nil, err
	}
	if err := s.mentions(ctx, snap, set, b.Name, report); err != nil {
		return nil, err
	}
	p, err := publication(b, set)
	if err != nil {
		return nil, err
	}
	if dryRun {
		return applied(snap, p.Bundle, snap.position.Number, false, report), nil
	}
	p.Caller = callerFrom(ctx)
	p.Bundle.PublishedBy = p.Caller
	p.BaseRevision, p.EntitiesRevision, p.At = snap.policyRevision, snap.position.Number, snap.position
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
	// Committed: a server that is late applying it is no failure of the publish.
	base := snap
	if now, err := s.follower.atLeast(ctx, made.Revision); err == nil {
		snap = now
	}
	out := applied(snap, p.Bundle, made.Revision, true, report)
	out.Revision = written(base, made.Revision, made.Mark)
	for _, o := range snap.bundles {
		if o.Name == b.Name {
			out.Bundle = bundleToProto(snap, o)
		}
	}
	return out, nil
}

// mentions warns of entities that the policies name and that are not stored.
// What the check said of entities.json does not count here: the store does.
func (s *policyService) mentions(ctx context.Context, snap *snapshot, set *engine.Set, name string, report *offline.Report) error {
	mentions := set.Mentions(name)
	if len(mentions) > maxMentions {
		mentions = mentions[:maxMentions]
	}
	uids := make([]store.UID, len(mentions))
	for i, m := range mentions {
		uids[i] = storeUID(m.UID)
	}
	rows, err := s.db.LoadEntitiesAt(ctx, snap.position, uids)
	if err != nil {
		return err
	}
	stored := map[store.UID]bool{}
	for _, row := range rows {
		stored[row.UID] = true
	}
	warned := 0
	for i, m := range mentions {
		missing := m.Missing()
		report.Findings = slices.DeleteFunc(report.Findings, func(f engine.Finding) bool { return f == missing })
		if !stored[uids[i]] && warned < maxUnstored {
			warned++
			report.Findings = append(report.Findings, missing)
		}
	}
	return nil
}

// publication is a checked bundle as the store keeps it.
func publication(b *bundle.Bundle, set *engine.Set) (store.Publish, error) {
	src := offline.Source(b)
	fields, err := json.Marshal(src.Fields)
	if err != nil {
		return store.Publish{}, err
	}
	p := store.Publish{Bundle: store.Bundle{
		Name: b.Name, Digest: b.Digest(), Description: b.Description, Owners: b.Owners,
		OnForbidError: b.OnForbidError, Namespaces: set.Namespaces(b.Name),
		Schema: src.Schema, Fields: string(fields),
	}}
	for _, pol := range set.Policies(b.Name) {
		p.Bundle.Policies = append(p.Bundle.Policies, store.Policy{
			Bundle: b.Name, ID: pol.ID, File: pol.File, Line: pol.Line, Text: pol.Text,
		})
	}
	p.Bundle.PolicyCount = int32(len(p.Bundle.Policies))
	for _, f := range b.Files {
		p.Files = append(p.Files, store.File{Path: f.Path, Content: f.Content})
	}
	return p, nil
}

// checkStored reads the stored entities of types that changed by the new schema.
func (s *policyService) checkStored(ctx context.Context, snap *snapshot, set *engine.Set, types []string) error {
	if len(types) == 0 {
		return nil
	}
	var bad misfitList
	err := s.db.EachEntity(ctx, snap.position.Number, types, func(e store.Entity) error {
		bad.check(set, e)
		return nil
	})
	return cmp.Or(err, bad.err())
}

func misfits(set *engine.Set, entities []store.Entity) error {
	var bad misfitList
	for _, e := range entities {
		bad.check(set, e)
	}
	return bad.err()
}

// misfitList collects stored entities that a new schema refuses.
type misfitList struct {
	count int
	named []*cedarpostv1.Finding
}

func (m *misfitList) check(set *engine.Set, e store.Entity) {
	if _, err := readStored(set, e); err != nil {
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

// refusal is an error that carries findings, for people in its text and for
// programs as a detail.
func refusal(code connect.Code, msg string, findings []*cedarpostv1.Finding) error {
	var b strings.Builder
	b.WriteString(msg)
	for i, f := range findings {
		if i == 5 {
			fmt.Fprintf(&b, "; and %d more", len(findings)-i)
			break
		}
		sep := ": "
		if i > 0 {
			sep = "; "
		}
		b.WriteString(sep + findingText(f))
	}
	err := connect.NewError(code, b.String())
	if d, derr := connectproto.NewErrorDetail(&cedarpostv1.BundleFindings{Findings: findings}); derr == nil {
		err = err.WithDetail(d)
	}
	return err
}

func findingText(f *cedarpostv1.Finding) string {
	return engine.Finding{
		File: f.File, Line: int(f.Line), Column: int(f.Column), Policy: f.Policy, Message: f.Message,
	}.String()
}

// reportRefusal refuses a bundle that did not check: as a bad bundle, or, when
// the findings are about another one, as one that would break that.
func reportRefusal(name string, r *offline.Report) error {
	findings := findingsToProto(name, r.Findings)
	for _, t := range r.Tests {
		for _, f := range t.Failures {
			findings = append(findings, &cedarpostv1.Finding{
				Severity: cedarpostv1.Finding_ERROR, File: bundle.TestsName, Line: int32(t.Line), Test: true,
				Message: fmt.Sprintf("%s: %s", t.Name, f),
			})
		}
	}
	for _, f := range r.Findings {
		if !f.Warning && f.Bundle != "" && f.Bundle != name {
			return refusal(connect.CodeFailedPrecondition, fmt.Sprintf("it would break bundle %s", f.Bundle), findings)
		}
	}
	if r.Valid() {
		return refusal(connect.CodeInvalidArgument, fmt.Sprintf("%d of %d tests failed", r.Failed(), len(r.Tests)), findings)
	}
	return refusal(connect.CodeInvalidArgument, "the bundle does not check", findings)
}

func findingsToProto(name string, list []engine.Finding) []*cedarpostv1.Finding {
	out := make([]*cedarpostv1.Finding, 0, len(list))
	for _, f := range list {
		severity := cedarpostv1.Finding_ERROR
		if f.Warning {
			severity = cedarpostv1.Finding_WARNING
		}
		pf := &cedarpostv1.Finding{
			Severity: severity, File: f.File, Line: int32(f.Line), Column: int32(f.Column),
			Policy: f.Policy, Message: f.Message, Hint: f.Hint,
		}
		if f.Bundle != name {
			pf.Bundle = f.Bundle
		}
		out = append(out, pf)
	}
	return out
}

func problemsToProto(list bundle.Problems) []*cedarpostv1.Finding {
	out := make([]*cedarpostv1.Finding, 0, len(list))
	for _, p := range list {
		out = append(out, &cedarpostv1.Finding{
			Severity: cedarpostv1.Finding_ERROR, File: p.File, Line: int32(p.Line), Column: int32(p.Column),
			Message: p.Message, Hint: p.Hint,
		})
	}
	return out
}

func applied(snap *snapshot, b store.Bundle, revision int64, published bool, r *offline.Report) *cedarpostv1.ApplyBundleResponse {
	return &cedarpostv1.ApplyBundleResponse{
		Bundle: bundleToProto(snap, b), Revision: encodeRevision(snap.position, revision),
		Published: published, Warnings: findingsToProto(b.Name, r.Findings),
	}
}

func bundleToProto(snap *snapshot, b store.Bundle) *cedarpostv1.Bundle {
	out := &cedarpostv1.Bundle{
		Name: b.Name, Version: b.Version, Digest: b.Digest, Description: b.Description, Owners: b.Owners,
		Namespaces: b.Namespaces, Policies: b.PolicyCount, OnForbidError: b.OnForbidError, PublishedBy: b.PublishedBy,
	}
	if b.Since > 0 {
		out.Revision = encodeRevision(snap.position, b.Since)
		out.PublishedAt = timestamppb.New(b.PublishedAt)
	}
	return out
}

// ListBundles implements cedarpost.v1.PolicyService.
func (s *policyService) ListBundles(context.Context, *cedarpostv1.ListBundlesRequest) (*cedarpostv1.ListBundlesResponse, error) {
	snap, err := s.follower.current()
	if err != nil {
		return nil, err
	}
	out := &cedarpostv1.ListBundlesResponse{Revision: encodeRevision(snap.position, snap.position.Number)}
	for _, b := range snap.bundles {
		out.Bundles = append(out.Bundles, bundleToProto(snap, b))
	}
	return out, nil
}

// GetBundle implements cedarpost.v1.PolicyService.
func (s *policyService) GetBundle(ctx context.Context, req *cedarpostv1.GetBundleRequest, stream cedarpostv1connect.PolicyServiceGetBundleServerStream) error {
	snap, err := s.follower.current()
	if err != nil {
		return err
	}
	i := slices.IndexFunc(snap.bundles, func(b store.Bundle) bool { return b.Name == req.GetName() })
	if i < 0 {
		return connect.Errorf(connect.CodeNotFound, "there is no bundle %q", req.GetName())
	}
	files, err := s.db.BundleFiles(ctx, snap.position.Number, req.GetName())
	if err != nil {
		return err
	}
	err = stream.Send(&cedarpostv1.GetBundleResponse{Part: &cedarpostv1.GetBundleResponse_Bundle{Bundle: bundleToProto(snap, snap.bundles[i])}})
	for _, f := range files {
		parts := slices.Collect(slices.Chunk(f.Content, filePart))
		if len(parts) == 0 {
			parts = [][]byte{nil}
		}
		for _, data := range parts {
			if err != nil {
				return err
			}
			err = stream.Send(&cedarpostv1.GetBundleResponse{Part: &cedarpostv1.GetBundleResponse_File{
				File: &cedarpostv1.FilePart{Path: f.Path, Data: data},
			}})
		}
	}
	return err
}
