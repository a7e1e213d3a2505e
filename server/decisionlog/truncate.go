package decisionlog

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/pause"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/store"
)

// Truncation is a request for a signed statement that the newest batches of the log are
// lost.
type Truncation struct {
	// Signing has the keys of the log, and the checkpoint file of the server that refuses to
	// sign.
	Signing
	// Operator is who asks for the statement, and Reason why. Both are part of it.
	Operator, Reason string
	// Server is the name of the server in the event that records the statement.
	Server string
	// Confirm makes TruncateLog sign and record the statement. Without it, TruncateLog only
	// returns what it would state.
	Confirm bool
}

// Truncated is the result of [TruncateLog].
type Truncated struct {
	// Truncation is the statement.
	auditlog.Truncation
	// Batches is how many batches the database has. No signature covers those after To.
	Batches int64
}

// The reasons to refuse a truncation.
var (
	errNothingLost = errors.New("nothing is lost: the database has all that was signed")
	errOtherLog    = errors.New("none of the signed checkpoints matches the database: it has another log, which needs a key of another name")
	errFileTooNew  = errors.New("the file has no checkpoint as old as the database: give an older copy of it, which begins earlier")
)

// TruncateLog states that signed batches are lost, for example after a failover or a recovery
// to a point in time. It signs the statement with the keys of the log, adds it to the
// checkpoint file, and records it in the log. After that, servers sign with the same keys
// again. It removes nothing, and returns an error if no signed batch is lost.
//
// The log continues from the last checkpoint that matches the database: the batches up to
// there are the signed ones. No signature covers the batches after it, so nothing proves
// whether they existed before the loss.
//
// While a server signs the log, TruncateLog waits for it, for half a minute at most.
func TruncateLog(ctx context.Context, db *store.DB, t Truncation) (done Truncated, err error) {
	if len(t.KeyFiles) == 0 && len(t.AgentKeys) == 0 {
		return done, errors.New("a statement of truncation has to be signed: no audit key")
	}
	// A server makes the file if it is missing. A new file would not show what is lost.
	if _, err := os.Stat(t.CheckpointFile); err != nil {
		return done, &ConfigError{"Signing.CheckpointFile", fmt.Errorf("checkpoint file: %w: give the file of the server that refuses to sign", err)}
	}
	s, err := readSigner(db, slog.New(slog.DiscardHandler), t.Signing)
	if err != nil {
		return done, err
	}
	led := false
	var failed error // of truncate; Lead would add its own name to the error
	for deadline := time.Now().Add(3 * s.retry); !led; pause.For(ctx, 100*time.Millisecond) {
		led, err = db.Lead(ctx, store.SignerLock, func(ctx context.Context, _ func(context.Context) error) error {
			done, failed = s.truncate(ctx, t)
			return nil
		})
		if err == nil {
			err = failed
		}
		if err == nil && !led && time.Now().After(deadline) {
			err = errors.New("another server signs the log now, so the database has what that server signed. Give the checkpoint file of the server that refuses to sign, and stop the servers that sign")
		}
		if err != nil {
			return done, err
		}
	}
	return done, nil
}

// truncate does the work of TruncateLog. Its caller makes sure that no server signs meanwhile.
func (s *Signer) truncate(ctx context.Context, t Truncation) (done Truncated, err error) {
	_, stored, _, err := s.newestSigned(ctx)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		return done, err
	}
	statements, err := s.statements(ctx, stored)
	if err != nil {
		return done, err
	}
	from, live, err := s.signedBefore(&statements)
	if err != nil {
		return done, err
	}
	if stored.Size > 0 {
		live = append(live, stored)
		if from.Size == 0 { // another server signed in this epoch, so the file has nothing of it
			from = stored
		}
	}
	to, err := s.lastThatHolds(ctx, live)
	if err != nil {
		return done, err
	}
	if done.Batches, err = s.db.NextLeaf(ctx); err != nil {
		return done, err
	}
	if to.Size >= from.Size {
		return done, errNothingLost
	}
	if to.Size == 0 {
		if live[0].Size > done.Batches {
			return done, fmt.Errorf("%s: %w. Its first checkpoint covers %d batches, and the database has %d", s.file, errFileTooNew, live[0].Size, done.Batches)
		}
		return done, errOtherLog
	}
	// A database that lost batches has lost their checkpoints, too. If it contradicts a
	// checkpoint that it has, the log was altered.
	if stored.Size > to.Size {
		if held, err := s.lastThatHolds(ctx, []auditlog.Checkpoint{stored}); err != nil || held != stored {
			return done, errors.Join(err, fmt.Errorf("the log was altered, not truncated: the database itself has the checkpoint of %d batches and does not match it; the last checkpoint in the file that it matches is of %d batches (audit verify says more)", stored.Size, to.Size))
		}
	}
	number := statements.Epoch + 1
	from.Epoch, to.Epoch = number-1, number
	done.Truncation = auditlog.Truncation{
		Origin: s.Origin, Number: number, From: from, To: to, Time: time.Now().UTC().Truncate(time.Second), Operator: t.Operator, Reason: t.Reason,
	}
	signed, err := done.Sign(s.keys()...)
	if err != nil || !t.Confirm {
		return done, err
	}
	// The file is first, as with a checkpoint. If the event is not committed, the next server
	// that signs records the statement.
	if err := auditlog.AppendCheckpoint(s.file, signed); err != nil {
		return done, fmt.Errorf("checkpoint file: %w", err)
	}
	event, err := newEvent(ctx, newIDs(nil, nil), t.Server, truncationEvent(done.Truncation, signed))
	if err != nil {
		return done, err
	}
	w := s.db.NewLogWriter(t.Server, auditlog.Strict, 0)
	defer w.Close()
	_, err = w.Append(ctx, nil, []store.Event{event})
	return done, err
}

