package auditlog

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// Truncation is a statement that signed batches are lost: the log had reached the checkpoint From,
// and continues from To, an earlier one. It is signed with the key of the log, and no reader can
// take it for a checkpoint.
type Truncation struct {
	// Origin is the name of the log.
	Origin string
	// Number numbers the statements about the log, from 1. Checkpoints that are signed after
	// the statement have the number as their epoch.
	Number int64
	// From is the newest checkpoint that was signed, and To is the one that the log continues
	// from. Origins and epochs of both are not written, because they follow from the statement:
	// the epoch of From is Number-1, and that of To is Number.
	From, To Checkpoint
	// Time is when the statement was made, to the second.
	Time time.Time
	// Operator made the statement, and Reason says why the batches are lost. Each is one line
	// of up to [MaxStated] bytes.
	Operator, Reason string
}

// MaxStated bounds the operator and the reason of a statement, each in bytes. MaxStatement bounds
// the signed note.
const (
	MaxStated    = 500
	MaxStatement = 4096
)

const truncationFormat = "cedarpost-truncation-v1"

// Lost returns how many signed batches are lost.
func (t Truncation) Lost() int64 { return t.From.Size - t.To.Size }

// text returns the body of the note. Its second line is not a number, so that no reader takes the
// statement for a checkpoint.
func (t Truncation) text() string {
	size := func(c Checkpoint) string {
		return strconv.FormatInt(c.Size, 10) + " " + base64.StdEncoding.EncodeToString(c.Root[:])
	}
	return fmt.Sprintf("%s\norigin %s\nnumber %d\nfrom %s\nto %s\ntime %s\noperator %s\nreason %s\n", truncationFormat, t.Origin, t.Number,
		size(t.From), size(t.To), t.Time.UTC().Format(time.RFC3339), t.Operator, t.Reason)
}

// check returns what is wrong with a statement.
func (t Truncation) check() error {
	for _, f := range []struct{ name, value string }{{"operator", t.Operator}, {"reason", t.Reason}} {
		switch {
		case strings.TrimSpace(f.value) != f.value || f.value == "":
			return fmt.Errorf("%s: must not be empty, or have spaces around it", f.name)
		case len(f.value) > MaxStated:
			return fmt.Errorf("%s: longer than %d bytes", f.name, MaxStated)
		case !utf8.ValidString(f.value) || strings.ContainsFunc(f.value, func(r rune) bool { return !unicode.IsPrint(r) }):
			return fmt.Errorf("%s: must be one line of printable text", f.name)
		}
	}
	if t.To.Size <= 0 || t.From.Size <= t.To.Size || t.From.Size == math.MaxInt64 {
		return fmt.Errorf("from %d to %d batches is no truncation", t.From.Size, t.To.Size)
	}
	if t.Origin == "" || t.From.Origin != t.Origin || t.To.Origin != t.Origin || strings.ContainsFunc(t.Origin, func(r rune) bool { return unicode.IsSpace(r) || r == '+' }) {
		return errors.New("the checkpoints are of another log")
	}
	if t.Number <= 0 || t.From.Epoch != t.Number-1 || t.To.Epoch != t.Number {
		return fmt.Errorf("statement %d cannot go from a checkpoint after %d statements to one after %d", t.Number, t.From.Epoch, t.To.Epoch)
	}
	return nil
}

// Sign signs the statement with each of the keys.
func (t Truncation) Sign(keys ...Key) ([]byte, error) {
	if err := t.check(); err != nil {
		return nil, err
	}
	signers := make([]note.Signer, len(keys))
	for i, k := range keys {
		signers[i] = k.Signer
	}
	signed, err := note.Sign(&note.Note{Text: t.text()}, signers...)
	if err == nil && len(signed) > MaxStatement {
		err = fmt.Errorf("the statement has %d bytes, and at most %d are read: sign with fewer keys", len(signed), MaxStatement)
	}
	return signed, err
}

// IsTruncation reports whether a note has the form of a statement of truncation.
func IsTruncation(signed []byte) bool {
	return strings.HasPrefix(string(signed), truncationFormat+"\n")
}

// OpenTruncation reads a signed statement. If none of the keys with the name of the log signed it,
// the error is [ErrUnsigned].
func OpenTruncation(signed []byte, keys ...note.Verifier) (Truncation, error) {
	if len(signed) > MaxStatement {
		return Truncation{}, errTruncation
	}
	n, err := note.Open(signed, note.VerifierList(keys...))
	var unverified *note.UnverifiedNoteError
	switch {
	case errors.As(err, &unverified):
		return Truncation{}, ErrUnsigned
	case err != nil:
		return Truncation{}, fmt.Errorf("statement of truncation: %w", err)
	}
	t, err := parseTruncation(n.Text)
	if err == nil && !slices.ContainsFunc(n.Sigs, func(s note.Signature) bool { return s.Name == t.Origin }) {
		err = ErrUnsigned // the key is trusted for another log
	}
	return t, err
}

// PeekTruncation reads a statement without verifying its signatures.
func PeekTruncation(signed []byte) (Truncation, error) {
	text, _, ok := strings.Cut(string(signed), "\n\n")
	if !ok || len(signed) > MaxStatement {
		return Truncation{}, errTruncation
	}
	return parseTruncation(text + "\n")
}

