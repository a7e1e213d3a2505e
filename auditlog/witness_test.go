package auditlog_test

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/auditlog"
)

// prove returns the proofs of a log with these leaves, as its service does.
func prove(leaves []tlog.Hash) func(first, second int64) ([][]byte, error) {
	return func(first, second int64) (proof [][]byte, err error) {
		if second > int64(len(leaves)) {
			return nil, fmt.Errorf("the log has %d batches", len(leaves))
		}
		tiles := memory{}
		_, grown, err := auditlog.Grow(0, leaves[:second], tiles.read)
		if err != nil {
			return nil, err
		}
		for _, tile := range grown {
			tiles[tile.TileID] = tile.Hashes
		}
		hashes, err := tlog.ProveTree(second, first, auditlog.Tiles(tiles.read))
		for _, h := range hashes {
			proof = append(proof, h[:])
		}
		return proof, err
	}
}

// notes are what a witness keeps.
func notes(list [][]byte) auditlog.Notes {
	return func(fn func(signed []byte) error) error {
		for _, signed := range list {
			if err := fn(signed); err != nil {
				return err
			}
		}
		return nil
	}
}

// signerOf returns a key of a log, and its verifier.
func signerOf(t *testing.T, name string) (auditlog.Key, note.Verifier) {
	t.Helper()
	file, verifier := keyFile(t, name)
	key, err := auditlog.ReadKey(file)
	if err != nil {
		t.Fatal(err)
	}
	return key, verifier
}

