package access

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/google/uuid"

	"github.com/cedarpost/cedarpost/internal/keyfile"
	"github.com/cedarpost/cedarpost/store"
)

// keyPrefix lets secret scanners find keys that leaked.
const keyPrefix = "cedarpost_"

// bootstrapName is the name of the caller that has the first key.
const bootstrapName = "bootstrap"

// errKeyElsewhere says that the database has a bootstrap key, and that the file has another one.
var errKeyElsewhere = errors.New("the database has a bootstrap key already, and this file does not hold it")

// BootstrapKey makes the first API key of a database, with all rights, and writes it to file
// with mode 0600. It never prints the key. made reports whether it stored a key.
//
//   - If the file has a live key, BootstrapKey does nothing.
//   - If the database has no key, it stores the key of the file, or a new one if there is none.
//   - If the database has a key, but not that of the file, it does nothing if there is no
//     file, and returns an error if there is one. If another is true, it stores the key of the
//     file, or a new one, in both cases.
//
// Several servers may call it at once: it holds the migration lock.
func BootstrapKey(ctx context.Context, db *store.DB, file string, another bool) (made bool, err error) {
	err = db.Bootstrap(ctx, func(_ context.Context, live []store.Key) (*store.Key, error) {
		token, err := readKey(file)
		if err != nil {
			return nil, err
		}
		hash := sha256.Sum256([]byte(token))
		if token != "" && slices.ContainsFunc(live, func(k store.Key) bool { return slices.Equal(k.Hash, hash[:]) }) {
			return nil, nil
		}
		if len(live) > 0 && !another {
			if token != "" {
				return nil, fmt.Errorf("%s: %w", file, errKeyElsewhere)
			}
			return nil, nil
		}
		if token == "" {
			if token, err = writeNewKey(file); err != nil {
				return nil, err
			}
			hash = sha256.Sum256([]byte(token))
		}
		made = true
		return &store.Key{ID: uuid.NewString(), Name: bootstrapName, Hash: hash[:]}, nil
	})
	return made && err == nil, err
}

// readKey reads a key from a file. It returns "" if the file does not exist or is empty.
func readKey(file string) (string, error) {
	b, err := keyfile.Read(file)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	token := strings.TrimSpace(string(b))
	if token != "" && len(token) < 32 {
		return "", fmt.Errorf("%s: a key has at least 32 characters", file)
	}
	return token, nil
}

// writeNewKey makes a key and writes it to a file.
func writeNewKey(file string) (string, error) {
	secret := make([]byte, 32)
	if _, err := rand.Read(secret); err != nil {
		return "", err
	}
	token := keyPrefix + base64.RawURLEncoding.EncodeToString(secret)
	return token, keyfile.Write(file, []byte(token+"\n"))
}
