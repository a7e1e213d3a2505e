package access

import (
	"crypto/sha256"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/store"
)

// keysOf are live keys, by the key itself.
type keysOf map[string]string

func (k keysOf) Key(hash [sha256.Size]byte) (store.Key, bool) {
	for key, name := range k {
		if sha256.Sum256([]byte(key)) == hash {
			return store.Key{ID: "id", Name: name, ExpiresAt: ends[name]}, true
		}
	}
	return store.Key{}, false
}

func (k keysOf) HasKey(name, id string, now time.Time) bool {
	for _, n := range k {
		if n == name && id == "id" && (store.Key{ExpiresAt: ends[name]}).Live(now) {
			return true
		}
	}
	return false
}

// now is when the tests call, and ends is when the keys of some callers end.
var (
	now  = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	past = now.Add(-time.Second)
	soon = now.Add(time.Second)
	ends = map[string]*time.Time{"old": &past, "young": &soon, "now": &now}
)

// A call needs exactly one header with the bearer scheme and a live key.
func TestAuthenticate(t *testing.T) {
	_, fresh := NewKey("fresh", nil)
	gone, expired := NewKey("old", &past)
	keys := keysOf{"secret-key": "orders", "old-key": "old", "now-key": "now", "young-key": "young", fresh: "fresh", expired: "old"}
	stale := errors.New("keys are too old")
	for _, c := range []struct {
		headers []string
		name    string
		reason  string
	}{
		{nil, "", "no credentials"},
		{[]string{""}, "", "unknown key"},
		{[]string{"Bearer secret-key"}, "orders", ""},
		{[]string{"bearer  secret-key "}, "orders", ""},
		{[]string{"Bearer secret-key", "Bearer secret-key"}, "", "unknown key"},
		{[]string{"Basic secret-key"}, "", "unknown key"},
		{[]string{"secret-key"}, "", "unknown key"},
		{[]string{"Bearer secret-keys"}, "", "unknown key"},
		{[]string{"Bearer"}, "", "unknown key"},
		{[]string{"Bearer  secret-key "}, "orders", ""},
		{[]string{"Bearer \u00a0secret-key"}, "", "unknown key"},
		{[]string{"Bearer old-key"}, "", "expired key"},
		{[]string{"Bearer now-key"}, "", "expired key"},
		{[]string{"Bearer " + expired}, "", "expired key"},
		{[]string{"Bearer " + newSecret(gone.ID)}, "", "unknown key"}, // another secret with the id of the expired key
		{[]string{"Bearer young-key"}, "young", ""},
		{[]string{"Bearer " + fresh}, "fresh", ""},
		{[]string{"Bearer " + fresh[:len(fresh)-1]}, "", "truncated key"},
		{[]string{"Bearer cdp_"}, "", "truncated key"},
		{[]string{"Bearer a.b.c"}, "", "no issuers"},
	} {
		caller, err := Authenticate(t.Context(), http.Header{"Authorization": c.headers}, nil, Credentials{Keys: func() (Keys, error) { return keys, nil }}, now)
		var unknown *UnauthenticatedError
		switch {
		case c.name != "" && (err != nil || caller.Name != c.name || caller.Kind != APIKey || caller.KeyID == ""):
			t.Errorf("%q: %+v, %v", c.headers, caller, err)
		case c.name == "" && (!errors.As(err, &unknown) || unknown.Reason != c.reason || caller != Caller{}):
			t.Errorf("%q: %+v, %v, want %q", c.headers, caller, err, c.reason)
		case c.name == "" && strings.HasPrefix(err.Error(), "the API key has expired") != (c.reason == "expired key"),
			c.name == "" && strings.HasPrefix(err.Error(), "missing or unknown API key") == (c.reason == "expired key"):
			t.Errorf("%q: the caller gets %q", c.headers, err)
		}
	}
	_, err := Authenticate(t.Context(), http.Header{"Authorization": {"Bearer secret-key"}}, nil, Credentials{Keys: func() (Keys, error) { return nil, stale }}, now)
	if !errors.Is(err, stale) {
		t.Errorf("without current keys: %v", err)
	}
}

// A caller is live while there is a live key of its name; a caller of no known kind never is.
func TestIsLive(t *testing.T) {
	keys := keysOf{"secret-key": "orders", "old-key": "old"}
	for caller, live := range map[Caller]bool{
		{Name: "orders", Kind: APIKey, KeyID: "id"}: true, {Name: "orders", Kind: APIKey, KeyID: "its key before"}: false,
		{Name: "billing", Kind: APIKey, KeyID: "id"}: false, {Name: "old", Kind: APIKey, KeyID: "id"}: false,
		{Name: "orders", Kind: "another kind"}: false, {}: false,
		{Name: "token:x/a", Kind: AccessToken, Ends: soon}: false, // nothing verified it
		{Name: "spiffe://x/a", Kind: Certificate}:          false,
	} {
		if caller.IsLive(Credentials{Keys: func() (Keys, error) { return keys, nil }}, nil, now) != live {
			t.Errorf("%+v: want %v", caller, live)
		}
	}
}
