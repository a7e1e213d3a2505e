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
	signInterval = time.Second // between two looks for new batches
	signLeaves   = 1 << 15     // added to the tree at once
	// saveTimeout is for a checkpoint that is in the file when the server stops.
	saveTimeout = 10 * time.Second
	// refusedRetry is the pause after the log contradicted a checkpoint: only an operator can
	// mend that. It is also the least time between two log lines about attempts that failed.
	refusedRetry = 10 * time.Second
)

// Signing says how checkpoints of the log are signed. The zero value signs none.
type Signing struct {
	// KeyFiles are the names of files with private keys of the note format. All keys must have
	// the same name, which is the origin of the log. All of them sign each checkpoint: there
	// is more than one only during a rotation. [Signer.RereadKeys] reads them again.
	KeyFiles []string
	// Agent is the name of the socket of an ssh-agent, and AgentKeys are verifier keys of the note
	// format whose private keys the agent has. They sign as the keys of KeyFiles do. An agent
	// that is away is an error of signing, and not of the start.
	Agent     string
	AgentKeys []string
	// CheckpointFile is the name of a file outside of the database that gets every
	// checkpoint. The signer signs nothing that contradicts a checkpoint in it.
	CheckpointFile string
	// Overdue is how long batches may wait for a checkpoint before [Signer.Warning] warns;
	// 0 means a minute.
	Overdue time.Duration

	// interval and retry replace signInterval and refusedRetry in tests; 0 means these.
	interval, retry time.Duration
}

// Signer makes the tree of the log and its checkpoints. Of all servers with keys, one signs:
// once per second, if the log has grown. It writes each checkpoint to a file outside of the
// database first, and signs nothing that contradicts the file. So a database that was
// restored to an earlier state cannot be signed as the same log.
type Signer struct {
	db       *store.DB
	recorder *Recorder
	log      *slog.Logger
	cfg      Signing
	current  atomic.Pointer[[]auditlog.Key]
	// Origin is the name of the log in its checkpoints: that of the keys, or "" without keys.
	Origin  string
	file    string      // of checkpoints
	refused atomic.Bool // the log contradicts a checkpoint

	failures *prometheus.CounterVec // cause
	cause    atomic.Value           // string: why the last attempt to sign failed, or ""
	state    atomic.Pointer[signingState]

	overdue, interval, retry time.Duration // as in Signing, with the defaults

	// base is the checkpoint that the next one continues: signed with a key of this log and
	// verified against the stored tree; the zero value if there is none. Only lead uses it.
	base auditlog.Checkpoint
	// epoch is the epoch of the next checkpoint. Only lead uses it.
	epoch int64

	junk sync.Once // for the log line about statements of truncation that are ignored
}

// errContradiction means that the log has changed since it was signed.
var errContradiction = errors.New("the log contradicts an earlier checkpoint")

// NewSigner makes a signer of the log that a recorder writes. It reads the keys and checks
// that the checkpoint file can be written. For a file, the error is a [ConfigError]. It
// signs nothing until [Signer.Run] runs.
func NewSigner(r *Recorder, cfg Signing) (*Signer, error) {
	s, err := readSigner(r.cfg.DB, r.cfg.Log, cfg)
	if err != nil {
		return nil, err
	}
	s.recorder = r
	s.failures = newSignerMetrics(s, r.cfg.Metrics)
	return s, nil
}

// readSigner makes a signer without a recorder. Its metrics are not registered.
func readSigner(db *store.DB, log *slog.Logger, cfg Signing) (*Signer, error) {
	s := &Signer{
		db: db, log: log, cfg: cfg, file: cfg.CheckpointFile, overdue: cmp.Or(cfg.Overdue, signingOverdue),
		interval: cmp.Or(cfg.interval, signInterval), retry: cmp.Or(cfg.retry, refusedRetry),
	}
	s.state.Store(&signingState{})
	s.failures = newSignerMetrics(s, nil)
	keys, origin, err := readKeys(cfg)
	if err != nil {
		return nil, err
	}
	s.Origin = origin
	s.current.Store(&keys)
	if len(keys) > 0 && s.file == "" {
		return nil, errors.New("audit key: without a checkpoint file an earlier state of the database could be signed as if nothing had happened")
	}
	if len(keys) > 0 {
		if err := auditlog.CheckFile(s.file); err != nil {
			return nil, &ConfigError{"Signing.CheckpointFile", fmt.Errorf("checkpoint file: %w: without it nothing is signed", err)}
		}
	}
	return s, nil
}

