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
	"sync/atomic"

	"github.com/cedarpost/cedarpost/internal/keyfile"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/server/entityfile"
	"github.com/cedarpost/cedarpost/server/stored"
)

// MaskKeyBytes is the length of a mask key, in bytes.
const MaskKeyBytes = sha256.Size

// masker makes the hashes that replace, in records, values that the schema marks @sensitive.
// A hash is an HMAC: without the key, nobody can compute the value or test a guess of it. A
// server with the key finds the records that have a given value.
type masker struct{ key atomic.Pointer[string] }

// newMasker makes a masker with a key. If there is none, it makes a key that only this
// process has.
func newMasker(given secret.Secret, log *slog.Logger) (*masker, error) {
	key := given.Reveal()
	if key == "" {
		log.Warn("no mask key: values masked in decision records can be searched for on this server only, and until it stops")
		made := make([]byte, MaskKeyBytes)
		if _, err := rand.Read(made); err != nil {
			return nil, err
		}
		key = string(made)
	}
	m := &masker{}
	return m, m.use(key)
}

// use sets the key.
func (m *masker) use(key string) error {
	if len(key) != MaskKeyBytes {
		return fmt.Errorf("mask key: %d bytes, want %d", len(key), MaskKeyBytes)
	}
	m.key.Store(&key)
	return nil
}

// RereadMaskKey takes up the key that a live [Config.MaskKey] has now. Values that were recorded
// before cannot be found with the new key.
func (r *Recorder) RereadMaskKey() error {
	key := r.cfg.MaskKey.Reveal()
	if key == "" || key == *r.mask.key.Load() {
		return nil
	}
	if err := r.mask.use(key); err != nil {
		return err
	}
	r.cfg.Log.Info("new mask key taken up: values recorded from here on have other hashes")
	return nil
}

// hash returns the HMAC-SHA-256 of the canonical JSON of a value as engine.Plain returns
// it. Equal values have equal hashes.
func (m *masker) hash(value any) []byte {
	text, err := stored.CanonicalJSON(value)
	if err != nil {
		panic(err) // values of JSON and of Cedar can always be written as JSON
	}
	h := hmac.New(sha256.New, []byte(*m.key.Load()))
	h.Write(text)
	return h.Sum(nil)
}

// maskedHash returns the hash of a value that somebody searches for. text is the value as
// JSON, or a string without quotes. JSON with a name twice is an error.
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

// ReadMaskKey reads a mask key from a file. The file must have one line with 32 bytes in
// hexadecimal or base64. If other users of the machine may use the file, it is an error.
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

// decodeMaskKey returns nil if text is not a mask key. At most one of the encodings fits: 32
// bytes are 64 digits in hexadecimal and at most 44 characters in base64.
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

// MakeMaskKey makes a new mask key and writes it to a file with mode 0600. If the file
// exists, it does nothing.
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
