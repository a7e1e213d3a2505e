package auditlog_test

import (
	"bytes"
	"errors"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/mod/sumdb/tlog"
	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/auditlog"
)

func truncation() auditlog.Truncation {
	at := func(n int) auditlog.Checkpoint {
		return auditlog.Checkpoint{Origin: "example.org/log", Size: int64(n), Root: auditlog.Root(leaves(n))}
	}
	to := at(42)
	to.Epoch = 1
	return auditlog.Truncation{
		Origin: "example.org/log", Number: 1, From: at(70), To: to, Time: time.Date(2026, 1, 31, 12, 30, 0, 0, time.UTC),
		Operator: "ann", Reason: "the primary burned: ticket 7",
	}
}

// A statement is read as it was signed. It is never read as a checkpoint, and an invalid one is
// neither signed nor read.
func TestTruncation(t *testing.T) {
	file, verifier := keyFile(t, "example.org/log")
	key, err := auditlog.ReadKey(file)
	if err != nil {
		t.Fatal(err)
	}
	_, stranger := keyFile(t, "example.org/log")
	signed, err := truncation().Sign(key)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := auditlog.OpenTruncation(signed, verifier); err != nil || got != truncation() || got.Lost() != 28 {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := auditlog.OpenTruncation(signed, stranger); !errors.Is(err, auditlog.ErrUnsigned) {
		t.Errorf("got %v", err)
	}
	if _, err := auditlog.OpenTruncation(signed); err == nil {
		t.Error("read without a key")
	}
	if c, err := auditlog.OpenCheckpoint(signed, verifier); err == nil {
		t.Errorf("it is a checkpoint: %+v", c)
	}
	checkpoint, err := truncation().To.Sign(key)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := auditlog.OpenTruncation(checkpoint, verifier); err == nil {
		t.Error("a checkpoint is a statement")
	}
	for name, change := range map[string]func(*auditlog.Truncation){
		"no operator":      func(s *auditlog.Truncation) { s.Operator = "" },
		"no reason":        func(s *auditlog.Truncation) { s.Reason = " " },
		"two lines":        func(s *auditlog.Truncation) { s.Reason = "a\nto 1" },
		"a long one":       func(s *auditlog.Truncation) { s.Reason = strings.Repeat("x", auditlog.MaxStated+1) },
		"a direction mark": func(s *auditlog.Truncation) { s.Operator = "a\u202eb" },
		"nothing lost":     func(s *auditlog.Truncation) { s.From = s.To },
		"the other way":    func(s *auditlog.Truncation) { s.From, s.To = s.To, s.From },
		"to nothing":       func(s *auditlog.Truncation) { s.To.Size = 0 },
		"no number":        func(s *auditlog.Truncation) { s.Number, s.From.Epoch, s.To.Epoch = 0, -1, 0 },
		"another epoch":    func(s *auditlog.Truncation) { s.From.Epoch = 1 },
		"after another":    func(s *auditlog.Truncation) { s.To.Epoch = 2 },
		"of another log":   func(s *auditlog.Truncation) { s.To.Origin = "example.org/other" },
	} {
		s := truncation()
		change(&s)
		if _, err := s.Sign(key); err == nil {
			t.Errorf("%s: it is signed", name)
		}
	}
	// The key of one log cannot sign a statement about another log.
	otherFile, otherVerifier := keyFile(t, "example.org/other")
	other, err := auditlog.ReadKey(otherFile)
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := truncation().Sign(other)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := auditlog.OpenTruncation(foreign, verifier, otherVerifier); !errors.Is(err, auditlog.ErrUnsigned) {
		t.Errorf("by the key of another log: %v", err)
	}
}

// A statement excuses larger checkpoints that were signed before it, wherever and however often it
// is in a file. It never excuses one that was signed after it.
func TestStatements(t *testing.T) {
	name, verifier := keyFile(t, "example.org/log")
	strangerName, stranger := keyFile(t, "example.org/log")
	read := func(name string) auditlog.Key {
		key, err := auditlog.ReadKey(name)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	key, other := read(name), read(strangerName)
	at := func(n, epoch int64) auditlog.Checkpoint {
		return auditlog.Checkpoint{Origin: "example.org/log", Size: n, Root: auditlog.Root(leaves(int(n))), Epoch: epoch}
	}
	must := func(signed []byte, err error) []byte {
		if err != nil {
			t.Fatal(err)
		}
		return signed
	}
	first := truncation()
	second := first
	second.Number, second.From, second.To = 2, at(60, 1), at(50, 2)
	one, two := must(first.Sign(key)), must(second.Sign(key))
	again := first
	again.Reason = "another one"
	foreign := must(first.Sign(other))
	checkpoint := func(n, epoch int64) []byte { return must(at(n, epoch).Sign(key)) }
	forged := bytes.Replace(checkpoint(90, 0), []byte("\n\n"), []byte("\ntruncations 8\n\n"), 1)
	for title, c := range map[string]struct {
		notes      [][]byte
		epoch      int64
		lost, live []auditlog.Checkpoint
		bad        bool
	}{
		"none":            {notes: [][]byte{checkpoint(70, 0)}, live: []auditlog.Checkpoint{at(70, 0)}},
		"one":             {[][]byte{checkpoint(70, 0), one}, 1, []auditlog.Checkpoint{at(70, 0), at(43, 0)}, []auditlog.Checkpoint{at(42, 0), at(70, 1), at(43, 1)}, false},
		"before and late": {[][]byte{one, checkpoint(50, 1), one, checkpoint(70, 0), one}, 1, []auditlog.Checkpoint{at(70, 0)}, []auditlog.Checkpoint{at(50, 1)}, false},
		"two":             {[][]byte{two, one}, 2, []auditlog.Checkpoint{at(45, 0), at(51, 1)}, []auditlog.Checkpoint{at(42, 0), at(45, 1), at(50, 1), at(51, 2)}, false},
		"the second":      {[][]byte{two}, 2, []auditlog.Checkpoint{at(51, 0), at(51, 1)}, []auditlog.Checkpoint{at(45, 0)}, false},
		"of others":       {[][]byte{foreign}, 0, nil, []auditlog.Checkpoint{at(70, 0)}, false},
		"a contradiction": {notes: [][]byte{one, must(again.Sign(key))}, bad: true},
		"by both":         {[][]byte{one, must(first.Sign(other, key))}, 1, []auditlog.Checkpoint{at(70, 0)}, nil, false},
		"altered":         {notes: [][]byte{bytes.Replace(one, []byte("ann"), []byte("bob"), 1)}, bad: true},
		"too long":        {notes: [][]byte{append(bytes.Clone(one), bytes.Repeat([]byte("\u2014 x AAAAAAAA\n"), 400)...)}, bad: true},
		"a made up epoch": {[][]byte{forged, must(at(90, 9).Sign(other))}, 0, nil, []auditlog.Checkpoint{at(70, 0)}, false},
		"an epoch alone":  {[][]byte{checkpoint(50, 3)}, 3, nil, []auditlog.Checkpoint{at(70, 0)}, false},
	} {
		file := filepath.Join(t.TempDir(), "checkpoints")
		for _, n := range c.notes {
			if err := auditlog.AppendCheckpoint(file, n); err != nil {
				t.Fatal(err)
			}
		}
		s, err := auditlog.ReadStatements(file, "example.org/log", verifier)
		if (err != nil) != c.bad {
			t.Errorf("%s: %v", title, err)
		}
		if c.bad {
			continue
		}
		if s.Epoch != c.epoch {
			t.Errorf("%s: epoch %d", title, s.Epoch)
		}
		for _, p := range c.lost {
			if !s.Excuses(p) {
				t.Errorf("%s: %d of epoch %d is not excused", title, p.Size, p.Epoch)
			}
		}
		for _, p := range c.live {
			if s.Excuses(p) {
				t.Errorf("%s: %d of epoch %d is excused", title, p.Size, p.Epoch)
			}
		}
	}
	var s auditlog.Statements
	if err := s.Add(foreign, verifier); err != nil {
		t.Fatal(err)
	}
	if missing := s.Missing(at(70, 0)); !strings.Contains(missing, auditlog.KeyID(stranger)) {
		t.Errorf("the missing key is not named: %q", missing)
	}
	if missing := s.Missing(at(70, 1)) + s.Missing(at(42, 0)); missing != "" {
		t.Errorf("a statement is missed that would excuse nothing: %s", missing)
	}
}

// history is a simulated log, with the checkpoints that were signed of it.
type history struct {
	leaves []tlog.Hash
	epoch  int64
	notes  []auditlog.Checkpoint // that match the log
}

func (h *history) root(n int64) tlog.Hash { return auditlog.Root(h.leaves[:n]) }

// contradicts reports whether a log contradicts the notes of a keeper.
func contradicts(h history, kept []auditlog.Checkpoint, s auditlog.Statements) bool {
	for _, c := range append(slices.Clone(kept), s.Live()...) {
		if !s.Excuses(c) && (c.Size > int64(len(h.leaves)) || h.root(c.Size) != c.Root) {
			return true
		}
	}
	return false
}

// A log grows, is signed, and loses batches with a statement, in any order. No keeper of
// checkpoints finds a contradiction, with its own notes and all statements. If the log is then cut
// back, each keeper of a lost checkpoint of the last epoch notices it, even if old statements are
// shown again.
func TestTruncationsProperty(t *testing.T) {
	name, verifier := keyFile(t, "example.org/log")
	key, err := auditlog.ReadKey(name)
	if err != nil {
		t.Fatal(err)
	}
	rapid.Check(t, func(t *rapid.T) {
		var now history
		var stated [][]byte
		var keepers [][]auditlog.Checkpoint
		var notes []auditlog.Checkpoint // all that were signed, as the signer's file has them
		states := []history{}
		next := 0
		for range rapid.IntRange(5, 40).Draw(t, "steps") {
			states = append(states, history{slices.Clone(now.leaves), now.epoch, slices.Clone(now.notes)})
			switch rapid.SampledFrom([]string{"grow", "grow", "sign", "sign", "lose", "keep"}).Draw(t, "step") {
			case "grow":
				for range rapid.IntRange(1, 4).Draw(t, "leaves") {
					next++
					now.leaves = append(now.leaves, auditlog.Hash([]byte{byte(next), byte(next >> 8)}))
				}
			case "sign":
				n := int64(len(now.leaves))
				if len(now.notes) > 0 && now.notes[len(now.notes)-1].Size == n || n == 0 {
					continue
				}
				c := auditlog.Checkpoint{Origin: "example.org/log", Size: n, Root: now.root(n), Epoch: now.epoch}
				now.notes, notes = append(now.notes, c), append(notes, c)
			case "lose":
				back := rapid.SampledFrom(states).Draw(t, "back")
				var from auditlog.Checkpoint
				for _, c := range notes {
					if c.Epoch == now.epoch && c.Size > from.Size {
						from = c
					}
				}
				if len(back.notes) == 0 || from.Size <= back.notes[len(back.notes)-1].Size || len(now.leaves) < len(back.leaves) || !slices.Equal(now.leaves[:len(back.leaves)], back.leaves) {
					continue
				}
				now.leaves, now.notes = slices.Clone(back.leaves), slices.Clone(back.notes)
				to := now.notes[len(now.notes)-1]
				now.epoch++
				to.Epoch = now.epoch
				signed, err := auditlog.Truncation{
					Origin: "example.org/log", Number: now.epoch, From: from, To: to, Time: time.Unix(now.epoch, 0).UTC(), Operator: "ann", Reason: "none",
				}.Sign(key)
				if err != nil {
					t.Fatal(err)
				}
				stated = append(stated, signed)
			case "keep":
				keepers = append(keepers, slices.Clone(notes), slices.Clone(now.notes))
			}
		}
		keepers = append(keepers, slices.Clone(notes))
		var all auditlog.Statements
		shown := rapid.Permutation(append(slices.Clone(stated), stated...)).Draw(t, "order")
		for _, signed := range shown {
			if err := all.Add(signed, verifier); err != nil {
				t.Fatal(err)
			}
		}
		for i, kept := range keepers {
			if contradicts(now, kept, all) {
				t.Fatalf("keeper %d does not find the log in order", i)
			}
		}
		// Somebody without the key cuts the log back, and lets it grow otherwise.
		cut := rapid.SampledFrom(append(states, now)).Draw(t, "cut back to")
		for range rapid.IntRange(0, 9).Draw(t, "grown otherwise") {
			next++
			cut.leaves = append(slices.Clone(cut.leaves), auditlog.Hash([]byte{byte(next), byte(next >> 8), 1}))
		}
		var replayed auditlog.Statements
		for _, signed := range stated {
			if rapid.Bool().Draw(t, "shown again") {
				if err := replayed.Add(signed, verifier); err != nil {
					t.Fatal(err)
				}
			}
		}
		for i, kept := range keepers {
			for _, c := range kept {
				lost := c.Epoch == now.epoch && (c.Size > int64(len(cut.leaves)) || cut.root(c.Size) != c.Root)
				if lost && !contradicts(cut, kept, replayed) {
					t.Fatalf("keeper %d does not notice that %d batches of epoch %d are lost", i, c.Size, c.Epoch)
				}
			}
		}
	})
}

// A text that is read as a statement is a valid one, and is not read as a checkpoint.
func FuzzPeekTruncation(f *testing.F) {
	f.Add([]byte("cedarpost-truncation-v1\norigin a\nnumber 1\nfrom 2 47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=\nto 1 47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=\ntime 2026-01-31T12:30:00Z\noperator o\nreason r\n\n— a AAAA\n"))
	f.Add([]byte("cedarpost-truncation-v1\n\n"))
	f.Add([]byte("a\n1\n47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=\n\n— a AAAA\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := auditlog.PeekTruncation(text)
		if err != nil {
			return
		}
		if c, err := auditlog.PeekCheckpoint(text); err == nil {
			t.Errorf("%q is a checkpoint: %+v", text, c)
		}
		if !auditlog.IsTruncation(text) || s.Lost() <= 0 || s.Operator == "" || s.Reason == "" || strings.ContainsAny(s.Operator+s.Reason, "\r\n") {
			t.Errorf("%q reads as %+v", text, s)
		}
	})
}