// readKeys reads the keys of the log, those of files first, and returns their name.
func readKeys(cfg Signing) (keys []auditlog.Key, origin string, err error) {
	add := func(field, from string, key auditlog.Key, err error) error {
		if err == nil && len(keys) > 0 && origin != key.Name() {
			err = fmt.Errorf("%s is named %q and another key %q: the name is that of the log, and must be the same", from, key.Name(), origin)
		}
		if err != nil {
			return &ConfigError{field, fmt.Errorf("audit key: %w", err)}
		}
		keys, origin = append(keys, key), key.Name()
		return nil
	}
	for _, file := range cfg.KeyFiles {
		key, err := auditlog.ReadKey(file)
		if err := add("Signing.KeyFiles", file, key, err); err != nil {
			return nil, "", err
		}
	}
	if (cfg.Agent == "") != (len(cfg.AgentKeys) == 0) {
		return nil, "", &ConfigError{"Signing.Agent", errors.New("audit key: an ssh-agent needs the verifier keys of its keys, and they need an ssh-agent")}
	}
	for _, verifier := range cfg.AgentKeys {
		key, err := newAgentKey(cfg.Agent, verifier)
		if err := add("Signing.AgentKeys", verifier, key, err); err != nil {
			return nil, "", err
		}
	}
	return keys, origin, nil
}

// keys returns the keys that sign now.
func (s *Signer) keys() []auditlog.Key { return *s.current.Load() }

// RereadKeys reads the files of the keys again. If their keys changed, the new ones sign from the next
// checkpoint on. If a file cannot be used, or its key has another name, the keys from before stay.
func (s *Signer) RereadKeys() error {
	keys, origin, err := readKeys(s.cfg)
	if err != nil {
		return err
	}
	if slices.EqualFunc(keys, s.keys(), func(a, b auditlog.Key) bool { return a.Verifier == b.Verifier }) {
		return nil
	}
	if origin != s.Origin {
		return &ConfigError{"Signing.KeyFiles", fmt.Errorf("audit key: the new key is named %q, and the log %q", origin, s.Origin)}
	}
	s.current.Store(&keys)
	s.log.Info("new audit keys taken up", "keys", s.VerifierKeys())
	return nil
}

// Run signs until ctx ends, whenever no other server does. Without keys it logs a warning and
// returns.
func (s *Signer) Run(ctx context.Context) {
	if len(s.keys()) == 0 {
		s.log.Warn("no audit key: the log is not signed, so nobody can prove that it is whole")
		return
	}
	var logged time.Time
	for ctx.Err() == nil {
		_, err := s.db.Lead(ctx, store.SignerLock, s.lead)
		if err != nil && ctx.Err() == nil {
			s.failures.WithLabelValues(signFailure(err)).Inc()
			s.cause.Store(signFailure(err))
			s.refused.Store(errors.Is(err, errContradiction))
			if logged.IsZero() || time.Since(logged) >= refusedRetry {
				logged = time.Now()
				s.log.Error("no checkpoint signed", "err", err)
			}
		} else {
			s.cause.Store("")
			logged = time.Time{}
		}
		pause.For(ctx, s.pauseAfter(err))
	}
}

// pauseAfter returns the time between an attempt to sign and the next one. It is short after
// all errors but a contradiction: a database may be available again at any time.
func (s *Signer) pauseAfter(err error) time.Duration {
	if errors.Is(err, errContradiction) {
		return s.retry
	}
	return s.interval
}

