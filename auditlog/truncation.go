package auditlog

import (
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
	// From is the newest checkpoint that was signed, To the one that the log goes on from.
	// Their origins are not written: they are those of the statement.
	From, To Checkpoint
	// Time is when the statement was made, to the second.
	Time time.Time
	// Operator made it, and Reason says why: one line each, up to [MaxStated] bytes.
	Operator, Reason string
}

// MaxStated bounds the operator and the reason of a statement.
const MaxStated = 500

const truncationFormat = "cedarpost-truncation-v1"

// Lost is how many signed batches are gone.
func (t Truncation) Lost() int64 { return t.From.Size - t.To.Size }

// text is the body of the note. Its second line is not a number, so that no reader of
// checkpoints takes it for one.
func (t Truncation) text() string {
	size := func(c Checkpoint) string {
		return strconv.FormatInt(c.Size, 10) + " " + base64.StdEncoding.EncodeToString(c.Root[:])
	}
	return fmt.Sprintf("%s\norigin %s\nfrom %s\nto %s\ntime %s\noperator %s\nreason %s\n", truncationFormat, t.Origin,
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
	return note.Sign(&note.Note{Text: t.text()}, signers...)
}

// IsTruncation says whether a note claims to be such a statement.
func IsTruncation(signed []byte) bool {
	return strings.HasPrefix(string(signed), truncationFormat+"\n")
}

// OpenTruncation reads a signed statement. One of the keys, which has the name of the
// log, must have signed it, or the error is [ErrUnsigned].
func OpenTruncation(signed []byte, keys ...note.Verifier) (Truncation, error) {
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
	if !ok {
		return Truncation{}, errTruncation
	}
	return parseTruncation(text + "\n")
}

var errTruncation = errors.New("not a statement of truncation")

// parseTruncation reads the body: what text writes, and nothing else.
func parseTruncation(text string) (t Truncation, err error) {
	lines := strings.Split(text, "\n")
	keys := []string{"origin", "from", "to", "time", "operator", "reason"}
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
	t = Truncation{Origin: values[0], Operator: values[4], Reason: values[5]}
	t.From, errs[0] = size(values[1])
	t.To, errs[1] = size(values[2])
	t.Time, errs[2] = time.Parse(time.RFC3339, values[3])
	if errors.Join(errs[:]...) != nil || t.check() != nil || t.text() != text {
		return Truncation{}, errTruncation
	}
	return t, nil
}

// follows returns an error if the statement cannot come after last, the newest checkpoint
// before it.
func (t Truncation) follows(last Checkpoint) error {
	if last.Size <= t.To.Size || last.Size > t.From.Size {
		return fmt.Errorf("it says that the log goes from %d batches back to %d, and the newest checkpoint before it is of %d", t.From.Size, t.To.Size, last.Size)
	}
	return t.about(last)
}

// about returns an error if the statement contradicts a checkpoint that came before it.
func (t Truncation) about(c Checkpoint) error {
	if (c.Size == t.From.Size && c != t.From) || (c.Size == t.To.Size && c != t.To) {
		return fmt.Errorf("it contradicts the checkpoint of %d batches before it", c.Size)
	}
	return nil
}

// A Kept is what a checkpoint file has of one log: its checkpoints, and the statements
// about those that are lost, in the order in which they were added.
type Kept struct {
	// Last is the newest checkpoint that the log must not contradict; the zero value if
	// there is none.
	Last Checkpoint
	// Live are all that the log must not contradict, in order of size. Lost are those that
	// the statements gave up, in the order of the statements.
	Live, Lost []Checkpoint
	// Truncations are the statements, and Statements their signed notes.
	Truncations []Truncation
	Statements  [][]byte

	lostBefore []int // by statement
}

// LostBefore is how many of Lost were lost before the statement with this index.
func (k *Kept) LostBefore(statement int) int { return k.lostBefore[statement] }

// Add adds a checkpoint.
func (k *Kept) Add(c Checkpoint) {
	i, found := slices.BinarySearchFunc(k.Live, c, func(a, b Checkpoint) int { return int(a.Size - b.Size) })
	if !found || k.Live[i] != c {
		k.Live = slices.Insert(k.Live, i, c)
	}
	k.Last = k.Live[len(k.Live)-1]
}

// Truncate applies a statement whose signature the caller has verified. The error says why
// it does not fit the checkpoints that are there: the newest one must be above To and not
// above From, and none may contradict either.
func (k *Kept) Truncate(t Truncation, signed []byte) error {
	for _, c := range append(k.Live[:len(k.Live):len(k.Live)], k.Last) {
		if err := t.about(c); err != nil {
			return err
		}
	}
	if err := t.follows(k.Last); err != nil {
		return err
	}
	i := slices.IndexFunc(k.Live, func(c Checkpoint) bool { return c.Size > t.To.Size })
	k.lostBefore = append(k.lostBefore, len(k.Lost))
	k.Lost = append(k.Lost, k.Live[i:]...)
	k.Live = k.Live[:i:i]
	k.Truncations, k.Statements = append(k.Truncations, t), append(k.Statements, signed)
	k.Add(t.To)
	return nil
}
