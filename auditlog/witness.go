package auditlog

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// A Witness keeps the checkpoints of a log outside of the service, and compares each new one
// with those that it keeps. Its functions give it access to them and to the log.
type Witness struct {
	// Keys verify checkpoints and statements of truncation.
	Keys []note.Verifier
	// Kept calls fn with each signed note that the witness keeps. It is called several times
	// for one comparison, so that no list of all notes is in memory.
	Kept Notes
	// Prove asks the log for the consistency proof from size first to size second. Each hash
	// has 32 bytes.
	Prove func(first, second int64) (proof [][]byte, err error)
}

// Notes calls fn with signed notes, one after the other, and returns the first error.
type Notes func(fn func(signed []byte) error) error

// Witnessed is the outcome of a comparison without a contradiction.
type Witnessed struct {
	// Checkpoint is the newest checkpoint of the log.
	Checkpoint Checkpoint
	// Known reports that the witness keeps this checkpoint already.
	Known bool
	// Stated are statements of truncation that the witness does not keep yet. It has to keep
	// them, and then the checkpoint.
	Stated []Statement
}

// A Contradiction says that the log is not the one whose checkpoints the witness keeps: it was
// altered, cut off or replaced.
type Contradiction struct {
	// What says what is wrong.
	What string
	// Proof are the signed notes that, with those that are kept, prove it.
	Proof [][]byte
}

// Error implements error.
func (c *Contradiction) Error() string { return c.What }

func contradiction(proof [][]byte, format string, args ...any) error {
	return &Contradiction{fmt.Sprintf(format, args...), proof}
}

// NoCheckpoint judges a log that has no checkpoint. It returns a [Contradiction] if the witness
// keeps one of a log of its keys, and nil otherwise.
func (w Witness) NoCheckpoint() error {
	var last Checkpoint
	err := w.Kept(func(signed []byte) error {
		c, err := PeekCheckpoint(signed)
		ours := func(key note.Verifier) bool { return key.Name() == c.Origin }
		if err == nil && c.Size > last.Size && slices.ContainsFunc(w.Keys, ours) {
			last = c
		}
		return nil
	})
	if err == nil && last.Size > 0 {
		err = contradiction(nil, "it has no checkpoint, and had one of %d batches", last.Size)
	}
	return err
}

// Compare compares the newest checkpoint of a log, and the statements of truncation that the
// log shows with it, with what the witness keeps. It returns a [Contradiction] if they do not
// fit. If no key of the witness signed the checkpoint, and none of the kept ones either, the
// error is [ErrUnsigned]: a verifier key is missing, or is of another log, and that says
// nothing about the log.
func (w Witness) Compare(newest []byte, statements [][]byte) (Witnessed, error) {
	now, err := OpenCheckpoint(newest, w.Keys...)
	if errors.Is(err, ErrUnsigned) {
		return Witnessed{}, w.unsigned(newest)
	}
	if err != nil {
		return Witnessed{}, contradiction([][]byte{newest}, "%v", err)
	}
	known, err := readStatements(w.Kept, now.Origin, w.Keys)
	if err != nil {
		return Witnessed{}, err
	}
	done := Witnessed{Checkpoint: now}
	for _, statement := range statements {
		t, err := PeekTruncation(statement)
		if err != nil || t.Origin != now.Origin {
			continue
		}
		before := len(known.Signed)
		if err := known.Add(statement, w.Keys...); errors.Is(err, ErrTwoStatements) {
			return Witnessed{}, contradiction([][]byte{statement, newest}, "%v", err)
		} else if err == nil && len(known.Signed) > before {
			done.Stated = append(done.Stated, Statement{t, statement})
		}
	}
	var last Checkpoint         // the largest kept one that the log must still hold
	var signedBefore Statements // the largest epoch of a kept checkpoint, without statements
	err = eachOf(w.Kept, now.Origin, func(c Checkpoint, signed []byte) error {
		if c.Size >= last.Size && !known.Excuses(c) {
			last = c
		}
		signedBefore.See(c, signed, w.Keys...)
		done.Known = done.Known || c == now
		return nil
	})
	if err != nil {
		return Witnessed{}, err
	}
	if now.Epoch < signedBefore.Epoch {
		return Witnessed{}, contradiction([][]byte{newest},
			"it has gone back: its newest checkpoint was signed after %d statements of truncation, and one that was kept after %d", now.Epoch, signedBefore.Epoch)
	}
	for _, c := range mustHold(last, known.Live(), len(done.Stated) > 0) {
		what, err := w.continues(c, now)
		if err != nil {
			return Witnessed{}, err
		}
		if what == "" {
			continue
		}
		if missing := known.Missing(c); missing != "" {
			what += ". But " + missing
		}
		return Witnessed{}, contradiction([][]byte{newest}, "%s", what)
	}
	return done, nil
}

// mustHold returns the checkpoints that the log has to continue. Each kept checkpoint was
// proven to continue those before it, so the largest one stands for all. But a new statement
// may have brought the log back to before that one, so each size that a statement goes back to
// is then proven again.
func mustHold(last Checkpoint, live []Checkpoint, stated bool) []Checkpoint {
	if stated {
		return append([]Checkpoint{last}, live...)
	}
	for _, c := range live {
		if c.Size >= last.Size {
			last = c
		}
	}
	return []Checkpoint{last}
}

// continues returns what is wrong if the log of now does not continue the log of before.
func (w Witness) continues(before, now Checkpoint) (what string, err error) {
	switch {
	case now.Size < before.Size:
		return fmt.Sprintf("it has %d batches and had %d", now.Size, before.Size), nil
	case now.Size == before.Size && now.Root != before.Root:
		return fmt.Sprintf("at %d batches it has another root than before", now.Size), nil
	case now.Size == before.Size || before.Size == 0:
		return "", nil
	}
	list, err := w.Prove(before.Size, now.Size)
	if err != nil {
		return "", err
	}
	proof, ok := Hashes(list)
	if ok {
		ok = tlog.CheckTree(proof, now.Size, now.Root, before.Size, before.Root) == nil
	}
	if !ok {
		return fmt.Sprintf("the log of %d batches is not the beginning of the log of %d", before.Size, now.Size), nil
	}
	return "", nil
}

// unsigned judges a checkpoint that names none of the keys in its signatures. It is a
// contradiction if one of the keys signed a checkpoint that is kept.
func (w Witness) unsigned(newest []byte) error {
	before := false
	err := w.Kept(func(signed []byte) error {
		if !before {
			_, err := OpenCheckpoint(signed, w.Keys...)
			before = err == nil
		}
		return nil
	})
	switch {
	case err != nil:
		return err
	case before:
		return contradiction([][]byte{newest},
			"its newest checkpoint is not signed by a trusted key, and those before were; it is signed with %s", strings.Join(Signers(newest), ", "))
	}
	return ErrUnsigned
}

// Hashes converts the hashes of a proof. It reports false if one of them does not have 32
// bytes.
func Hashes(list [][]byte) (hashes []tlog.Hash, ok bool) {
	for _, h := range list {
		if len(h) != tlog.HashSize {
			return nil, false
		}
		hashes = append(hashes, tlog.Hash(h))
	}
	return hashes, true
}
