package decisionlog

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
	"google.golang.org/protobuf/proto"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/pause"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/store"
)

const (
	signInterval = time.Second
	signLeaves   = 1 << 15 // added to the tree at once
	// refusedRetry is for a log that contradicts what was signed: it stays so until
	// somebody comes. While the database is away, what failed is logged as seldom.
	refusedRetry = 10 * time.Second
)

// Signing says how checkpoints of the log are signed. The zero value signs none.
type Signing struct {
	// KeyFiles hold private keys of the note format; all must have the same name,
	// which is the origin of the log. The first is the one in use, the others sign
	// too while a rotation is under way.
	KeyFiles []string
	// CheckpointFile gets every checkpoint, outside of the database. What stands in it
	// is what the log must never contradict.
	CheckpointFile string
	// Overdue is how long batches may wait for a checkpoint before [Signer.Warning] warns;
	// 0 means a minute.
	Overdue time.Duration
}

// Signer makes the tree and its checkpoints: one of all servers, each second when
// the log has grown. It keeps what it signed in a file outside of the database, and
// signs nothing that contradicts it: a database that was restored to an earlier
// state must not be passed off as the same log.
type Signer struct {
	db       *store.DB
	recorder *Recorder
	log      *slog.Logger
	keys     []auditlog.Key
	Origin   string
	file     string
	refused  atomic.Bool // what the database holds contradicts what was signed

	failures *prometheus.CounterVec // cause
	cause    atomic.Value           // string: why the last attempt to sign failed, or ""
	state    atomic.Pointer[signingState]
	overdue  time.Duration // how long batches may wait for a checkpoint before warning warns

	// base is what the next checkpoint goes on from: signed by this log's key and verified
	// against the stored tree; the zero value if there is none. Only lead uses it.
	base auditlog.Checkpoint
	// epoch is that of the checkpoints that are signed next. Only lead uses it.
	epoch int64

	junk sync.Once // the log line about statements of truncation that do not count
}

// errContradiction is a log that is not what it was when it was signed.
var errContradiction = errors.New("the log contradicts an earlier checkpoint")

// NewSigner makes a signer of the log that a recorder writes. It reads the keys and tries
// the checkpoint file; an error about one of them is a [ConfigError].
func NewSigner(r *Recorder, cfg Signing) (*Signer, error) {
	s, err := loadSigner(r.cfg.DB, r.cfg.Log, r.cfg.Metrics, cfg)
	if err != nil {
		return nil, err
	}
	s.recorder = r
	return s, nil
}

func loadSigner(db *store.DB, log *slog.Logger, metrics prometheus.Registerer, cfg Signing) (*Signer, error) {
	s := &Signer{db: db, log: log, file: cfg.CheckpointFile, overdue: cmp.Or(cfg.Overdue, signingOverdue)}
	s.failures = newSignerMetrics(s, metrics)
	s.state.Store(&signingState{})
	for _, file := range cfg.KeyFiles {
		key, err := auditlog.ReadKey(file)
		if err != nil {
			return nil, &ConfigError{"Signing.KeyFiles", fmt.Errorf("audit key: %w", err)}
		}
		if s.Origin = key.Name(); len(s.keys) > 0 && s.keys[0].Name() != s.Origin {
			return nil, &ConfigError{"Signing.KeyFiles", fmt.Errorf("audit key: %s is named %q and another key %q: the name is that of the log, and must be the same", file, s.Origin, s.keys[0].Name())}
		}
		s.keys = append(s.keys, key)
	}
	if len(s.keys) > 0 && s.file == "" {
		return nil, errors.New("audit key: without a checkpoint file an earlier state of the database could be signed as if nothing had happened")
	}
	if len(s.keys) > 0 {
		if err := auditlog.CheckFile(s.file); err != nil {
			return nil, &ConfigError{"Signing.CheckpointFile", fmt.Errorf("checkpoint file: %w: without it nothing is signed", err)}
		}
	}
	return s, nil
}

// Run leads if nobody else does, until ctx ends.
func (s *Signer) Run(ctx context.Context) {
	if len(s.keys) == 0 {
		s.log.Warn("no audit key: the log is not signed, so nobody can prove that it is whole")
		return
	}
	var said time.Time
	for ctx.Err() == nil {
		_, err := s.db.Lead(ctx, "signer", s.lead)
		if err != nil && ctx.Err() == nil {
			s.failures.WithLabelValues(signFailure(err)).Inc()
			s.cause.Store(signFailure(err))
			s.refused.Store(errors.Is(err, errContradiction))
			if said.IsZero() || time.Since(said) >= refusedRetry {
				said = time.Now()
				s.log.Error("no checkpoint signed", "err", err)
			}
		} else {
			s.cause.Store("")
			said = time.Time{}
		}
		pause.For(ctx, signPause(err))
	}
}

