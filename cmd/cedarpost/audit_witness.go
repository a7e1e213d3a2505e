package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect/v2"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/cedarpost/cedarpost/auditlog"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

type witnessCmd struct {
	keyFlags
	State    string `help:"File that keeps the checkpoints. It should be on another machine than the service and its database." required:"" type:"path" placeholder:"FILE"`
	Interval span   `help:"Ask so often (default ${default})." default:"10s" placeholder:"DURATION"`
	Once     bool   `help:"Ask once: for a timer that runs it."`
	adminFlags
}

// Help is the long help of witness.
func (*witnessCmd) Help() string {
	return `Asks the service for its newest checkpoint, verifies the signature, has it proven that the log of the last checkpoint it kept is the beginning of this one, and keeps it. When that fails, the log was altered, cut off or replaced: it says so, keeps the checkpoint that proves it in FILE.bad, and ends with exit code 1.

While the service cannot be reached it says so and asks again.`
}

// Run watches the log.
func (w *witnessCmd) Run(ctx context.Context, c *console) error {
	if w.Interval < span(time.Second) {
		return misuse("--interval must be at least 1s")
	}
	keys, err := w.required()
	if err != nil {
		return err
	}
	admin, err := w.dial()
	if err != nil {
		return err
	}
	for {
		grown, err := w.look(ctx, c, admin, keys)
		var forked *forkError
		switch {
		case errors.As(err, &forked):
			return err
		case err != nil && w.Once:
			return err
		case err != nil && ctx.Err() == nil:
			fmt.Fprintf(c.err, "%s not looked at: %v\n", time.Now().UTC().Format(time.RFC3339), err)
		case grown != nil:
			fmt.Fprintf(c.out, "%s %s size %d root %s\n", time.Now().UTC().Format(time.RFC3339), clean(grown.Origin), grown.Size, grown.Root)
		}
		if w.Once {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Duration(w.Interval)):
		}
	}
}

// forkError is a log that is not the one that was witnessed.
type forkError struct{ what string }

func (e *forkError) Error() string { return "THE LOG CONTRADICTS ITS CHECKPOINTS: " + e.what }

// look compares the newest checkpoint with the last one kept, and keeps it. The
// checkpoint is nil when the log has not grown.
func (w *witnessCmd) look(ctx context.Context, c *console, admin *peer, keys []note.Verifier) (*auditlog.Checkpoint, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	res, err := admin.audit().GetCheckpoint(ctx, &cedarpostv1.GetCheckpointRequest{})
	if connect.CodeOf(err) == connect.CodeNotFound {
		for _, key := range keys {
			if before, err := auditlog.LastCheckpoint(w.State, key.Name(), func(auditlog.Checkpoint) bool { return true }); err == nil && before.Size > 0 {
				return nil, &forkError{fmt.Sprintf("it has no checkpoint, and had one of %d batches", before.Size)}
			}
		}
	}
	if err != nil {
		return nil, admin.explain(err)
	}
	signed := []byte(res.GetCheckpoint())
	cry := func(format string, args ...any) (*auditlog.Checkpoint, error) {
		_ = auditlog.AppendCheckpoint(w.State+".bad", signed) // crying matters more
		return nil, &forkError{fmt.Sprintf(format, args...)}
	}
	now, err := auditlog.OpenCheckpoint(signed, keys...)
	if errors.Is(err, auditlog.ErrUnsigned) {
		return nil, w.unsigned(res, keys, cry)
	}
	if err != nil {
		return cry("%v", err)
	}
	known, err := auditlog.ReadStatements(w.State, now.Origin, keys...)
	if err != nil {
		return nil, err
	}
	var stated []auditlog.Statement
	for _, statement := range res.GetTruncations() {
		t, err := auditlog.PeekTruncation([]byte(statement))
		if err != nil || t.Origin != now.Origin {
			continue
		}
		before := len(known.Signed)
		if err := known.Add([]byte(statement), keys...); errors.Is(err, auditlog.ErrTwoStatements) {
			_ = auditlog.AppendCheckpoint(w.State+".bad", []byte(statement))
			return cry("%v", err)
		} else if err == nil && len(known.Signed) > before {
			stated = append(stated, auditlog.Statement{Truncation: t, Note: []byte(statement)})
		}
	}
	var signedBefore auditlog.Statements // of checkpoints alone
	have := false                        // now is kept already
	last, err := auditlog.LastCheckpoint(w.State, now.Origin, func(c auditlog.Checkpoint) bool { return !known.Excuses(c) })
	if err == nil {
		err = auditlog.EachKept(w.State, now.Origin, func(c auditlog.Checkpoint, signed []byte) error {
			signedBefore.See(c, signed, keys...)
			have = have || c == now
			return nil
		})
	}
	if err != nil {
		return nil, err
	}
	if now.Epoch < signedBefore.Epoch {
		return cry("it has gone back: its newest checkpoint was signed after %d statements of truncation, and one that was kept after %d", now.Epoch, signedBefore.Epoch)
	}
	// Each kept checkpoint was proven to continue the ones before it. So of those that are
	// not lost, the largest one stands for all. A new statement may have brought the log back
	// to before that, so then each size that one goes back to is proven again.
	before, proven := last, []auditlog.Checkpoint{last}
	for _, c := range known.Live() {
		if c.Size >= before.Size {
			before = c
		}
		if len(stated) > 0 {
			proven = append(proven, c)
		}
	}
	if len(stated) == 0 {
		proven = []auditlog.Checkpoint{before}
	}
	for _, c := range proven {
		what, err := w.continues(ctx, admin, c, now)
		if err != nil {
			return nil, err
		}
		if what != "" {
			if missing := known.Missing(c); missing != "" {
				what += ". But " + missing
			}
			return cry("%s", what)
		}
	}
	for _, t := range stated {
		if err := auditlog.AppendCheckpoint(w.State, t.Note); err != nil {
			return nil, err
		}
		fmt.Fprintf(c.out, "%s TRUNCATED: %s\n", time.Now().UTC().Format(time.RFC3339), truncatedText(t.Truncation))
	}
	if have {
		return nil, nil
	}
	return &now, auditlog.AppendCheckpoint(w.State, signed)
}