// lead signs until something fails. Its caller makes sure that no other server signs.
func (s *Signer) lead(ctx context.Context, alive func(context.Context) error) error {
	keys := s.current.Load()
	if err := s.check(ctx); err != nil {
		return err
	}
	s.refused.Store(false)
	if err := s.announce(ctx); err != nil {
		return err
	}
	for ctx.Err() == nil {
		if s.current.Load() != keys {
			return nil // Run begins anew, and announces the new keys
		}
		grown, err := s.sign(ctx, *keys)
		if err != nil {
			return err
		}
		if grown {
			continue
		}
		pause.For(ctx, s.interval)
		if err := alive(ctx); err != nil {
			return err
		}
	}
	return nil
}

// check sets the base of the next checkpoint: the newest checkpoint in the database that
// is signed with a key of this log. The stored tree must match it. It must also agree with
// the newest checkpoint of the current epoch in the file, or with the one that the last
// statement of truncation goes back to. Checkpoints of earlier epochs may be lost: a signed
// statement of truncation began the current epoch.
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

// statements reads the statements of truncation in the file and in the log. stored is the
// newest checkpoint in the database that is signed with a key of this log. A statement in the
// file without such a signature is an error, unless these keys signed a checkpoint or a
// statement of its epoch or a later one.
func (s *Signer) statements(ctx context.Context, stored auditlog.Checkpoint) (auditlog.Statements, error) {
	keys := s.verifiers()
	all, err := auditlog.ReadStatements(s.file, s.Origin, keys...)
	if err != nil {
		return all, &checkpointFileError{err}
	}
	recorded, err := s.RecordedTruncations(ctx)
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
	// maxRecorded bounds the events that are read to find statements of truncation, and
	// maxRecord their size in bytes: a login that may append to the log may append any number
	// of them.
	maxRecorded = 1000
	maxRecord   = 2 * auditlog.MaxStatement
)

// RecordedTruncations reads the statements of truncation from the newest events about them.
// It returns those that are signed with a key of this server or, on a server without keys,
// all that are well-formed, each once. It ignores all others, and logs that once.
func (s *Signer) RecordedTruncations(ctx context.Context) (list []auditlog.Statement, err error) {
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

// signCandidates is how many checkpoints are read at once to find the newest signed one.
const signCandidates = 100

// newestStored returns the newest checkpoint in the database that is signed with a key of
// this log, if the stored tree matches it. It ignores other checkpoints under the name of the
// log, and reports them. Without a signed one, it returns the zero value, so that the tree is
// made again from its first batch.
func (s *Signer) newestStored(ctx context.Context, read auditlog.Tiles) (none auditlog.Checkpoint, err error) {
	_, c, strange, err := s.newestSigned(ctx)
	if strange > 0 {
		s.failures.WithLabelValues(failedForeign).Inc()
		s.log.Error("the database has checkpoints under this log's name that its keys did not sign: audit verify lists them", "count", strange)
	}
	if err == nil {
		end, err := s.db.NextLeaf(ctx) // after the checkpoint was read, because the log grows
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
	// If the oldest batches were removed, only their part of the tree is left.
	first, err := s.db.FirstLeaf(ctx)
	if err != nil || first == 0 {
		return none, err
	}
	root, err := tlog.TreeHash(first, read)
	return auditlog.Checkpoint{Origin: s.Origin, Size: first, Root: root}, err
}

// NewestCheckpoint reads the newest checkpoint that is signed with a key of this server or, on
// a server without keys, the newest of all. The error is [store.ErrNotFound] if there is none.
func (s *Signer) NewestCheckpoint(ctx context.Context) (store.Checkpoint, error) {
	if len(s.keys()) == 0 {
		return s.db.LatestCheckpoint(ctx, "")
	}
	row, _, _, err := s.newestSigned(ctx)
	return row, err
}

// newestSigned finds the newest checkpoint that is signed with a key of this server, and
// returns its row and its content. others is how many newer checkpoints are not. The error is
// [store.ErrNotFound] if there is none.
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
		if v, err := note.NewVerifier(key); err == nil { // ReadKey made the key, so it is valid
			keys = append(keys, v)
		}
	}
	return keys
}

