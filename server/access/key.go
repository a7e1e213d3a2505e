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

// keyPrefix lets secret scanners find a key that leaked.
const keyPrefix = "cedarpost_"

// bootstrapName is the caller that the first key stands for.
const bootstrapName = "bootstrap"

// ErrKeyElsewhere says that a first key was made before, and that the file does not
// hold one that the database knows.
var ErrKeyElsewhere = errors.New("the database has a bootstrap key already, and this file does not hold it")

// BootstrapKey makes the first API key, with all rights, once for a database,
// and writes it to file with mode 0600. It never prints it. When file holds a
// live key already, that one is kept; when file holds a key and the database has
// none, that key is taken in. When the database has a key and there is no file,
// nothing is made and made is false, unless another is asked for.
//
// Several servers may call it at once: it runs under the migration lock.
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
				return nil, fmt.Errorf("%s: %w", file, ErrKeyElsewhere)
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

// readKey reads a key from a file, "" if there is none.
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

// writeNewKey makes a key and writes it.
func writeNewKey(file string) (string, error) {
	secret := make([]byte, 32)
	if _, err := rand.Read(secret); err != nil {
		return "", err
	}
	token := keyPrefix + base64.RawURLEncoding.EncodeToString(secret)
	return token, keyfile.Write(file, []byte(token+"\n"))
}
