package server

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/cedar-policy/cedar-go"
	"google.golang.org/protobuf/proto"

	"github.com/cedarpost/cedarpost/bundle"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
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
	maxMisfits     = 20                 // stored entities that a refusal names
	maxUploads     = 4                  // bundles to publish at once, and as many dry runs
	maxUploaded    = 2 * maxBundleBytes // bytes of these uploads together
	uploadWait     = 10 * time.Second   // until an upload of another caller ends
	ownUploadWait  = time.Minute        // until the upload of the same caller ends, which may be checked for long
	uploadRate     = 16 << 10           // bytes that a caller sends each second, at least
	maxMentions    = 10_000             // entities named by policies that are looked up in the store
	maxUnstored    = 50                 // warnings of such entities that are not stored
)

// policyService publishes and reads bundles.
type policyService struct {
	db       *store.DB
	follower *snapshot.Follower
	recorder *decisionlog.Recorder
	noted    *decisionlog.Noted
	stillMay func(ctx context.Context, procedure string, needs ...need) error
	times    timeouts
	log      *slog.Logger
	metric   *policyMetrics
	// noApprovals switches approvals and reports of the impact off: a bundle is published whatever it says
	// about them.
	noApprovals bool
	// publishes and dryRuns have the places of uploads.
	publishes, dryRuns *bundlePlaces
	impacts            *impacts
	// rightsOf returns the rights that a caller has by its stored grants.
	rightsOf func(caller string) (*access.Rights, error)
}

func newPolicyService(db *store.DB, g *gate, recorder *decisionlog.Recorder, noted *decisionlog.Noted, times timeouts) *policyService {
	return &policyService{db: db, follower: g.follower, recorder: recorder, noted: noted, stillMay: g.stillMay, times: times, log: slog.New(slog.DiscardHandler), metric: newPolicyMetrics(nil), publishes: newBundlePlaces(), dryRuns: newBundlePlaces(),
		rightsOf: func(caller string) (*access.Rights, error) {
			return g.rights(g.follower.Latest(), access.Caller{Name: caller}, time.Now())
		},
	}
}

// places returns the places for an upload.
func (s *policyService) places(dryRun bool) *bundlePlaces {
	if dryRun {
		return s.dryRuns
	}
	return s.publishes
}

// ApplyBundle implements cedarpost.v1.PolicyService.
func (s *policyService) ApplyBundle(ctx context.Context, stream cedarpostv1connect.PolicyServiceApplyBundleServerStream) (*cedarpostv1.ApplyBundleResponse, error) {
	header, err := receiveHeader(stream)
	if err != nil {
		return nil, err
	}
	out, err := s.apply(ctx, header, stream)
	if err != nil {
		s.noteRefused(ctx, cedarpostv1connect.PolicyServiceApplyBundleProcedure, header.GetName(), header.GetDryRun(), err)
	}
	return out, err
}

// noteRefused notes a publish that was refused for what it holds, or for how it was sent. Other
// errors say nothing about the bundle.
func (s *policyService) noteRefused(ctx context.Context, procedure, name string, dryRun bool, err error) {
	refused, ok := errors.AsType[*connect.Error](err)
	if !ok || ctx.Err() != nil {
		return
	}
	refused = tooLarge(procedure, refused)
	switch refused.Code() {
	case connect.CodeInvalidArgument, connect.CodeFailedPrecondition, connect.CodeResourceExhausted, connect.CodeDeadlineExceeded:
		s.noted.PublishRefused(ctx, name, dryRun, refused.Message(), findingTexts(refused))
	default:
	}
}