// holdsAhead checks that the batches after base lead to a checkpoint of the file that is
// newer than base. After a crash, the tree of such a checkpoint may not be in the database,
// but its batches must be.
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
		maps.DeleteFunc(grown, func(id auditlog.TileID, _ []byte) bool { // full tiles: the level above has their roots
			return id.Level == 0 && (id.Tile+1)<<auditlog.TileHeight <= size
		})
	}
	if root != c.Root {
		return fmt.Errorf("%w: at %d batches the tree has another root", errContradiction, c.Size)
	}
	return nil
}

// grow adds batches to a tree of size leaves. It returns the new root, and the tiles that
// changed.
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

// holds checks that a tree of size leaves has the root of a checkpoint.
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

// announce records the verifier keys of this server, and the statements of truncation in the
// file, if the log does not have them yet.
func (s *Signer) announce(ctx context.Context) error {
	for _, key := range s.VerifierKeys() {
		known, err := s.db.KnowsCheckpointKey(ctx, key)
		if err != nil {
			return err
		}
		if known {
			continue
		}
		err = s.recorder.RecordEvent(ctx, &cedarpostv1.EventRecord{
			Kind: cedarpostv1.EventRecord_CHECKPOINT_KEY, Subject: key,
			Detail: &cedarpostv1.EventRecord_CheckpointKey{CheckpointKey: &cedarpostv1.CheckpointKey{VerifierKey: key}},
		})
		if err != nil {
			return err
		}
	}
	// TruncateLog writes a statement to the file first, so the log may lack it. The statements
	// themselves are compared, and not the subjects of events: a login that may append to the
	// log can choose any subject.
	kept, err := auditlog.ReadStatements(s.file, s.Origin, s.verifiers()...)
	if err != nil || len(kept.Signed) == 0 {
		return err
	}
	recorded, err := s.RecordedTruncations(ctx)
	if err != nil {
		return err
	}
	for _, t := range kept.Signed {
		if slices.ContainsFunc(recorded, func(r auditlog.Statement) bool { return r.Truncation == t.Truncation }) {
			continue
		}
		if err := s.recorder.RecordEvent(ctx, truncationEvent(t.Truncation, t.Note)); err != nil {
			return err
		}
	}
	return nil
}

// VerifierKeys returns the public keys that belong to the keys of this server, in the note
// format.
func (s *Signer) VerifierKeys() []string {
	var keys []string
	for _, k := range s.keys() {
		keys = append(keys, k.Verifier)
	}
	return keys
}

// sign adds new batches to the tree, signs its root, and stores both. grown is false if there
// are no new batches.
func (s *Signer) sign(ctx context.Context, keys []auditlog.Key) (grown bool, err error) {
	batches, err := s.db.Batches(ctx, s.base.Size, signLeaves)
	if err != nil || len(batches) == 0 {
		return false, err
	}
	// The new root depends on hashes of the stored tree. They are right if they still give the
	// root of base.
	read := s.db.Tiles(ctx)
	if err := holds(s.base, s.base.Size, read); err != nil {
		return false, err
	}
	root, tiles, err := grow(s.base.Size, batches, read)
	if err != nil {
		return false, err
	}
	c := auditlog.Checkpoint{Origin: s.Origin, Size: s.base.Size + int64(len(batches)), Root: root, Epoch: s.epoch}
	signed, err := c.Sign(keys...)
	if err != nil {
		return false, err
	}
	// The file gets the checkpoint before the database. In the other order, a crash in between
	// would leave a checkpoint that is not in the file, and a restored backup that contradicts it
	// would be signed.
	if err := auditlog.AppendCheckpoint(s.file, signed); err != nil {
		return false, &checkpointFileError{err}
	}
	// A server that stops now still saves it: otherwise the log would be behind the file until the
	// next start, and a verification in between would fail.
	saving, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(saveTimeout, cancel) })()
	if err := s.db.SaveTree(saving, tiles, store.Checkpoint{Origin: c.Origin, Size: c.Size, Note: signed}); err != nil {
		return false, err
	}
	s.base = c
	s.cause.Store("")
	s.log.Info("checkpoint", "origin", c.Origin, "size", c.Size, "root", c.Root.String())
	return true, nil
}
