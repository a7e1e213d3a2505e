package egress

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// JSONLimits bound an answer that is decoded. The zero value has sensible bounds.
type JSONLimits struct {
	// MaxBytes bounds the body. 0: what the configuration of the client says.
	MaxBytes int64
	// MaxDepth bounds how deep arrays and objects are nested. 0: 16.
	MaxDepth int
	// ContentTypes are the media types that the answer may have. None: application/json and all
	// application/…+json.
	ContentTypes []string
	// Strict refuses members that the declared type does not have. Otherwise they are ignored.
	Strict bool
}

const defaultMaxDepth = 16

// GetJSON gets a URL and decodes the answer, which is one JSON value, into a T. The error is a
// [RefusedError] if the answer does not have status 200, or does not fit the limits or the type.
func GetJSON[T any](ctx context.Context, c *Client, url string, limits JSONLimits) (T, error) {
	var value T
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, url, http.NoBody)
	if err != nil {
		return value, &RefusedError{Rule: RuleURL, Detail: "not a URL"}
	}
	r.Header.Set("Accept", strings.Join(append(slices.Clone(limits.ContentTypes), "application/json"), ", "))
	response, err := c.Do(r) //nolint:bodyclose // DecodeJSON closes it
	if err != nil {
		return value, err
	}
	err = DecodeJSON(response, &value, limits)
	return value, err
}

// DecodeJSON reads the answer of a call of [Client.Do], decodes it into a value as package
// encoding/json does, and closes its body. Names are compared with capitals, duplicate names and
// text that is not UTF-8 are refused. The error has nothing of the answer's values.
func DecodeJSON(response *http.Response, into any, limits JSONLimits) error {
	defer func() { _ = response.Body.Close() }()
	host := response.Request.URL.Host
	refuse := func(rule Rule, format string, args ...any) error {
		return &RefusedError{Rule: rule, Host: host, Detail: fmt.Sprintf(format, args...)}
	}
	if response.StatusCode != http.StatusOK {
		return refuse(RuleStatus, "an answer with status %d", response.StatusCode)
	}
	contentType := response.Header.Get("Content-Type")
	if !fits(contentType, limits.ContentTypes) {
		return refuse(RuleContentType, "an answer with the content type %.100q", contentType)
	}
	if encoding := response.Header.Get("Content-Encoding"); encoding != "" && encoding != "identity" {
		return refuse(RuleContentType, "an answer with the content encoding %.100q", encoding)
	}
	body := io.Reader(response.Body)
	if limits.MaxBytes > 0 {
		body = &cappedBody{ReadCloser: response.Body, left: limits.MaxBytes, most: limits.MaxBytes, host: host}
	}
	text, err := io.ReadAll(body)
	if err != nil {
		return plainError(response.Request, err)
	}
	most := cmp.Or(limits.MaxDepth, defaultMaxDepth)
	switch deep, err := deeper(text, most); {
	case deep:
		return refuse(RuleDepth, "JSON that is nested deeper than %d", most)
	case err != nil:
		return refuse(RuleShape, "an answer that is not one JSON value")
	}
	if err := json.Unmarshal(text, into, json.RejectUnknownMembers(limits.Strict)); err != nil {
		where := ""
		if bad, ok := errors.AsType[*json.SemanticError](err); ok {
			where = fmt.Sprintf(" at %.100q", string(bad.JSONPointer))
		}
		return refuse(RuleShape, "JSON that does not fit the type %T%s", into, where)
	}
	return nil
}

func fits(contentType string, allowed []string) bool {
	media, _, err := mime.ParseMediaType(contentType)
	if err != nil {
		return false
	}
	if len(allowed) == 0 {
		return media == "application/json" || strings.HasPrefix(media, "application/") && strings.HasSuffix(media, "+json")
	}
	return slices.ContainsFunc(allowed, func(a string) bool { return strings.EqualFold(a, media) })
}

// deeper reports whether one JSON value is nested deeper than most. It reads token by token, so
// its own stack does not grow with the nesting.
func deeper(text []byte, most int) (bool, error) {
	d := jsontext.NewDecoder(bytes.NewReader(text))
	for {
		if _, err := d.ReadToken(); errors.Is(err, io.EOF) {
			return false, nil
		} else if err != nil {
			return false, err
		}
		if d.StackDepth() > most {
			return true, nil
		}
	}
}