// signPause is how long after an attempt to sign the next one begins. A database that
// was away may be back any time, and then a checkpoint is due.
func signPause(err error) time.Duration {
	if errors.Is(err, errContradiction) {
		return refusedRetry
	}
	return signInterval
}

// lead signs until something fails.
func (s *Signer) lead(ctx context.Context, alive func(context.Context) error) error {
	if err := s.check(ctx); err != nil {
		return err
	}
	s.refused.Store(false)
	if err := s.announce(ctx); err != nil {
		return err
	}
	for ctx.Err() == nil {
		grown, err := s.sign(ctx)
		if err != nil {
			return err
		}
		if grown {
			continue
		}
		pause.For(ctx, signInterval)
		if err := alive(ctx); err != nil {
			return err
		}
	}
	return nil
}

// check finds what to go on from: the newest checkpoint in the database that this log's
// keys signed. It must be true of the stored tree, and must not contradict the file: the
// newest checkpoint there of the last epoch, or the one that the last statement of
// truncation goes back to. What was signed in earlier epochs may be lost: a checkpoint of
// this log's key that has a later epoch, or a statement, says so.
func (s *Signer) check(ctx context.Context) (err error) {
	read := s.db.Tiles(ctx)
	if s.base, err = s.newestStored(ctx, read); err != nil {
		return err
	}
	statements, err := s.statements(ctx, s.base)
	if err != nil {
		return err
	}
	s.epoch = statements.Epoch
	signed, err := auditlog.LastCheckpoint(s.file, s.Origin, func(c auditlog.Checkpoint) bool { return c.Epoch >= s.epoch })
	if err != nil {
		return &checkpointFileError{err}
	}
	for _, c := range statements.Live() {
		if c.Epoch == s.epoch && c.Size > signed.Size {
			signed = c
		}
	}
	if signed.Size > s.base.Size {
		return s.holdsAhead(ctx, signed, read)
	}
	return holds(signed, s.base.Size, read)
}

// statements reads which truncations the file and the log know. stored is the newest
// checkpoint in the database that this log's keys signed. A statement that these keys did
// not sign is an error, unless they signed something of its epoch since.
func (s *Signer) statements(ctx context.Context, stored auditlog.Checkpoint) (auditlog.Statements, error) {
	keys := s.verifiers()
	all, err := auditlog.ReadStatements(s.file, s.Origin, keys...)
	if err != nil {
		return all, &checkpointFileError{err}
	}
	recorded, err := s.Recorded(ctx)
	if err != nil {
		return all, err
	}
	for _, t := range recorded {
		if err := all.Add(t.Note, keys...); err != nil {
			return all, fmt.Errorf("%w: %w", errContradiction, err)
		}
	}
	all.Epoch = max(all.Epoch, stored.Epoch)
	for _, t := range all.Others {
		if t.Number > all.Epoch {
			return all, &checkpointFileError{fmt.Errorf("%s: statement of truncation %d is signed with %s, and not with a key of this server: give that key too",
				s.file, t.Number, strings.Join(auditlog.Signers(t.Note), " and "))}
		}
	}
	return all, nil
}

const (
	// maxRecorded bounds how many events are looked at to find statements of truncation,
	// and maxRecord their size: whoever may write to the log may write any number of them.
	maxRecorded = 1000
	maxRecord   = 2 * auditlog.MaxStatement
)

// Recorded reads the statements of truncation among the newest events about them: those
// that this server's keys signed; on a server without keys, all that are well-formed. Each
// is there once. The others are passed over, and reported once.
func (s *Signer) Recorded(ctx context.Context) (list []auditlog.Statement, err error) {
	keys := s.verifiers()
	seen, junk, events := map[auditlog.Truncation]bool{}, 0, 0
	err = s.db.EachTruncation(ctx, maxRecord, maxRecorded, func(record []byte) {
		events++
		var rec cedarpostv1.EventRecord
		t, err := auditlog.Truncation{}, proto.Unmarshal(record, &rec)
		note := []byte(rec.GetLogTruncated().GetStatement())
		switch {
		case err != nil:
		case len(keys) == 0:
			t, err = auditlog.PeekTruncation(note)
		default:
			t, err = auditlog.OpenTruncation(note, keys...)
		}
		switch {
		case err != nil:
			junk++
		case !seen[t]:
			seen[t] = true
			list = append(list, auditlog.Statement{Truncation: t, Note: note})
		}
	})
	if junk > 0 {
		s.junk.Do(func() {
			s.log.Warn("the log has statements of truncation that this server's keys did not sign: they are passed over, and audit verify shows them",
				"count", junk, "of", events, "looked_at_most", maxRecorded)
		})
	}
	return list, err
}