// continues makes sure that a log goes on from a checkpoint, and otherwise says what is
// wrong.
func (w *witnessCmd) continues(ctx context.Context, admin *peer, before, now auditlog.Checkpoint) (what string, err error) {
	switch {
	case now.Size < before.Size:
		return fmt.Sprintf("it has %d batches and had %d", now.Size, before.Size), nil
	case now.Size == before.Size && now.Root != before.Root:
		return fmt.Sprintf("at %d batches it has another root than before", now.Size), nil
	case now.Size == before.Size || before.Size == 0:
		return "", nil
	}
	p, err := call(ctx, admin, admin.audit().GetConsistencyProof,
		&cedarpostv1.GetConsistencyProofRequest{First: before.Size, Second: now.Size})
	if err != nil {
		return "", err
	}
	proof, ok := proofOf(p.GetProof())
	if ok {
		ok = tlog.CheckTree(proof, now.Size, now.Root, before.Size, before.Root) == nil
	}
	if !ok {
		return fmt.Sprintf("the log of %d batches is not the beginning of the log of %d", before.Size, now.Size), nil
	}
	return "", nil
}

// unsigned says what is wrong where none of the keys signed the newest checkpoint. Mostly
// a verifier key is missing or is another log's: that says nothing about the log. But if
// these keys signed checkpoints that the witness keeps, it is a contradiction.
func (w *witnessCmd) unsigned(res *cedarpostv1.GetCheckpointResponse, keys []note.Verifier, cry func(string, ...any) (*auditlog.Checkpoint, error)) error {
	signed := []byte(res.GetCheckpoint())
	for _, key := range keys {
		if slices.Contains(auditlog.Signers(signed), auditlog.KeyID(key)) {
			_, err := cry("its newest checkpoint names the key %s, and the signature is not of that key", auditlog.KeyID(key))
			return err
		}
	}
	notes, err := checkpointsIn(w.State)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, before := range notes {
		if _, err := auditlog.OpenCheckpoint(before, keys...); err == nil {
			_, err := cry("its newest checkpoint is not signed by a trusted key, and those before were; it is signed with %s", strings.Join(auditlog.Signers(signed), ", "))
			return err
		}
	}
	return unknownKey(signed, res.GetVerifierKeys(), keys)
}

// unknownKey is the error where none of the given keys signed the newest checkpoint.
// offered are the verifier keys that the service claims.
func unknownKey(signed []byte, offered []string, keys []note.Verifier) error {
	var given []string
	for _, k := range keys {
		given = append(given, auditlog.KeyID(k))
	}
	by := auditlog.Signers(signed)
	err := fmt.Errorf("the newest checkpoint cannot be verified: it is signed with %s, and the given verifier keys are %s. This says nothing about the log yet: "+
		"a verifier key is missing, or is another log's", clean(strings.Join(by, ", ")), clean(strings.Join(given, ", ")))
	if len(offered) > 0 {
		err = fmt.Errorf("%w. The service says that it signs with %s: trust that only if you know it from another source", err, clean(strings.Join(offered, ", ")))
	}
	return err
}
