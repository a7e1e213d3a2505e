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

// Checkpoint commits to the whole log up to a size, as C2SP tlog-checkpoint has it.
type Checkpoint struct {
	// Origin names the log: the name of the key that signs first.
	Origin string
	// Size is the number of batches.
	Size int64
	Root tlog.Hash
	// Epoch is the number of the last statement of truncation that was made before the
	// checkpoint was signed; 0 if there is none.
	Epoch int64
}

// epochLine begins the extension line that has the epoch.
const epochLine = "truncations"

// text is the body of the note: three lines, and after a truncation one more.
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
		return nil, fmt.Errorf("a checkpoint after %d truncations cannot be", c.Epoch)
	}
	signers := make([]note.Signer, len(keys))
	for i, k := range keys {
		signers[i] = k.Signer
	}
	return note.Sign(&note.Note{Text: c.text()}, signers...)
}

// ErrUnsigned says that no signature on a checkpoint is by a key that is trusted.
var ErrUnsigned = errors.New("the checkpoint is not signed by a trusted key")

// OpenCheckpoint reads a signed checkpoint. At least one of the keys must have
// signed it, or the error is [ErrUnsigned].
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

// KeyID names a key as its verifier key does, with name and hash: "name+01234567".
func KeyID(key note.Verifier) string { return fmt.Sprintf("%s+%08x", key.Name(), key.KeyHash()) }

// Signers returns the keys that a note claims to be signed with, as [KeyID] names them. It
// verifies nothing.
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

// PeekCheckpoint reads a checkpoint without trusting it.
func PeekCheckpoint(signed []byte) (Checkpoint, error) {
	text, _, ok := strings.Cut(string(signed), "\n\n")
	if !ok {
		return Checkpoint{}, errCheckpoint
	}
	return parseCheckpoint(text + "\n")
}

var errCheckpoint = errors.New("not a checkpoint")

// parseCheckpoint reads the body. Lines after the third are extensions: the epoch, and
// others, which a reader has to ignore.
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

// parseNumber reads the number of a statement of truncation: 1 or more, in decimal.
func parseNumber(text string) (n int64, ok bool) {
	n, err := strconv.ParseInt(text, 10, 64)
	return n, err == nil && n > 0 && strconv.FormatInt(n, 10) == text
}

// Key signs checkpoints.
type Key struct {
	note.Signer
	// Verifier is the key to verify them with, as text.
	Verifier string
}

// ReadKey reads a private key as note.GenerateKey writes it. Its errors do not show
// it.
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
