package access

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/cedarpost/cedarpost/internal/keyfile"
	"github.com/cedarpost/cedarpost/store"
)

// BootstrapName is the caller that has the first key.
const BootstrapName = "bootstrap"

// RecoverName is the caller of the log in the changes of a recovery. It never has a key, so that the
// log tells a recovery from a call.
const RecoverName = "recover"

// RecoveredName is the caller that gets the key of a recovery, unless another one is asked for.
const RecoveredName = "recovered"

// IsReservedName reports whether a name, in any case of letters, is one that the service itself gives a
// caller, or its log a change. Only operators of all bundles may give keys and grants to callers of these
// names: another operator could prepare a caller that becomes an operator of all bundles.
func IsReservedName(name string) bool {
	return slices.ContainsFunc([]string{BootstrapName, RecoveredName, RecoverName}, func(reserved string) bool { return strings.EqualFold(name, reserved) })
}

// Recovery returns the change that makes a caller with a new key an operator of all bundles. It
// is an error if the caller is there already: somebody else could have one of its keys, or get one, and
// with it the same right.
func Recovery(now store.Access, caller string) (c store.AccessChange, secret string, err error) {
	if slices.ContainsFunc(now.Keys, func(k store.Key) bool { return k.Name == caller }) ||
		slices.ContainsFunc(now.Grants, func(g store.Grant) bool { return g.Caller == caller }) {
		return c, "", fmt.Errorf("caller %q has keys or grants already, and others may have its keys; give another name with --caller", caller)
	}
	key, secret := NewKey(caller, nil)
	return store.AccessChange{
		Put: []store.Grant{{Caller: caller, Role: Operator, Bundle: AllBundles, GrantedBy: RecoverName}},
		Add: []store.Key{key},
	}, secret, nil
}

// ErrKeyRevoked is the error of [BootstrapKey] for a file with a key that was revoked.
var ErrKeyRevoked = errors.New("the key in this file was revoked; remove the file, and leave --bootstrap-key-file out")

// errKeyElsewhere says that the database has a bootstrap key, and that the file has another one.
var errKeyElsewhere = errors.New("the database has a bootstrap key already, and this file does not hold it")

// BootstrapKey makes the first API key of a database, with all rights, and writes it to file
// with mode 0600. It never prints the key. made reports whether it stored a key.
//
//   - If the file has a live key, BootstrapKey does nothing.
//   - If the database has no key, it stores the key of the file, or a new one if there is none.
//   - If the key of the file was revoked, it returns [ErrKeyRevoked], or makes a new one in its place
//     if another is true.
//   - If the database has a key, but not that of the file, it does nothing if there is no
//     file, and returns an error if there is one. If another is true, it stores the key of the
//     file, or a new one, in both cases.
//
// Several servers may call it at once: it holds the lock of the revision.
func BootstrapKey(ctx context.Context, db *store.DB, file string, another bool) (made bool, err error) {
	_, err = db.ChangeAccess(ctx, BootstrapName, func(_ context.Context, now store.Access) (c store.AccessChange, err error) {
		token, stored, err := look(file, now)
		switch revoked := errors.Is(err, ErrKeyRevoked); {
		case another && revoked:
			token = "" // a new one replaces it
		case another && errors.Is(err, errKeyElsewhere):
		case err != nil:
			return c, err
		case stored, len(now.Keys) > 0 && !another:
			return c, nil
		}
		id := newKeyID()
		if token == "" {
			token = newSecret(id)
			if err := keyfile.Write(file, []byte(token+"\n")); err != nil {
				return c, err
			}
		}
		hash := sha256.Sum256([]byte(token))
		made = true
		return store.AccessChange{
			Put: AllGrants(BootstrapName, BootstrapName),
			Add: []store.Key{{ID: id, Name: BootstrapName, Hash: hash[:]}},
		}, nil
	})
	return made && err == nil, err
}

