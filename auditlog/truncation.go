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

// Truncation is a statement that batches which were signed are lost: the log had reached
// the checkpoint From, and goes on from To, an earlier checkpoint. It is signed with the
// key of the log, and cannot be read as a checkpoint.
type Truncation struct {
	// Origin names the log.
	Origin string
	// Number counts the statements about the log, from 1. The checkpoints that are signed
	// after it have it as their epoch.
	Number int64
	// From is the newest checkpoint that was signed, To the one that the log goes on from.
	// Their origins are not written: they are those of the statement. Nor are their epochs:
	// that of From is Number-1, and that of To is Number.
	From, To Checkpoint
	// Time is when the statement was made, to the second.
	Time time.Time
	// Operator made it, and Reason says why: one line each, up to [MaxStated] bytes.
	Operator, Reason string
}

// MaxStated bounds the operator and the reason of a statement, in bytes, and MaxStatement
// the whole signed note.
const (
	MaxStated    = 500
	MaxStatement = 4096
)

const truncationFormat = "cedarpost-truncation-v1"

// Lost is how many signed batches are gone.
func (t Truncation) Lost() int64 { return t.From.Size - t.To.Size }

// text is the body of the note. Its second line is not a number, so that no reader of
// checkpoints takes it for one.
func (t Truncation) text() string {
	size := func(c Checkpoint) string {
		return strconv.FormatInt(c.Size, 10) + " " + base64.StdEncoding.EncodeToString(c.Root[:])
	}
	return fmt.Sprintf("%s\norigin %s\nnumber %d\nfrom %s\nto %s\ntime %s\noperator %s\nreason %s\n", truncationFormat, t.Origin, t.Number,
		size(t.From), size(t.To), t.Time.UTC().Format(time.RFC3339), t.Operator, t.Reason)
}

// check says what is wrong with a statement.
func (t Truncation) check() error {
	for _, f := range []struct{ name, value string }{{"operator", t.Operator}, {"reason", t.Reason}} {
		switch {
		case strings.TrimSpace(f.value) != f.value || f.value == "":
			return fmt.Errorf("%s: has to be given, without spaces around it", f.name)
		case len(f.value) > MaxStated:
			return fmt.Errorf("%s: longer than %d bytes", f.name, MaxStated)
		case !utf8.ValidString(f.value) || strings.ContainsFunc(f.value, func(r rune) bool { return !unicode.IsPrint(r) }):
			return fmt.Errorf("%s: has to be one line of printable text", f.name)
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

// IsTruncation says whether a note claims to be such a statement.
func IsTruncation(signed []byte) bool {
	return strings.HasPrefix(string(signed), truncationFormat+"\n")
}

// OpenTruncation reads a signed statement. One of the keys, which has the name of the
// log, must have signed it, or the error is [ErrUnsigned].
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
		err = ErrUnsigned // a key that is trusted for another log
	}
	return t, err
}

// PeekTruncation reads a statement without trusting it.
func PeekTruncation(signed []byte) (Truncation, error) {
	text, _, ok := strings.Cut(string(signed), "\n\n")
	if !ok || len(signed) > MaxStatement {
		return Truncation{}, errTruncation
	}
	return parseTruncation(text + "\n")
}

var errTruncation = errors.New("not a statement of truncation")

// parseTruncation reads the body: what text writes, and nothing else.
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

// Statements are what is known of the truncations of one log, in no order. They say which
// checkpoints the log need not hold any more, for whoever signs, verifies or watches it.
//
// A statement excuses only checkpoints of earlier epochs, that is, which were signed before
// it was made. So it does no harm if somebody shows it again after a later loss.
type Statements struct {
	// Signed are those that a given key signed, by number.
	Signed []Statement
	// Others are those that no given key signed. They excuse nothing.
	Others []Statement
	// Epoch is the largest epoch of a checkpoint, or number of a statement, that a given
	// key signed.
	Epoch int64
}

// ErrTwoStatements says that two different statements with one number are signed.
var ErrTwoStatements = errors.New("two different statements of truncation have the same number")

// Add adds a statement. One that is there already changes nothing.
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

// See takes notice of the epoch of a checkpoint, if a given key signed it.
func (s *Statements) See(c Checkpoint, signed []byte, keys ...note.Verifier) {
	if c.Epoch <= s.Epoch {
		return // changes nothing, so the signature need not be verified
	}
	keys = slices.DeleteFunc(slices.Clone(keys), func(k note.Verifier) bool { return k.Name() != c.Origin })
	if opened, err := OpenCheckpoint(signed, keys...); err == nil && opened == c {
		s.Epoch = c.Epoch
	}
}

// Excuses says whether a checkpoint need not hold any more: a signed statement of a later
// epoch goes back to a smaller size.
func (s *Statements) Excuses(c Checkpoint) bool { return excuses(s.Signed, c) >= 0 }

// Live are the checkpoints that the statements go back to, and that the log still must
// hold, by size.
func (s *Statements) Live() (live []Checkpoint) {
	for _, t := range s.Signed {
		if !s.Excuses(t.To) {
			live = append(live, t.To)
		}
	}
	slices.SortFunc(live, func(a, b Checkpoint) int { return cmp.Compare(a.Size, b.Size) })
	return live
}

// Missing says which verifier key is missing where only a statement that none of the given
// keys signed would excuse a checkpoint. It is empty if there is no such statement.
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