// signedBefore reads the checkpoints in the file that are signed with a key of this log. from
// is the newest one of the current epoch. live are all that no statement excuses: the log
// matches them, or they are lost now.
func (s *Signer) signedBefore(statements *auditlog.Statements) (from auditlog.Checkpoint, live []auditlog.Checkpoint, err error) {
	keys := s.verifiers()
	ids := map[string]bool{}
	for _, key := range keys {
		ids[auditlog.KeyID(key)] = true
	}
	found := false
	var unsigned auditlog.Checkpoint // the largest one without a signature of a given key
	var signers []string
	err = auditlog.EachKept(s.file, s.Origin, func(c auditlog.Checkpoint, signed []byte) error {
		found = true
		opened, err := auditlog.OpenCheckpoint(signed, keys...)
		switch by := auditlog.Signers(signed); {
		case err == nil && opened.Epoch == statements.Epoch && opened.Size > from.Size:
			from = opened
			fallthrough
		case err == nil:
			if !statements.Excuses(opened) {
				live = append(live, opened)
			}
		case slices.ContainsFunc(by, func(id string) bool { return ids[id] }):
			return fmt.Errorf("%s: the checkpoint of %d batches names a key of this log, and the signature is not of that key: remove it from the file if you know why it is there", s.file, c.Size)
		case c.Epoch >= statements.Epoch && c.Size > unsigned.Size:
			unsigned, signers = c, by
		}
		return nil
	})
	if err != nil {
		return from, nil, err
	}
	for _, c := range statements.Live() {
		live = append(live, c)
		if c.Epoch == statements.Epoch && c.Size > from.Size {
			from = c
		}
	}
	switch {
	case !found && from.Size == 0:
		err = fmt.Errorf("%s has no checkpoint of %s", s.file, s.Origin)
	case unsigned.Size > from.Size:
		err = fmt.Errorf("%s: the checkpoint of %d batches is not signed with a given key, but with %s: give that key too if it is one of this log; otherwise remove the checkpoint from the file",
			s.file, unsigned.Size, cmp.Or(strings.Join(signers, " and "), "none"))
	}
	return from, live, err
}

// lastThatHolds goes through checkpoints in order of size and compares them with the batches
// in the database. It returns the last one before the first that does not match; the zero
// value if the first one does not.
func (s *Signer) lastThatHolds(ctx context.Context, live []auditlog.Checkpoint) (last auditlog.Checkpoint, err error) {
	slices.SortFunc(live, func(a, b auditlog.Checkpoint) int { return cmp.Compare(a.Size, b.Size) })
	var before auditlog.Checkpoint // the last one that is smaller than last
	first, err := s.db.FirstLeaf(ctx)
	if err != nil {
		return last, err
	}
	read := s.db.Tiles(ctx)
	tree, err := auditlog.NewRootBuilder(first, read)
	if err != nil {
		return last, err
	}
	size := first
	for _, c := range live {
		var root tlog.Hash
		if c.Size < first { // its batches were removed, but the stored tree has their hashes
			if root, err = tlog.TreeHash(c.Size, read); err != nil {
				return last, err
			}
		} else {
			for size < c.Size {
				batches, err := s.db.Batches(ctx, size, int(min(c.Size-size, signLeaves)))
				if err != nil {
					return last, err
				}
				for i, b := range batches {
					if b.Leaf != size+int64(i) {
						return last, nil // one is missing
					}
					tree.Add(auditlog.Hash(b.Header))
				}
				size += int64(len(batches))
				if len(batches) == 0 {
					return last, nil
				}
			}
			root = tree.Root()
		}
		if root != c.Root {
			if c.Size == last.Size {
				last = before // two roots were signed at this size, and one is lost: go back before both
			}
			return last, nil
		}
		if c.Size > last.Size {
			before = last
		}
		last = c
	}
	return last, nil
}

// truncationEvent returns the record of a statement.
func truncationEvent(t auditlog.Truncation, signed []byte) *cedarpostv1.EventRecord {
	return &cedarpostv1.EventRecord{
		Kind: cedarpostv1.EventRecord_LOG_TRUNCATED, Subject: truncationSubject(t),
		Detail: &cedarpostv1.EventRecord_LogTruncated{LogTruncated: &cedarpostv1.LogTruncated{Statement: string(signed)}},
	}
}

// truncationSubject returns a short text for people about a statement. It proves nothing.
func truncationSubject(t auditlog.Truncation) string {
	return fmt.Sprintf("%s %d: %d to %d", t.Origin, t.Number, t.From.Size, t.To.Size)
}
