package auditlog_test

import (
	"bytes"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/auditlog"
)

func truncation() auditlog.Truncation {
	at := func(n int) auditlog.Checkpoint {
		return auditlog.Checkpoint{Origin: "example.org/log", Size: int64(n), Root: auditlog.Root(leaves(n))}
	}
	return auditlog.Truncation{
		Origin: "example.org/log", From: at(70), To: at(42), Time: time.Date(2026, 1, 31, 12, 30, 0, 0, time.UTC),
		Operator: "ann", Reason: "the primary burned: ticket 7",
	}
}

// A statement reads as what was signed, never as a checkpoint, and not at all if it is
// not whole.
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
		"of another log":   func(s *auditlog.Truncation) { s.To.Origin = "example.org/other" },
	} {
		s := truncation()
		change(&s)
		if _, err := s.Sign(key); err == nil {
			t.Errorf("%s: it is signed", name)
		}
	}
	// Signed for one log, it is of no other.
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

// A file is followed from its first note to its last one.
func TestKeptCheckpoints(t *testing.T) {
	name, verifier := keyFile(t, "example.org/log")
	key, err := auditlog.ReadKey(name)
	if err != nil {
		t.Fatal(err)
	}
	at := func(n int) auditlog.Checkpoint {
		return auditlog.Checkpoint{Origin: "example.org/log", Size: int64(n), Root: auditlog.Root(leaves(n))}
	}
	note := func(signed []byte, err error) []byte {
		if err != nil {
			t.Fatal(err)
		}
		return signed
	}
	statement := note(truncation().Sign(key))
	other := truncation()
	other.To.Root[0] ^= 1
	for title, c := range map[string]struct {
		notes [][]byte
		last  int64 // 0: refused
	}{
		"what is lost does not count":       {[][]byte{note(at(42).Sign(key)), note(at(70).Sign(key)), statement}, 42},
		"what is signed then counts":        {[][]byte{note(at(42).Sign(key)), note(at(70).Sign(key)), statement, note(at(50).Sign(key))}, 50},
		"a witness had not all of it":       {[][]byte{note(at(30).Sign(key)), note(at(60).Sign(key)), statement}, 42},
		"alone":                             {[][]byte{statement}, 0},
		"before the last it is about":       {[][]byte{note(at(42).Sign(key)), note(at(80).Sign(key)), statement}, 0},
		"twice":                             {[][]byte{note(at(70).Sign(key)), statement, statement}, 0},
		"another root than what was signed": {[][]byte{note(at(42).Sign(key)), note(at(70).Sign(key)), note(other.Sign(key))}, 0},
		"altered":                           {[][]byte{note(at(70).Sign(key)), bytes.Replace(statement, []byte("ann"), []byte("bob"), 1)}, 0},
	} {
		file := filepath.Join(t.TempDir(), "checkpoints")
		for _, n := range c.notes {
			if err := auditlog.AppendCheckpoint(file, n); err != nil {
				t.Fatal(err)
			}
		}
		kept, err := auditlog.ReadKept(file, "example.org/log", verifier)
		if (err == nil) != (c.last > 0) || err == nil && kept.Last.Size != c.last {
			t.Errorf("%s: %+v, %v", title, kept, err)
		}
		if title == "another root than what was signed" {
			continue // takes all checkpoints in memory to see
		}
		last, err := auditlog.LastCheckpoint(file, "example.org/log", verifier)
		if (err == nil) != (c.last > 0) || err == nil && last.Size != c.last {
			t.Errorf("%s: the last one is %+v, %v", title, last, err)
		}
	}
}

// FuzzPeekTruncation: what reads as a statement is what is written, and no checkpoint.
func FuzzPeekTruncation(f *testing.F) {
	f.Add([]byte("cedarpost-truncation-v1\norigin a\nfrom 2 47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=\nto 1 47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=\ntime 2026-01-31T12:30:00Z\noperator o\nreason r\n\n— a AAAA\n"))
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