// signCandidates is how many checkpoints are read at once to find one to go on from.
const signCandidates = 100

// newestStored is the newest checkpoint in the database that is signed with this log's
// keys. Others under its name prove nothing: they are passed over, and reported. Without
// any the tree is made again from its first batch.
func (s *Signer) newestStored(ctx context.Context, read auditlog.Tiles) (none auditlog.Checkpoint, err error) {
	_, c, strange, err := s.newestSigned(ctx)
	if strange > 0 {
		s.failures.WithLabelValues(failedForeign).Inc()
		s.log.Error("the database has checkpoints under this log's name that its keys did not sign: audit verify lists them", "count", strange)
	}
	if err == nil {
		end, err := s.db.NextLeaf(ctx) // the log only grows: its size is read last
		if err == nil && c.Size > end {
			err = fmt.Errorf("%w: %d batches were signed, the database has %d", errContradiction, c.Size, end)
		}
		if err != nil {
			return none, err
		}
		return c, holds(c, c.Size, read)
	}
	if !errors.Is(err, store.ErrNotFound) {
		return none, err
	}
	// Where the oldest batches were removed, their part of the tree is all that is left.
	first, err := s.db.FirstLeaf(ctx)
	if err != nil || first == 0 {
		return none, err
	}
	root, err := tlog.TreeHash(first, read)
	return auditlog.Checkpoint{Origin: s.Origin, Size: first, Root: root}, err
}

// Newest reads the newest checkpoint to give out: one that this server's keys signed; on
// a server without keys, the newest of all. The error is [store.ErrNotFound] if there is
// none.
func (s *Signer) Newest(ctx context.Context) (store.Checkpoint, error) {
	if len(s.keys) == 0 {
		return s.db.LatestCheckpoint(ctx, "")
	}
	row, _, _, err := s.newestSigned(ctx)
	return row, err
}

// newestSigned finds the newest checkpoint that this server's keys signed, as it is
// stored and as it reads, and says how many it passed over that they did not. The error
// is [store.ErrNotFound] if there is none.
func (s *Signer) newestSigned(ctx context.Context) (row store.Checkpoint, c auditlog.Checkpoint, others int, err error) {
	keys := s.verifiers()
	for below := int64(math.MaxInt64); ; {
		page, err := s.db.NewestCheckpoints(ctx, s.Origin, below, signCandidates)
		if err != nil {
			return row, c, others, err
		}
		for _, row := range page {
			if c, err := auditlog.OpenCheckpoint(row.Note, keys...); err == nil && c.Origin == row.Origin && c.Size == row.Size {
				return row, c, others, nil
			}
			others++
		}
		if len(page) < signCandidates {
			return row, c, others, store.ErrNotFound
		}
		below = page[len(page)-1].Size
	}
}

func (s *Signer) verifiers() (keys []note.Verifier) {
	for _, key := range s.VerifierKeys() {
		if v, err := note.NewVerifier(key); err == nil { // it is made by ReadKey
			keys = append(keys, v)
		}
	}
	return keys
}

// holdsAhead makes sure that the log goes on from base to a checkpoint in the file: after
// a crash its tree may not be in the database, but its batches are.
func (s *Signer) holdsAhead(ctx context.Context, c auditlog.Checkpoint, read auditlog.Tiles) error {
	grown := map[auditlog.TileID][]byte{}
	overlay := func(ids []auditlog.TileID) (data [][]byte, err error) {
		for _, id := range ids {
			tile := grown[id]
			if tile == nil {
				stored, err := read([]auditlog.TileID{id})
				if err != nil {
					return nil, err
				}
				tile = stored[0]
			}
			data = append(data, tile)
		}
		return data, nil
	}
	root := s.base.Root
	for size := s.base.Size; size < c.Size; {
		batches, err := s.db.Batches(ctx, size, int(min(c.Size-size, signLeaves)))
		if err != nil {
			return err
		}
		if len(batches) == 0 {
			return fmt.Errorf("%w: %d batches were signed, the database has %d", errContradiction, c.Size, size)
		}
		var tiles []auditlog.TileData
		if root, tiles, err = grow(size, batches, overlay); err != nil {
			return err
		}
		for _, t := range tiles {
			grown[t.TileID] = t.Hashes
		}
		size += int64(len(batches))
		maps.DeleteFunc(grown, func(id auditlog.TileID, _ []byte) bool { // full, and their roots are above
			return id.Level == 0 && (id.Tile+1)<<auditlog.TileHeight <= size
		})
	}
	if root != c.Root {
		return fmt.Errorf("%w: at %d batches the tree has another root", errContradiction, c.Size)
	}
	return nil
}