func TestWitness(t *testing.T) {
	key, verifier := signerOf(t, "example.org/log")
	otherKey, _ := signerOf(t, "example.org/log")
	foreignKey, foreignVerifier := signerOf(t, "example.org/other")
	// The log, one that has the same first five batches, and one that has none of them.
	ours := leaves(12)
	other := leaves(30)[20:]
	fork := slices.Concat(ours[:5], other)
	must := func(signed []byte, err error) []byte {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return signed
	}
	at := func(log []tlog.Hash, n, epoch int64) auditlog.Checkpoint {
		return auditlog.Checkpoint{Origin: "example.org/log", Size: n, Root: auditlog.Root(log[:n]), Epoch: epoch}
	}
	sign := func(log []tlog.Hash, n, epoch int64) []byte { return must(at(log, n, epoch).Sign(key)) }
	state := func(reason string, by auditlog.Key, number int64, from, to auditlog.Checkpoint) []byte {
		from.Origin, to.Origin = by.Name(), by.Name()
		return must(auditlog.Truncation{
			Origin: by.Name(), Number: number, From: from, To: to, Time: time.Unix(number, 0).UTC(), Operator: "ann", Reason: reason,
		}.Sign(by))
	}
	lost := state("burned", key, 1, at(ours, 9, 0), at(ours, 5, 1))
	foreign := must(auditlog.Checkpoint{Origin: "example.org/other", Size: 99, Root: auditlog.Root(nil)}.Sign(foreignKey))
	altered := bytes.Replace(sign(ours, 9, 0), []byte("\n9\n"), []byte("\n8\n"), 1)
	short := func(int64, int64) ([][]byte, error) { return [][]byte{{1, 2}}, nil }
	down := errors.New("connection refused")
	list := func(signed ...[]byte) [][]byte { return signed }

	for _, c := range []struct {
		name       string
		kept       [][]byte
		newest     []byte
		statements [][]byte
		prove      func(first, second int64) ([][]byte, error)
		want       string // of the contradiction; "" if there is none
		known      bool
		stated     int
		proof      int // notes that prove it
	}{
		{name: "the first checkpoint", newest: sign(ours, 5, 0)},
		{name: "one that is kept", kept: list(sign(ours, 5, 0)), newest: sign(ours, 5, 0), known: true},
		{name: "it grew", kept: list(sign(ours, 5, 0), sign(ours, 7, 0)), newest: sign(ours, 9, 0)},
		{name: "checkpoints of another log are kept too", kept: list(foreign), newest: sign(ours, 5, 0)},
		{name: "it grew from another log", kept: list(sign(ours, 7, 0)), newest: sign(fork, 9, 0), prove: prove(fork),
			want: "the log of 7 batches is not the beginning of the log of 9", proof: 1},
		{name: "a malformed proof", kept: list(sign(ours, 7, 0)), newest: sign(ours, 9, 0), prove: short,
			want: "the log of 7 batches is not the beginning of the log of 9", proof: 1},
		{name: "it is shorter", kept: list(sign(ours, 5, 0), sign(ours, 9, 0)), newest: sign(ours, 7, 0), want: "it has 7 batches and had 9", proof: 1},
		{name: "another log of the same size", kept: list(sign(ours, 7, 0)), newest: sign(fork, 7, 0), want: "at 7 batches it has another root than before", proof: 1},
		{name: "it is altered", newest: altered, want: "invalid signature for key " + auditlog.KeyID(verifier), proof: 1},
		{name: "no note", newest: []byte("x"), want: "checkpoint: ", proof: 1},
		{name: "another key signs", kept: list(sign(ours, 5, 0)), newest: must(at(ours, 7, 0).Sign(otherKey)), want: "is not signed by a trusted key, and those before were", proof: 1},
		{name: "batches are stated as lost", kept: list(sign(ours, 5, 0), sign(ours, 9, 0)), newest: sign(fork, 8, 1), statements: list(lost), prove: prove(fork), stated: 1},
		{name: "the statement is kept", kept: list(sign(ours, 9, 0), lost), newest: sign(fork, 8, 1), statements: list(lost, lost), prove: prove(fork)},
		{name: "the log goes on from another place than a new statement says", kept: list(sign(ours, 9, 0)), newest: sign(other, 8, 1), statements: list(lost),
			prove: prove(other), want: "the log of 5 batches is not the beginning of the log of 8", proof: 1},
		{name: "the log goes on from another place than a kept statement says", kept: list(lost), newest: sign(other, 8, 1), prove: prove(other),
			want: "the log of 5 batches is not the beginning of the log of 8", proof: 1},
		{name: "a second statement goes to a log that does not continue the first", kept: list(lost, sign(fork, 8, 1)), newest: sign(other, 7, 2),
			statements: list(state("burned", key, 2, at(fork, 8, 1), at(other, 6, 2))), prove: prove(other),
			want: "the log of 5 batches is not the beginning of the log of 7", proof: 1},
		{name: "a statement of another log", kept: list(sign(ours, 9, 0), lost), newest: sign(fork, 8, 1), statements: list(state("burned", foreignKey, 1, at(ours, 9, 0), at(ours, 5, 1))), prove: prove(fork)},
		{name: "a statement of another key", kept: list(sign(ours, 9, 0)), newest: sign(fork, 8, 1), statements: list(state("burned", otherKey, 1, at(ours, 9, 0), at(ours, 5, 1))), prove: prove(fork),
			want: "its verifier key is missing", proof: 1},
		{name: "two statements with one number", kept: list(lost), newest: sign(fork, 8, 1), statements: list(state("flooded", key, 1, at(ours, 9, 0), at(ours, 5, 1))), prove: prove(fork),
			want: "two different statements of truncation have the same number", proof: 2},
		{name: "an earlier epoch", kept: list(sign(ours, 5, 1)), newest: sign(ours, 7, 0), want: "signed after 0 statements of truncation, and one that was kept after 1", proof: 1},
		{name: "a second loss, with the statement of the first", kept: list(sign(ours, 9, 0), lost, sign(fork, 9, 1)), newest: sign(fork, 8, 1), statements: list(lost), prove: prove(fork),
			want: "it has 8 batches and had 9", proof: 1},
	} {
		w := auditlog.Witness{Keys: []note.Verifier{verifier, foreignVerifier}, Kept: notes(c.kept), Prove: c.prove}
		if w.Prove == nil {
			w.Prove = prove(ours)
		}
		done, err := w.Compare(c.newest, c.statements)
		if c.want != "" {
			bad, ok := errors.AsType[*auditlog.Contradiction](err)
			if !ok || !strings.Contains(bad.What, c.want) || len(bad.Proof) != c.proof || !bytes.Equal(bad.Proof[c.proof-1], c.newest) {
				t.Errorf("%s: %v", c.name, err)
			}
			continue
		}
		if err != nil || done.Known != c.known || len(done.Stated) != c.stated || !bytes.Contains(c.newest, []byte(done.Checkpoint.Root.String())) {
			t.Errorf("%s: %+v, %v", c.name, done, err)
		}
	}

	// What is no contradiction, and no success.
	w := auditlog.Witness{Keys: []note.Verifier{verifier}, Kept: notes(list(foreign)), Prove: prove(ours)}
	if _, err := w.Compare(must(at(ours, 7, 0).Sign(otherKey)), nil); !errors.Is(err, auditlog.ErrUnsigned) {
		t.Errorf("signed by a key that is not known: %v", err)
	}
	if err := w.NoCheckpoint(); err != nil {
		t.Errorf("no checkpoint, and none is kept of this log: %v", err)
	}
	w.Kept = notes(list(sign(ours, 5, 0), foreign))
	if bad, ok := errors.AsType[*auditlog.Contradiction](w.NoCheckpoint()); !ok || bad.What != "it has no checkpoint, and had one of 5 batches" {
		t.Errorf("no checkpoint, and one is kept: %v", bad)
	}
	w.Prove = func(int64, int64) ([][]byte, error) { return nil, down }
	if _, err := w.Compare(sign(ours, 7, 0), nil); !errors.Is(err, down) {
		t.Errorf("the log cannot be asked: %v", err)
	}
	w.Kept = func(func([]byte) error) error { return down }
	if _, err := w.Compare(sign(ours, 7, 0), nil); !errors.Is(err, down) {
		t.Errorf("what is kept cannot be read: %v", err)
	}
}