// apply reads an upload after its header, checks it, and publishes it unless it is a dry run.
func (s *policyService) apply(ctx context.Context, header *cedarpostv1.BundleHeader, stream cedarpostv1connect.PolicyServiceApplyBundleServerStream) (*cedarpostv1.ApplyBundleResponse, error) {
	places := s.places(header.GetDryRun())
	leave, err := places.upload(ctx, callerFrom(ctx))
	if err != nil {
		return nil, err
	}
	defer leave()
	files, size, err := s.receiveFiles(stream, places)
	defer places.bytes.Add(-size)
	if err != nil {
		return nil, err
	}
	b, err := readFiles(header.GetName(), files)
	if err != nil {
		return nil, err
	}
	key := header.GetIdempotencyKey()
	if header.GetDryRun() {
		key = ""
	}
	still := need{applyBundle, access.Target{Bundle: b.Name, Changes: true}}
	if header.GetDryRun() {
		still = need{"CheckBundle", access.Target{Bundle: b.Name}}
	}
	p := &publication{
		bundle: b, procedure: cedarpostv1connect.PolicyServiceApplyBundleProcedure, need: still,
		dryRun: header.GetDryRun(), message: header.GetMessage(), rules: s.applyRules(header, b), allowBreaking: header.GetAllowBreaking(),
		approvals: func(store.Bundle) int { return b.Approvals },
		respond:   func(out *cedarpostv1.ApplyBundleResponse) proto.Message { return out },
	}
	if !header.GetDryRun() {
		if err := p.breakGlassBy(header.BreakGlass); err != nil {
			return nil, err
		}
	}
	request := &cedarpostv1.Bundle{Name: b.Name, Digest: b.Digest(), Message: header.GetMessage(), BreakGlass: header.GetBreakGlass()}
	if header.ExpectVersion != nil {
		request.Version = header.GetExpectVersion() + 1
	}
	return writeOnce(ctx, s.db, p.procedure, key, request, &cedarpostv1.ApplyBundleResponse{},
		func(o *once) (*cedarpostv1.ApplyBundleResponse, error) { return s.publish(ctx, p, o) })
}

// applyRules returns the rules for ApplyBundle.
func (s *policyService) applyRules(h *cedarpostv1.BundleHeader, b *bundle.Bundle) publishRules {
	return func(live store.Bundle, now store.PolicyState) (w store.PolicyWrite, blocked []block, err error) {
		if h.ExpectVersion != nil && h.GetExpectVersion() != live.Version {
			return w, nil, connect.Errorf(connect.CodeAborted, "version %d of the bundle %s is live, not %d; look at what was published since, and try again", live.Version, b.Name, h.GetExpectVersion())
		}
		return w, s.blocks(proposal{bundle: b.Name, digest: b.Digest(), rules: b.Rules}, live, now, time.Now()), nil
	}
}

// receiveHeader reads the first message of an upload. The upload has no place until it has come.
func receiveHeader(stream cedarpostv1connect.PolicyServiceApplyBundleServerStream) (*cedarpostv1.BundleHeader, error) {
	msg, err := stream.Receive()
	switch {
	case errors.Is(err, io.EOF):
		return nil, connect.NewError(connect.CodeInvalidArgument, "the upload has no header")
	case err != nil:
		return nil, err
	case msg.GetHeader() == nil:
		return nil, connect.NewError(connect.CodeInvalidArgument, "the first message of an upload is its header")
	}
	return msg.GetHeader(), nil
}

