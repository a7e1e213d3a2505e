package decisionlog

import (
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strings"

	"github.com/cedarpost/cedarpost/internal/keyfile"
	"github.com/cedarpost/cedarpost/server/entityfile"
	"github.com/cedarpost/cedarpost/server/stored"
)

// MaskKeyBytes is the length of a mask key.
const MaskKeyBytes = sha256.Size

// masker makes what stands in records for values that the schema marks
// @sensitive: their HMAC. Whoever has the log alone can neither read such a value
// nor try out what it could be; whoever asks a server that has the key can find
// the records that hold one they know.
type masker struct{ key []byte }

// newMasker takes the key, or makes one up that ends with the process.
func newMasker(key []byte, log *slog.Logger) (*masker, error) {
	switch len(key) {
	case MaskKeyBytes:
		return &masker{key}, nil
	case 0:
		log.Warn("no mask key: values masked in decision records can be searched for on this server only, and until it stops")
		key = make([]byte, MaskKeyBytes)
		_, err := rand.Read(key)
		return &masker{key}, err
	}
	return nil, fmt.Errorf("mask key: %d bytes, want %d", len(key), MaskKeyBytes)
}

// hash is the HMAC-SHA-256 of a value's JSON, of a value as engine.Plain has it:
// equal values have equal hashes.
func (m *masker) hash(value any) []byte {
	text, err := stored.CanonicalJSON(value)
	if err != nil {
		panic(err) // what came out of JSON, or of Cedar, goes into JSON
	}
	h := hmac.New(sha256.New, m.key)
	h.Write(text)
	return h.Sum(nil)
}

// maskedHash is the hash of a value that somebody looks for, as JSON text. What is
// not JSON is taken for a string, so that one can be given without quotes.
func (m *masker) maskedHash(text string) ([]byte, error) {
	v, err := entityfile.DecodeJSON([]byte(text))
	if errors.Is(err, entityfile.ErrTwice) {
		return nil, err
	}
	if err == nil {
		v, err = entityfile.Exact(v)
	}
	if err != nil {
		v = text
	}
	return m.hash(v), nil
}

// ReadMaskKey reads a mask key: one line, 32 bytes in hexadecimal or base64.
func ReadMaskKey(file string) ([]byte, error) {
	text, err := keyfile.Read(file)
	if err != nil {
		return nil, fmt.Errorf("mask key: %w", err)
	}
	key := decodeMaskKey(strings.TrimSpace(string(text)))
	if key == nil {
		return nil, fmt.Errorf("mask key: %s does not hold %d bytes as one line of hexadecimal or base64", file, MaskKeyBytes)
	}
	return key, nil
}

// decodeMaskKey is nil for what is no key. No text is one in both ways.
func decodeMaskKey(text string) []byte {
	for _, decode := range []func(string) ([]byte, error){
		hex.DecodeString, base64.StdEncoding.DecodeString, base64.RawStdEncoding.DecodeString,
		base64.URLEncoding.DecodeString, base64.RawURLEncoding.DecodeString,
	} {
		if key, err := decode(text); err == nil && len(key) == MaskKeyBytes && !strings.ContainsAny(text, "\r\n") {
			return key
		}
	}
	return nil
}

// MakeMaskKey writes a new mask key to a file, with mode 0600, if there is none.
func MakeMaskKey(file string) error {
	if _, err := os.Stat(file); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	key := make([]byte, MaskKeyBytes)
	if _, err := rand.Read(key); err != nil {
		return err
	}
	return keyfile.Write(file, []byte(hex.EncodeToString(key)+"\n"))
}
