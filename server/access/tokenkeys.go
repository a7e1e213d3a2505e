package access

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rsa"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/cedarpost/cedarpost/sdk/go/egress"
)

const (
	// fetchInterval is the least time between two fetches of one issuer's keys, whatever tokens come.
	fetchInterval = 30 * time.Second
	// refreshAge is the age after which keys are fetched again while they are used, so that a key
	// that the issuer withdraws is not used for much longer.
	refreshAge = 5 * time.Minute
	// maxKeyAge is the age after which keys are no longer used, if the issuer is away.
	maxKeyAge = time.Hour
	// fetchTimeout bounds each of the two requests of a fetch.
	fetchTimeout = 5 * time.Second
	// maxWaiting is how many calls of an issuer may wait for a fetch. Only calls wait whose tokens
	// no known key has signed.
	maxWaiting = 100

	maxKeysBytes     = 256 << 10
	maxKeys          = 100
	maxMetadataBytes = 64 << 10
	// maxTries is how many keys are tried for one token: several keys can have one id, or the token
	// has none.
	maxTries = 4

	minRSABits = 2048
	maxRSABits = 8192 // verifying takes time that grows with the size
)

// A verificationKey is a public key of an issuer.
type verificationKey struct {
	id, algorithm string // as the issuer says; they can be empty
	key           crypto.PublicKey
	thumbprint    string
}

// fits reports whether the key can be for a token with this header. Which algorithms a key is for
// depends on the key, never on the token alone (RFC 8725, section 3.1).
func (k *verificationKey) fits(id, algorithm string) bool {
	if id != "" && k.id != id || k.algorithm != "" && k.algorithm != algorithm {
		return false
	}
	switch key := k.key.(type) {
	case *rsa.PublicKey:
		return strings.HasPrefix(algorithm, "RS") || strings.HasPrefix(algorithm, "PS")
	case *ecdsa.PublicKey:
		return algorithm == map[int]string{256: "ES256", 384: "ES384", 521: "ES512"}[key.Curve.Params().BitSize]
	case ed25519.PublicKey:
		return algorithm == string(jose.EdDSA)
	}
	return false
}

// A keySet are the keys that an issuer published at a time. It does not change.
type keySet struct {
	keys    []*verificationKey
	fetched time.Time // when the fetch began
}

// verify returns the key that signed a token, or nil.
func (s *keySet) verify(token *jose.JSONWebSignature, id, algorithm string) *verificationKey {
	if s == nil {
		return nil
	}
	tries := 0
	for _, k := range s.keys {
		if !k.fits(id, algorithm) {
			continue
		}
		if tries++; tries > maxTries {
			return nil
		}
		if _, err := token.Verify(k.key); err == nil {
			return k
		}
	}
	return nil
}

// issuerKeys fetches and keeps the keys of one issuer.
type issuerKeys struct {
	issuer *Issuer
	client *egress.Client
	log    *slog.Logger
	ctx    context.Context // ends when no more keys are needed
	ended  *sync.WaitGroup // waits for the fetches

	mu       sync.Mutex
	set      *keySet       // the last good one; nil before the first
	began    time.Time     // when the last fetch began
	fetching chan struct{} // closed when the fetch that runs now ends; nil if none runs
	waiting  int           // calls that wait for it
}

// current returns the keys, or nil if there are none that are young enough. It never waits. If the
// keys have some age, it starts a fetch.
func (i *issuerKeys) current(now time.Time) *keySet {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.set == nil {
		return nil
	}
	age := now.Sub(i.set.fetched)
	if age > refreshAge {
		i.start(now)
	}
	if age > maxKeyAge {
		return nil
	}
	return i.set
}