// grow adds batches to a tree.
func grow(size int64, batches []store.Batch, read auditlog.Tiles) (root tlog.Hash, tiles []auditlog.TileData, err error) {
	leaves := make([]tlog.Hash, len(batches))
	for i, b := range batches {
		if b.Leaf != size+int64(i) {
			return root, nil, fmt.Errorf("%w: batch %d is missing", errContradiction, size+int64(i))
		}
		leaves[i] = auditlog.Hash(b.Header)
	}
	return auditlog.Grow(size, leaves, read)
}

// holds makes sure that a tree has the root of a checkpoint.
func holds(c auditlog.Checkpoint, size int64, read auditlog.Tiles) error {
	if c.Size == 0 {
		return nil
	}
	root, err := tlog.TreeHash(c.Size, read)
	if err != nil {
		return err
	}
	if root != c.Root || c.Size > size {
		return fmt.Errorf("%w: at %d batches the tree has another root", errContradiction, c.Size)
	}
	return nil
}

// announce puts the keys that sign from now on into the log.
func (s *Signer) announce(ctx context.Context) error {
	for _, key := range s.VerifierKeys() {
		known, err := s.db.KnowsCheckpointKey(ctx, key)
		if err != nil {
			return err
		}
		if known {
			continue
		}
		err = s.recorder.AddEvent(ctx, &cedarpostv1.EventRecord{
			Kind: cedarpostv1.EventRecord_CHECKPOINT_KEY, Subject: key,
			Detail: &cedarpostv1.EventRecord_CheckpointKey{CheckpointKey: &cedarpostv1.CheckpointKey{VerifierKey: key}},
		})
		if err != nil {
			return err
		}
	}
	// A statement of truncation is in the file first. Whether the log has it goes by what it
	// says: anybody who writes to the log can choose the subject of an event.
	kept, err := auditlog.ReadStatements(s.file, s.Origin, s.verifiers()...)
	if err != nil || len(kept.Signed) == 0 {
		return err
	}
	recorded, err := s.Recorded(ctx)
	if err != nil {
		return err
	}
	for _, t := range kept.Signed {
		if slices.ContainsFunc(recorded, func(r auditlog.Statement) bool { return r.Truncation == t.Truncation }) {
			continue
		}
		if err := s.recorder.AddEvent(ctx, truncationEvent(t.Truncation, t.Note)); err != nil {
			return err
		}
	}
	return nil
}

func (s *Signer) VerifierKeys() []string {
	keys := make([]string, len(s.keys))
	for i, k := range s.keys {
		keys[i] = k.Verifier
	}
	return keys
}

// sign adds what was committed to the tree and signs the root of it.
func (s *Signer) sign(ctx context.Context) (grown bool, err error) {
	batches, err := s.db.Batches(ctx, s.base.Size, signLeaves)
	if err != nil || len(batches) == 0 {
		return false, err
	}
	// The new root is made from the batches and from hashes of the stored tree. These
	// hashes give the root of base, so they are right if they still do.
	read := s.db.Tiles(ctx)
	if err := holds(s.base, s.base.Size, read); err != nil {
		return false, err
	}
	root, tiles, err := grow(s.base.Size, batches, read)
	if err != nil {
		return false, err
	}
	c := auditlog.Checkpoint{Origin: s.Origin, Size: s.base.Size + int64(len(batches)), Root: root, Epoch: s.epoch}
	signed, err := c.Sign(s.keys...)
	if err != nil {
		return false, err
	}
	// First the file: were it second, a crash in between would leave a checkpoint that
	// an earlier backup could contradict unnoticed.
	if err := auditlog.AppendCheckpoint(s.file, signed); err != nil {
		return false, &checkpointFileError{err}
	}
	if err := s.db.SaveTree(ctx, tiles, store.Checkpoint{Origin: c.Origin, Size: c.Size, Note: signed}); err != nil {
		return false, err
	}
	s.base = c
	s.cause.Store("")
	s.log.Info("checkpoint", "origin", c.Origin, "size", c.Size, "root", c.Root.String())
	return true, nil
}
