package server

import (
	"encoding/base64"
	"errors"
	"testing"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// A page token works only for its own filters. A token that another version of the server made
// is refused: it must not start the listing again.
func TestPageTokens(t *testing.T) {
	filters := &cedarpostv1.QueryEventsRequest{Caller: "a"}
	first, err := readPage[logEnd](filters, "")
	if err != nil {
		t.Fatal(err)
	}
	end := logEnd{ID: [16]byte{7}}
	token := first.next(end)
	if next, err := readPage[logEnd](filters, token); err != nil || next.End != end {
		t.Errorf("%+v, %v", next, err)
	}
	flat := `{"Query":"` + base64.StdEncoding.EncodeToString(first.Filters) + `","At":"2026-01-01T00:00:00Z","ID":"07000000-0000-0000-0000-000000000000"}`
	for name, c := range map[string]struct {
		filters *cedarpostv1.QueryEventsRequest
		token   string
	}{
		"other filters":         {&cedarpostv1.QueryEventsRequest{Caller: "b"}, token},
		"not base64":            {filters, "?"},
		"not JSON":              {filters, base64.RawURLEncoding.EncodeToString([]byte("x"))},
		"of an earlier version": {filters, base64.RawURLEncoding.EncodeToString([]byte(flat))},
	} {
		if _, err := readPage[logEnd](c.filters, c.token); !errors.Is(err, errPageToken) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
