package serverurl_test

import (
	"strings"
	"testing"

	"github.com/cedarpost/cedarpost/internal/serverurl"
)

// An accepted URL names a server, has no secret, and is read again as the same URL. An error does
// not repeat a text with a password.
func FuzzParse(f *testing.F) {
	for _, text := range []string{
		"https://host:8080", "http://127.0.0.1:8080/", " http://[::1]:1/a%2Fb// ", "http://bob:hunter2@host", "http://host:99999",
		"http://host?x", "http://host#", "HTTP://HOST", "ftp://host", "http://", "http://host:", "://", "http://h\x00st", "",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		u, err := serverurl.Parse(text)
		if err != nil {
			if strings.Contains(text, "@") && strings.Contains(err.Error(), text) {
				t.Errorf("%q is in the error: %v", text, err)
			}
			return
		}
		if u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" || strings.HasSuffix(u.String(), "/") {
			t.Errorf("%q is read as %q", text, u)
		}
		if again, err := serverurl.Parse(u.String()); err != nil || again.String() != u.String() {
			t.Errorf("%q is read as %q, and that as %v, %v", text, u, again, err)
		}
	})
}