// CheckBootstrapKey returns the error of [BootstrapKey] for a file, and changes nothing. now are the
// keys of the database.
func CheckBootstrapKey(file string, now store.Access) error {
	_, _, err := look(file, now)
	return err
}

// look reads the key of a file, which is "" if there is none. stored is true if the database has it.
// The error is [ErrKeyRevoked], errKeyElsewhere, or that of the file.
func look(file string, now store.Access) (token string, stored bool, err error) {
	token, err = readKey(file)
	if err != nil || token == "" {
		return token, false, err
	}
	hash := sha256.Sum256([]byte(token))
	switch {
	case slices.ContainsFunc(now.Keys, func(k store.Key) bool { return slices.Equal(k.Hash, hash[:]) }):
		return token, true, nil
	case slices.ContainsFunc(now.Revoked, func(gone []byte) bool { return slices.Equal(gone, hash[:]) }):
		return token, false, fmt.Errorf("%s: %w", file, ErrKeyRevoked)
	case len(now.Keys) > 0:
		return token, false, fmt.Errorf("%s: %w", file, errKeyElsewhere)
	}
	return token, false, nil
}

// GrantToAll gives all roles to each caller with a key, if the database is from before there
// were grants, when each key could do everything. It reports to how many.
func GrantToAll(ctx context.Context, db *store.DB) (callers int, err error) {
	_, err = db.ChangeAccess(ctx, BootstrapName, func(_ context.Context, now store.Access) (c store.AccessChange, err error) {
		if now.Granted {
			return c, nil
		}
		names := map[string]bool{}
		for _, k := range now.Keys {
			if !names[k.Name] {
				names[k.Name] = true
				c.Put = append(c.Put, AllGrants(k.Name, BootstrapName)...)
			}
		}
		callers = len(names)
		return c, nil
	})
	return callers, err
}

// NewKey makes an API key of a caller. secret is the text that the caller sends; it is in no
// database.
func NewKey(caller string, expires *time.Time) (key store.Key, secret string) {
	id := newKeyID()
	secret = newSecret(id)
	hash := sha256.Sum256([]byte(secret))
	return store.Key{ID: id, Name: caller, Hash: hash[:], ExpiresAt: expires}, secret
}

// A key is cdp_<id>_<secret>_<checksum>: secret scanners find it by its beginning, the log and
// commands name it by its id, and the checksum tells a truncated one from a wrong one.
const (
	keyPrefix   = "cdp_"
	keyIDLength = 12
	secretBytes = 32
)

// newKeyID returns an id of lower-case letters and digits, of 60 random bits.
func newKeyID() string {
	b := make([]byte, keyIDLength)
	_, _ = rand.Read(b) // never fails
	for i := range b {
		b[i] = "abcdefghijklmnopqrstuvwxyz234567"[b[i]%32]
	}
	return string(b)
}

func newSecret(id string) string {
	b := make([]byte, secretBytes)
	_, _ = rand.Read(b) // never fails
	text := keyPrefix + id + "_" + hex.EncodeToString(b)
	return text + "_" + checksum(text)
}

func checksum(text string) string {
	return hex.EncodeToString(binary.BigEndian.AppendUint32(nil, crc32.ChecksumIEEE([]byte(text))))
}

// isTruncated reports whether a text has the form of a key, and not the checksum of one. Keys from
// before there was this form have no checksum.
func isTruncated(secret string) bool {
	if !strings.HasPrefix(secret, keyPrefix) {
		return false
	}
	i := strings.LastIndexByte(secret, '_')
	return checksum(secret[:max(i, 0)]) != secret[i+1:]
}

// KeyID returns the id in the text of a key, or "".
func KeyID(secret string) string {
	rest, ok := strings.CutPrefix(secret, keyPrefix)
	id, _, found := strings.Cut(rest, "_")
	if !ok || !found || len(id) != keyIDLength {
		return ""
	}
	return id
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
	if LooksLikeToken(token) {
		return "", fmt.Errorf("%s: a text with two dots is taken for an access token, so it cannot be a key", file)
	}
	return token, nil
}
