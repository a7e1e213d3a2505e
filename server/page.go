package server

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"
)

// defaultPage is the size of a page whose request does not set one.
const defaultPage = 100

var errPageToken = connect.NewError(connect.CodeInvalidArgument, "page_token: not one of this query; start again without it")

// page is the content of a page token: a hash of the query, and the place of the last row of
// the page before. A token works only for its own query: for another one it would skip rows. Callers
// can write tokens themselves, so a place only skips rows of the query, and never selects others.
type page[T any] struct {
	Filters []byte
	End     T
}

// readPage reads the page token of a request with these filters. Without a token it returns
// the page before the first one, whose End is the zero value.
func readPage[T any](filters proto.Message, token string) (p page[T], err error) {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(filters)
	if err != nil {
		return p, err
	}
	sum := sha256.Sum256(b)
	p.Filters = sum[:16]
	if token == "" {
		return p, nil
	}
	text, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil {
		return p, errPageToken
	}
	var got page[T]
	if err := json.Unmarshal(text, &got); err != nil || string(got.Filters) != string(p.Filters) {
		return p, errPageToken
	}
	return got, nil
}

// next returns the token of the page that ends at a row.
func (p page[T]) next(end T) string {
	b, _ := json.Marshal(page[T]{p.Filters, end})
	return base64.RawURLEncoding.EncodeToString(b)
}

// pageSize returns how many rows a page has.
func pageSize(asked int32) int {
	if asked == 0 {
		return defaultPage
	}
	return int(asked)
}
