package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect/v2"
	"golang.org/x/mod/sumdb/note"

	"github.com/cedarpost/cedarpost/auditlog"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

type witnessCmd struct {
	keyFlags
	State    string `help:"File that keeps the checkpoints. It should be on another machine than the service and its database." required:"" type:"path" placeholder:"FILE"`
	Interval span   `help:"Time between two looks at the log (default ${default})." default:"10s" placeholder:"DURATION"`
	Once     bool   `help:"Look once, and end: for a timer that starts the command."`
	adminFlags
}

// Help is the long help of witness.
func (*witnessCmd) Help() string {
	return `Asks the service for its newest checkpoint, verifies the signature and the proof that the log only grew since the checkpoints it keeps, and keeps the new one too. If the log contradicts a kept checkpoint, it was altered, cut off or replaced: the command prints the contradiction, writes the checkpoint that proves it, if there is one, to the file of --state with .bad added, and ends with exit code 1.

While the service cannot be reached, the command prints the error and asks again.`
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
		bad, contradicts := errors.AsType[*auditlog.Contradiction](err)
		switch {
		case contradicts:
			return fmt.Errorf("THE LOG CONTRADICTS ITS CHECKPOINTS: %w", bad)
		case err != nil && w.Once:
			return err
		case err != nil && ctx.Err() == nil:
			fmt.Fprintf(c.err, "%s the log could not be checked: %v\n", time.Now().UTC().Format(time.RFC3339), err)
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

// look compares the newest checkpoint with those that are kept, and keeps it. The result is
// nil if the log has not grown.
func (w *witnessCmd) look(ctx context.Context, c *console, admin *peer, keys []note.Verifier) (*auditlog.Checkpoint, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	witness := auditlog.Witness{Keys: keys, Kept: auditlog.NotesIn(w.State), Prove: func(first, second int64) ([][]byte, error) {
		p, err := call(ctx, admin, admin.audit().GetConsistencyProof, &cedarpostv1.GetConsistencyProofRequest{First: first, Second: second})
		return p.GetProof(), err
	}}
	res, err := admin.audit().GetCheckpoint(ctx, &cedarpostv1.GetCheckpointRequest{})
	if connect.CodeOf(err) == connect.CodeNotFound {
		if err := witness.NoCheckpoint(); err != nil {
			return nil, err
		}
	}
	if err != nil {
		return nil, admin.explain(err)
	}
	signed := []byte(res.GetCheckpoint())
	statements := make([][]byte, len(res.GetTruncations()))
	for i, text := range res.GetTruncations() {
		statements[i] = []byte(text)
	}
	done, err := witness.Compare(signed, statements)
	if bad, ok := errors.AsType[*auditlog.Contradiction](err); ok {
		for _, proof := range bad.Proof {
			_ = auditlog.AppendCheckpoint(w.State+".bad", proof) // the contradiction is reported even if this fails
		}
	}
	if errors.Is(err, auditlog.ErrUnsigned) {
		err = unknownKey(signed, res.GetVerifierKeys(), keys)
	}
	if err != nil {
		return nil, err
	}
	for _, t := range done.Stated {
		if err := auditlog.AppendCheckpoint(w.State, t.Note); err != nil {
			return nil, err
		}
		fmt.Fprintf(c.out, "%s TRUNCATED: %s\n", time.Now().UTC().Format(time.RFC3339), truncatedText(t.Truncation))
	}
	if done.Known {
		return nil, nil
	}
	return &done.Checkpoint, auditlog.AppendCheckpoint(w.State, signed)
}

// unknownKey is the error if none of the given keys signed the newest checkpoint. offered are the
// keys that the service says it signs with.
func unknownKey(signed []byte, offered []string, keys []note.Verifier) error {
	var given []string
	for _, k := range keys {
		given = append(given, auditlog.KeyID(k))
	}
	by := auditlog.Signers(signed)
	err := fmt.Errorf("the newest checkpoint cannot be verified: it is signed with %s, and the given verifier keys are %s. This does not mean that the log was altered: "+
		"a verifier key is missing, or is of another log", clean(strings.Join(by, ", ")), clean(strings.Join(given, ", ")))
	if len(offered) > 0 {
		err = fmt.Errorf("%w. The service says that it signs with %s: trust that only if you know it from another source", err, clean(strings.Join(offered, ", ")))
	}
	return err
}
