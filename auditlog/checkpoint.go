package auditlog

import (
	"crypto/ed25519"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode"

	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/cedarpost/cedarpost/internal/keyfile"
)

// Checkpoint commits to the whole log up to a size. Its format is C2SP tlog-checkpoint.
type Checkpoint struct {
	// Origin is the name of the log: the name of the first key that signs.
	Origin string
	// Size is the number of batches.
	Size int64
	Root tlog.Hash
	// Epoch is the number of the last statement of truncation before the checkpoint was signed;
	// 0 if there is none.
	Epoch int64
}

// epochLine is the key of the extension line with the epoch.
const epochLine = "truncations"

// text returns the body of the note: three lines, and after a truncation a fourth one.
func (c Checkpoint) text() string {
	text := fmt.Sprintf("%s\n%d\n%s\n", c.Origin, c.Size, base64.StdEncoding.EncodeToString(c.Root[:]))
	if c.Epoch != 0 {
		text += fmt.Sprintf("%s %d\n", epochLine, c.Epoch)
	}
	return text
}

// Sign signs the checkpoint with each of the keys.
func (c Checkpoint) Sign(keys ...Key) ([]byte, error) {
	if c.Epoch < 0 {
		return nil, fmt.Errorf("a checkpoint cannot be signed after %d truncations", c.Epoch)
	}
	signers := make([]note.Signer, len(keys))
	for i, k := range keys {
		signers[i] = k.Signer
	}
	return note.Sign(&note.Note{Text: c.text()}, signers...)
}

// ErrUnsigned means that no trusted key signed a checkpoint.
var ErrUnsigned = errors.New("the checkpoint is not signed by a trusted key")

// OpenCheckpoint reads a signed checkpoint. If none of the keys signed it, the error is
// [ErrUnsigned].
func OpenCheckpoint(signed []byte, keys ...note.Verifier) (Checkpoint, error) {
	n, err := note.Open(signed, note.VerifierList(keys...))
	var unverified *note.UnverifiedNoteError
	switch {
	case errors.As(err, &unverified):
		return Checkpoint{}, ErrUnsigned
	case err != nil:
		return Checkpoint{}, fmt.Errorf("checkpoint: %w", err)
	}
	return parseCheckpoint(n.Text)
}

// KeyID returns the id of a key, which is the beginning of its verifier key: "name+01234567".
func KeyID(key note.Verifier) string { return fmt.Sprintf("%s+%08x", key.Name(), key.KeyHash()) }

// Signers returns the ids of the keys that a note names in its signatures, in the form of
// [KeyID]. It does not verify the signatures.
func Signers(signed []byte) (ids []string) {
	_, signatures, _ := strings.Cut(string(signed), "\n\n")
	for line := range strings.SplitSeq(signatures, "\n") {
		name, text, ok := strings.Cut(strings.TrimPrefix(line, "— "), " ")
		sig, err := base64.StdEncoding.DecodeString(text)
		if ok && err == nil && len(sig) > 4 && !strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsPrint(r) }) {
			ids = append(ids, fmt.Sprintf("%s+%08x", name, binary.BigEndian.Uint32(sig)))
		}
	}
	return ids
}

// PeekCheckpoint reads a checkpoint without verifying its signatures.
func PeekCheckpoint(signed []byte) (Checkpoint, error) {
	text, _, ok := strings.Cut(string(signed), "\n\n")
	if !ok {
		return Checkpoint{}, errCheckpoint
	}
	return parseCheckpoint(text + "\n")
}

var errCheckpoint = errors.New("not a checkpoint")

// parseCheckpoint reads the body. Lines after the third are extensions. One is the epoch, and the
// format requires readers to ignore unknown ones.
func parseCheckpoint(text string) (c Checkpoint, err error) {
	lines := strings.SplitN(text, "\n", 4)
	if len(lines) < 4 || lines[0] == "" {
		return c, errCheckpoint
	}
	c.Origin = lines[0]
	if c.Size, err = strconv.ParseInt(lines[1], 10, 64); err != nil || c.Size < 0 || strconv.FormatInt(c.Size, 10) != lines[1] {
		return c, errCheckpoint
	}
	if c.Root, err = tlog.ParseHash(lines[2]); err != nil {
		return c, errCheckpoint
	}
	for line := range strings.SplitSeq(lines[3], "\n") {
		name, number, _ := strings.Cut(line, " ")
		if name != epochLine {
			continue
		}
		epoch, ok := parseNumber(number)
		if !ok || c.Epoch != 0 {
			return c, fmt.Errorf("%w: its line %q is malformed", errCheckpoint, epochLine)
		}
		c.Epoch = epoch
	}
	return c, nil
}

// parseNumber reads the number of a statement of truncation: 1 or more, in canonical decimal.
func parseNumber(text string) (n int64, ok bool) {
	n, err := strconv.ParseInt(text, 10, 64)
	return n, err == nil && n > 0 && strconv.FormatInt(n, 10) == text
}

// Key signs checkpoints.
type Key struct {
	note.Signer
	// Verifier is the text of the verifier key.
	Verifier string
}

// ReadKey reads a file with a private key in the form of note.GenerateKey. Its errors do not show
// the key.
func ReadKey(file string) (Key, error) {
	text, err := keyfile.Read(file)
	if err != nil {
		return Key{}, err
	}
	secret := strings.TrimSpace(string(text))
	signer, err := note.NewSigner(secret)
	if err != nil {
		return Key{}, fmt.Errorf("%s: not a private key of the note format", file)
	}
	// PRIVATE+KEY+name+hash+data: the algorithm, and the seed of an Ed25519 key.
	parts := strings.SplitN(secret, "+", 5)
	seed, err := base64.StdEncoding.DecodeString(parts[len(parts)-1])
	if err != nil || len(seed) != 1+ed25519.SeedSize {
		return Key{}, fmt.Errorf("%s: not an Ed25519 key of the note format", file)
	}
	public := ed25519.NewKeyFromSeed(seed[1:]).Public().(ed25519.PublicKey)
	verifier, err := note.NewEd25519VerifierKey(signer.Name(), public)
	return Key{signer, verifier}, err
}