// A log grows and loses batches, which is stated, in any order, and a witness looks at it now
// and then: it never finds a contradiction. When somebody then cuts the log back without a
// statement, to less than the witness has seen of it, it does.
func TestWitnessProperty(t *testing.T) {
	key, verifier := signerOf(t, "example.org/log")
	rapid.Check(t, func(t *rapid.T) {
		var log []tlog.Hash
		var kept, statements [][]byte
		var newest, seen auditlog.Checkpoint // signed, and seen by the witness
		epoch, next := int64(0), 0
		grow := func() {
			for range rapid.IntRange(1, 5).Draw(t, "batches") {
				next++
				log = append(log, auditlog.Hash([]byte{byte(next), byte(next >> 8)}))
			}
			newest = auditlog.Checkpoint{Origin: "example.org/log", Size: int64(len(log)), Root: auditlog.Root(log), Epoch: epoch}
		}
		look := func() (auditlog.Witnessed, error) {
			signed, err := newest.Sign(key)
			if err != nil {
				t.Fatal(err)
			}
			done, err := auditlog.Witness{Keys: []note.Verifier{verifier}, Kept: notes(kept), Prove: prove(log)}.Compare(signed, statements)
			if err != nil {
				return done, err
			}
			for _, s := range done.Stated {
				kept = append(kept, s.Note)
			}
			if !done.Known {
				kept = append(kept, signed)
			}
			seen = newest
			return done, nil
		}
		grow()
		for range rapid.IntRange(1, 12).Draw(t, "steps") {
			switch rapid.SampledFrom([]string{"grow", "look", "lose"}).Draw(t, "step") {
			case "grow":
				grow()
			case "look":
				if _, err := look(); err != nil {
					t.Fatal(err)
				}
			case "lose":
				to := rapid.Int64Range(1, newest.Size).Draw(t, "down to")
				if to == newest.Size {
					continue
				}
				epoch++
				signed, err := auditlog.Truncation{
					Origin: "example.org/log", Number: epoch, From: newest,
					To:   auditlog.Checkpoint{Origin: "example.org/log", Size: to, Root: auditlog.Root(log[:to]), Epoch: epoch},
					Time: time.Unix(epoch, 0).UTC(), Operator: "ann", Reason: "none",
				}.Sign(key)
				if err != nil {
					t.Fatal(err)
				}
				statements = append(statements, signed)
				log = slices.Clone(log[:to])
				grow()
			}
		}
		if _, err := look(); err != nil {
			t.Fatal(err)
		}
		if done, err := look(); err != nil || !done.Known || len(done.Stated) > 0 {
			t.Fatalf("seen twice: %+v, %v", done, err)
		}
		cut := rapid.Int64Range(0, seen.Size-1).Draw(t, "cut back to")
		log = slices.Clone(log[:cut])
		grow()
		_, err := look()
		if _, ok := errors.AsType[*auditlog.Contradiction](err); !ok {
			t.Fatalf("%d batches were cut back to %d: %v", seen.Size, cut, err)
		}
	})
}
