package snapshot

import (
	"testing"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// FuzzRevisionToken: a token either is refused or is exactly one this service
// writes, so two different tokens differ in what they name.
func FuzzRevisionToken(f *testing.F) {
	f.Add("")
	f.Add("AgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAEAAAAAAAAAAQAAAAAAAAAAAAAAAAAAAAE")
	f.Add("AgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAEAAAAAAAAAAQAAAAAAAAAAAAAAAAAAAAF")
	f.Add("AgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAEA\nAAAAAAAAAQAAAAAAAAAAAAAAAAAAAAE")
	f.Fuzz(func(t *testing.T, token string) {
		n, err := parseToken("revision", &cedarpostv1.Revision{Token: token})
		if err != nil {
			return
		}
		if again := EncodeRevision(n.at, n.number).Token; again != token {
			t.Errorf("%q reads as %v, which is written %q", token, n, again)
		}
	})
}