// newer returns keys that were fetched after those of a set, which can be nil. It waits for a fetch,
// if one runs or may be started. It returns nil if there are none.
func (i *issuerKeys) newer(ctx context.Context, than *keySet, now time.Time) *keySet {
	i.mu.Lock()
	if i.set != than && i.set != nil && now.Sub(i.set.fetched) <= maxKeyAge {
		defer i.mu.Unlock()
		return i.set
	}
	i.start(now)
	done := i.fetching
	if done == nil || i.waiting >= maxWaiting {
		i.mu.Unlock()
		return nil
	}
	i.waiting++
	i.mu.Unlock()
	select {
	case <-done:
	case <-ctx.Done():
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.waiting--
	if i.set == than || i.set == nil || now.Sub(i.set.fetched) > maxKeyAge {
		return nil
	}
	return i.set
}

// start starts a fetch if none runs and the last one began long enough ago. Call it with mu held.
func (i *issuerKeys) start(now time.Time) {
	if i.fetching != nil || !i.began.IsZero() && now.Sub(i.began) < fetchInterval || i.ctx.Err() != nil {
		return
	}
	i.began = now
	done := make(chan struct{})
	i.fetching = done
	i.ended.Go(func() {
		keys, err := i.fetch()
		i.mu.Lock()
		defer i.mu.Unlock()
		i.fetching = nil
		close(done)
		if err != nil {
			if i.ctx.Err() == nil {
				i.log.Warn("the keys of an issuer of tokens were not fetched; its last ones are used for an hour", "issuer", i.issuer.Name, "err", err)
			}
			return
		}
		// A key that stays keeps its identity, and with it the tokens that it verified.
		for n, k := range keys {
			if at := slices.IndexFunc(i.set.all(), func(old *verificationKey) bool {
				return old.id == k.id && old.algorithm == k.algorithm && old.thumbprint == k.thumbprint
			}); at >= 0 {
				keys[n] = i.set.keys[at]
			}
		}
		i.set = &keySet{keys, now}
	})
}

func (s *keySet) all() []*verificationKey {
	if s == nil {
		return nil
	}
	return s.keys
}

// has reports whether a key is still in use.
func (s *keySet) has(k *verificationKey) bool { return slices.Contains(s.all(), k) }

// fetch gets the keys from the issuer.
func (i *issuerKeys) fetch() ([]*verificationKey, error) {
	keysURL := i.issuer.KeysURL
	if keysURL == "" {
		// OpenID Connect Discovery 1.0, sections 4.1 and 4.3.
		metadata, err := egress.GetJSON[struct {
			Issuer  string `json:"issuer"`
			KeysURL string `json:"jwks_uri"`
		}](i.ctx, i.client, strings.TrimSuffix(i.issuer.URL, "/")+"/.well-known/openid-configuration", egress.JSONLimits{MaxBytes: maxMetadataBytes})
		if err != nil {
			return nil, fmt.Errorf("metadata: %w", err)
		}
		if metadata.Issuer != i.issuer.URL {
			return nil, fmt.Errorf("metadata: they are of the issuer %.200q", metadata.Issuer)
		}
		if _, err := keyURL(metadata.KeysURL); err != nil {
			return nil, fmt.Errorf("metadata: jwks_uri: %w", err)
		}
		keysURL = metadata.KeysURL
	}
	set, err := egress.GetJSON[struct {
		Keys []jsontext.Value `json:"keys"`
	}](i.ctx, i.client, keysURL, egress.JSONLimits{MaxBytes: maxKeysBytes})
	if err != nil {
		return nil, fmt.Errorf("key set: %w", err)
	}
	return readKeys(set.Keys)
}

// readKeys returns the public keys that can verify signatures. It ignores all others, as RFC 7517,
// section 5, asks: one key that is not understood must not turn the others off.
func readKeys(texts []jsontext.Value) ([]*verificationKey, error) {
	if len(texts) > maxKeys {
		return nil, fmt.Errorf("key set: more than %d keys", maxKeys)
	}
	var keys []*verificationKey
	for _, text := range texts {
		var k jose.JSONWebKey
		if k.UnmarshalJSON(text) != nil || !k.Valid() || k.Use != "" && k.Use != "sig" || len(k.KeyID) > maxKeyID {
			continue
		}
		if key, ok := k.Key.(*rsa.PublicKey); ok && (key.N.BitLen() < minRSABits || key.N.BitLen() > maxRSABits) {
			continue
		}
		thumbprint, err := k.Thumbprint(crypto.SHA256)
		if err != nil {
			continue
		}
		v := &verificationKey{id: k.KeyID, algorithm: k.Algorithm, key: k.Key, thumbprint: string(thumbprint)}
		if slices.ContainsFunc(allAlgorithms, func(a string) bool { return v.fits(v.id, a) }) {
			keys = append(keys, v)
		}
	}
	if len(keys) == 0 {
		return nil, errors.New("key set: no public key for signatures that is of a known kind, and long enough")
	}
	return keys, nil
}