var errTruncation = errors.New("not a statement of truncation")

// parseTruncation reads the body. It accepts only what text writes.
func parseTruncation(text string) (t Truncation, err error) {
	lines := strings.Split(text, "\n")
	keys := []string{"origin", "number", "from", "to", "time", "operator", "reason"}
	if len(lines) != len(keys)+2 || lines[0] != truncationFormat {
		return Truncation{}, errTruncation
	}
	values := make([]string, len(keys))
	for i, key := range keys {
		var ok bool
		if values[i], ok = strings.CutPrefix(lines[i+1], key+" "); !ok {
			return Truncation{}, errTruncation
		}
	}
	var errs [3]error
	size := func(text string) (c Checkpoint, err error) {
		n, root, _ := strings.Cut(text, " ")
		c.Origin = values[0]
		if c.Size, err = strconv.ParseInt(n, 10, 64); err == nil {
			c.Root, err = tlog.ParseHash(root)
		}
		return c, err
	}
	t = Truncation{Origin: values[0], Operator: values[5], Reason: values[6]}
	t.Number, _ = parseNumber(values[1])
	t.From, errs[0] = size(values[2])
	t.To, errs[1] = size(values[3])
	t.From.Epoch, t.To.Epoch = t.Number-1, t.Number
	t.Time, errs[2] = time.Parse(time.RFC3339, values[4])
	if errors.Join(errs[:]...) != nil || t.check() != nil || t.text() != text {
		return Truncation{}, errTruncation
	}
	return t, nil
}

// A Statement is a statement of truncation with its signed note.
type Statement struct {
	Truncation
	Note []byte
}

// Statements are the known truncations of one log. They tell signers, verifiers and witnesses
// which checkpoints the log need not match any more.
//
// A statement excuses only checkpoints of earlier epochs, which were signed before it was made.
// An old statement therefore cannot excuse a later loss.
type Statements struct {
	// Signed are the statements that a given key signed, by number.
	Signed []Statement
	// Others are the statements that no given key signed. They excuse nothing.
	Others []Statement
	// Epoch is the largest epoch of a checkpoint, or number of a statement, among those that a
	// given key signed.
	Epoch int64
}

// ErrTwoStatements means that two different statements with the same number are signed.
var ErrTwoStatements = errors.New("two different statements of truncation have the same number")

// Add adds a statement, unless it is there already.
func (s *Statements) Add(signed []byte, keys ...note.Verifier) error {
	t, err := OpenTruncation(signed, keys...)
	if errors.Is(err, ErrUnsigned) || len(keys) == 0 {
		if t, err = PeekTruncation(signed); err == nil && !slices.ContainsFunc(s.Others, func(o Statement) bool { return bytes.Equal(o.Note, signed) }) {
			s.Others = append(s.Others, Statement{t, bytes.Clone(signed)})
		}
		return err
	}
	if err != nil {
		return err
	}
	i, found := slices.BinarySearchFunc(s.Signed, t.Number, func(o Statement, n int64) int { return cmp.Compare(o.Number, n) })
	if found {
		if s.Signed[i].Truncation != t {
			return fmt.Errorf("%w: number %d", ErrTwoStatements, t.Number)
		}
		return nil
	}
	s.Signed = slices.Insert(s.Signed, i, Statement{t, bytes.Clone(signed)})
	s.Epoch = max(s.Epoch, t.Number)
	return nil
}

// See raises Epoch to the epoch of a checkpoint, if a given key signed it.
func (s *Statements) See(c Checkpoint, signed []byte, keys ...note.Verifier) {
	if c.Epoch <= s.Epoch {
		return // it changes nothing, so the signature is not verified
	}
	keys = slices.DeleteFunc(slices.Clone(keys), func(k note.Verifier) bool { return k.Name() != c.Origin })
	if opened, err := OpenCheckpoint(signed, keys...); err == nil && opened == c {
		s.Epoch = c.Epoch
	}
}

// Excuses reports whether the log need not match a checkpoint any more, because a signed statement
// of a later epoch goes back to a smaller size.
func (s *Statements) Excuses(c Checkpoint) bool { return excuses(s.Signed, c) >= 0 }

// Live returns the checkpoints to which statements go back and that the log must still match, by
// size.
func (s *Statements) Live() (live []Checkpoint) {
	for _, t := range s.Signed {
		if !s.Excuses(t.To) {
			live = append(live, t.To)
		}
	}
	slices.SortFunc(live, func(a, b Checkpoint) int { return cmp.Compare(a.Size, b.Size) })
	return live
}

// Missing names the verifier key that is missing, if a statement that none of the given keys signed
// would excuse a checkpoint. It is empty if there is no such statement.
func (s *Statements) Missing(c Checkpoint) string {
	i := excuses(s.Others, c)
	if i < 0 {
		return ""
	}
	return fmt.Sprintf("statement of truncation %d would excuse it, and is signed with %s: if that is a key of this log, its verifier key is missing",
		s.Others[i].Number, strings.Join(Signers(s.Others[i].Note), " and "))
}

func excuses(list []Statement, c Checkpoint) int {
	return slices.IndexFunc(list, func(t Statement) bool {
		return t.Origin == c.Origin && t.Number > c.Epoch && t.To.Size < c.Size
	})
}