// receiveFiles reads the files of an upload. Their size is bounded, and so is the time that the
// caller may take to send them: it must not keep its place with a byte now and then. size is what
// was added to the bytes of places, also if there is an error.
func (s *policyService) receiveFiles(stream cedarpostv1connect.PolicyServiceApplyBundleServerStream, places *bundlePlaces) (files []bundle.File, size int64, err error) {
	began := time.Now()
	seen := map[string]bool{}
	for {
		msg, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			return files, size, nil
		}
		if err != nil {
			return nil, size, err
		}
		if msg.GetHeader() != nil {
			return nil, size, connect.NewError(connect.CodeInvalidArgument, "the upload has two headers")
		}
		part := msg.GetFile()
		n := int64(len(part.GetData()))
		if size += n; places.bytes.Add(n) > maxUploaded {
			return nil, size, connect.NewError(connect.CodeResourceExhausted, "other large bundles are being uploaded; try again in a moment")
		}
		if size > maxBundleBytes {
			return nil, size, connect.Errorf(connect.CodeInvalidArgument, "the bundle is larger than %d bytes", maxBundleBytes)
		}
		if time.Since(began) > s.times.message+time.Duration(size)*time.Second/uploadRate {
			return nil, size, connect.Errorf(connect.CodeDeadlineExceeded, "the upload is slower than %d bytes each second", uploadRate)
		}
		if n := len(files); n > 0 && files[n-1].Path == part.GetPath() {
			files[n-1].Content = append(files[n-1].Content, part.GetData()...)
			continue
		}
		if seen[part.GetPath()] {
			return nil, size, connect.Errorf(connect.CodeInvalidArgument, "file %q was sent twice", part.GetPath())
		}
		seen[part.GetPath()] = true
		if len(files) == maxBundleFiles {
			return nil, size, connect.Errorf(connect.CodeInvalidArgument, "the bundle has more than %d files", maxBundleFiles)
		}
		files = append(files, bundle.File{Path: part.GetPath(), Content: part.GetData()})
	}
}

// mayOwn refuses a bundle that takes a namespace over, unless the caller may publish the bundles that
// had it, too, or check them, if it is a dry run: with the namespace come the decisions on its actions
// and the history of its entities. The empty namespace is for publishers of all bundles, because its
// names can hide those of others.
func (s *policyService) mayOwn(ctx context.Context, v snapshot.View, set *engine.Set, name, procedure string, still need) error {
	if name == engine.AdminLocal {
		return nil
	}
	taken := slices.DeleteFunc(slices.Clone(set.Namespaces(name)), func(ns string) bool { return v.Set.OwnerOf(ns) == name })
	if len(taken) == 0 {
		return nil
	}
	r := access.RightsFrom(ctx)
	if slices.Contains(taken, "") && !r.MayAll(still.action, access.Target{}) {
		return &refusedError{procedure: procedure, about: "types and actions without a namespace, which takes a right to all bundles"}
	}
	before, err := s.db.OwnersOf(ctx, taken)
	if err != nil {
		return err
	}
	for _, other := range before {
		t := still.target
		if t.Bundle = other; other != name && !r.May(still.action, t) {
			return &refusedError{procedure: procedure, about: "a namespace that another bundle had before, whose history comes with it"}
		}
	}
	return nil
}

// besides returns the bundles that a bundle is checked with, and what to take over from. admin-local
// is checked with the bundle admin, and no other one is checked with it.
func besides(v snapshot.View, name string) (others []engine.Source, previous *engine.Set, err error) {
	if name == engine.AdminLocal {
		return []engine.Source{access.AdminSource()}, nil, nil
	}
	for _, o := range v.Bundles {
		if o.Name == name || o.Name == engine.AdminLocal {
			continue
		}
		src, err := stored.Source(o)
		if err != nil {
			return nil, nil, err
		}
		others = append(others, src)
	}
	return others, v.Set, nil
}

// check checks a bundle and runs its tests. One bundle to publish and one dry run are checked at a
// time. A check that takes too long is ended, and so is one whose caller has left.
func (s *policyService) check(ctx context.Context, b *bundle.Bundle, others []engine.Source, previous *engine.Set, dryRun bool) (*offline.Report, *engine.Set, error) {
	places := s.places(dryRun)
	if err := takePlace(ctx, places.check, s.times.check, "other bundles are being checked; try again in a moment"); err != nil {
		return nil, nil, err
	}
	defer func() { <-places.check }()
	bounded, cancel := context.WithTimeout(ctx, s.times.check)
	defer cancel()
	report, set, err := offline.CheckUntil(b, others, previous, bounded.Err)
	if err != nil && ctx.Err() == nil {
		err = connect.Errorf(connect.CodeResourceExhausted, "checking the bundle and its tests takes longer than %v; make it smaller, or try again when the server has less to do", s.times.check)
	}
	return report, set, err
}

