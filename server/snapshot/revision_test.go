package snapshot

import (
	"testing"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// FuzzRevisionToken checks that a token is refused or is exactly a token that this service
// writes, so two different tokens name different revisions.
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
