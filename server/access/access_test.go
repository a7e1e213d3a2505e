package access

import (
	"crypto/sha256"
	"errors"
	"net/http"
	"testing"
)

// keysOf are live keys, by the key itself.
type keysOf map[string]string

func (k keysOf) Caller(hash [sha256.Size]byte) (string, bool) {
	for key, name := range k {
		if sha256.Sum256([]byte(key)) == hash {
			return name, true
		}
	}
	return "", false
}

func (k keysOf) HasCaller(name string) bool {
	for _, n := range k {
		if n == name {
			return true
		}
	}
	return false
}

// A call needs exactly one header with the bearer scheme and a live key.
func TestAuthenticate(t *testing.T) {
	keys := keysOf{"secret-key": "orders"}
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
	} {
		caller, err := Authenticate(http.Header{"Authorization": c.headers}, nil, func() (Keys, error) { return keys, nil })
		var unknown *UnauthenticatedError
		switch {
		case c.name != "" && (err != nil || caller != Caller{c.name, APIKey}):
			t.Errorf("%q: %+v, %v", c.headers, caller, err)
		case c.name == "" && (!errors.As(err, &unknown) || unknown.Reason != c.reason || caller != Caller{}):
			t.Errorf("%q: %+v, %v, want %q", c.headers, caller, err, c.reason)
		}
	}
	_, err := Authenticate(http.Header{"Authorization": {"Bearer secret-key"}}, nil, func() (Keys, error) { return nil, stale })
	if !errors.Is(err, stale) {
		t.Errorf("without current keys: %v", err)
	}
}

// A caller is live while there is a live key of its name; a caller of no known kind never is.
func TestIsLive(t *testing.T) {
	keys := keysOf{"secret-key": "orders"}
	for caller, live := range map[Caller]bool{
		{"orders", APIKey}: true, {"billing", APIKey}: false, {"orders", "another kind"}: false, {}: false,
	} {
		if caller.IsLive(keys) != live {
			t.Errorf("%+v: want %v", caller, live)
		}
	}
}