// mentions warns of entities that the policies name and that are not stored. It replaces the
// warnings of the check, which are about entities.json. About entities of other bundles that the
// caller may not read there is no warning: it would say which of them are stored.
func (s *policyService) mentions(ctx context.Context, v snapshot.View, set *engine.Set, name string, report *offline.Report) error {
	mentions, rights := set.Mentions(name), access.RightsFrom(ctx)
	mentions = slices.DeleteFunc(mentions, func(m engine.Mention) bool {
		of := owner(set, m.UID.Type)
		if of == name || rights.May("GetEntity", access.Target{Bundle: of, EntityType: string(m.UID.Type)}) {
			return false
		}
		unlisted := m.Unlisted()
		report.Findings = slices.DeleteFunc(report.Findings, func(f engine.Finding) bool { return f == unlisted })
		return true
	})
	if len(mentions) > maxMentions {
		mentions = mentions[:maxMentions]
	}
	uids := make([]store.UID, len(mentions))
	for i, m := range mentions {
		uids[i] = stored.UID(m.UID)
	}
	found, err := s.db.StoredAt(ctx, v.Position, uids)
	if err != nil {
		return err
	}
	present := map[store.UID]bool{}
	for _, uid := range found {
		present[uid] = true
	}
	warned := 0
	for i, m := range mentions {
		unlisted := m.Unlisted()
		report.Findings = slices.DeleteFunc(report.Findings, func(f engine.Finding) bool { return f == unlisted })
		if !present[uids[i]] && warned < maxUnstored {
			warned++
			report.Findings = append(report.Findings, m.Missing())
		}
	}
	return nil
}

// checkStored checks that the stored entities of types that changed fit the new schema.
func (s *policyService) checkStored(ctx context.Context, v snapshot.View, set *engine.Set, types []string, readable func(typ string) bool) error {
	if len(types) == 0 {
		return nil
	}
	bad := misfitList{readable: readable}
	err := s.db.EachEntity(ctx, v.Position.Number, types, func(e store.Entity) error {
		bad.check(set, e)
		return nil
	})
	return cmp.Or(err, bad.err())
}

// misfits returns an error if entities do not fit the schema of a set.
func misfits(set *engine.Set, entities []store.Entity, readable func(typ string) bool) error {
	bad := misfitList{readable: readable}
	for _, e := range entities {
		bad.check(set, e)
	}
	return bad.err()
}

// misfitList collects stored entities that do not fit a new schema. It neither names nor counts those
// that the caller may not read.
type misfitList struct {
	readable func(typ string) bool
	count    int
	hidden   bool
	named    []*cedarpostv1.Finding
}

func (m *misfitList) check(set *engine.Set, e store.Entity) {
	if _, err := stored.ReadEntity(set, e); err != nil {
		if !m.readable(e.Type) {
			m.hidden = true
			return
		}
		if m.count++; len(m.named) < maxMisfits {
			m.named = append(m.named, &cedarpostv1.Finding{
				Severity: cedarpostv1.Finding_ERROR, File: set.SchemaFile(cedar.EntityType(e.Type)), Message: err.Error(),
				Hint: "change or delete the entity first",
			})
		}
	}
}

func (m *misfitList) err() error {
	if m.hidden {
		m.named = append(m.named, &cedarpostv1.Finding{
			Severity: cedarpostv1.Finding_ERROR, Message: "there are stored entities that do not fit the schema, and that this caller may not read",
			Hint: "somebody who may read these entities, too, sees them with a dry run",
		})
		return refusal(connect.CodeFailedPrecondition, "stored entities do not fit the new schema", m.named)
	}
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
