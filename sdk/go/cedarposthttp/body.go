package cedarposthttp

import (
	"bytes"
	"errors"
	"io"
	"mime"
	"net/http"
	"slices"

	"github.com/cedarpost/cedarpost/sdk/go/enforce"
	"github.com/cedarpost/cedarpost/sdk/go/fields"
)

// Changes returns the paths that the body of a request changes, as the field catalogue names
// them. It must return every path that the handler would change, also paths that are in no
// catalogue: the service denies those. An error refuses the request with 400, or in the way
// that the error says if it is an [*enforce.Refusal].
type Changes func(r *http.Request, body []byte) ([]string, error)

// MergePatch returns the paths that a JSON merge patch (RFC 7396) changes. The body must be
// application/merge-patch+json or application/json. See [fields.MergePatch].
func MergePatch(r *http.Request, body []byte) ([]string, error) {
	if err := typed(r, "application/merge-patch+json", "application/json"); err != nil {
		return nil, err
	}
	return fields.MergePatch(body)
}

// JSONPatch returns the paths that a JSON patch (RFC 6902) changes or reads. The body must be
// application/json-patch+json. See [fields.JSONPatch].
func JSONPatch(r *http.Request, body []byte) ([]string, error) {
	if err := typed(r, "application/json-patch+json"); err != nil {
		return nil, err
	}
	return fields.JSONPatch(body)
}

// typed refuses bodies of other types. A handler that accepts several kinds of patch could
// read such a body as another kind than the one that was checked.
func typed(r *http.Request, want ...string) error {
	values := r.Header.Values("Content-Type")
	if len(values) == 1 {
		if got, _, err := mime.ParseMediaType(values[0]); err == nil && slices.Contains(want, got) {
			return nil
		}
	}
	return &enforce.Refusal{Kind: enforce.WrongType}
}

// changes reads the body, calls Changes, and restores the body for the handler.
func (c *compiled) changes(w http.ResponseWriter, r *http.Request) ([]string, error) {
	if len(r.Header["Content-Encoding"]) > 0 { // Get would return only the first one
		return nil, &enforce.Refusal{Kind: enforce.WrongType}
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, c.MaxBody))
	if _, large := errors.AsType[*http.MaxBytesError](err); large {
		return nil, &enforce.Refusal{Kind: enforce.TooLarge}
	}
	if err != nil {
		return nil, &enforce.Refusal{Kind: enforce.Malformed, Err: err}
	}
	// The handler gets a copy, so that Changes cannot modify it.
	r.Body = io.NopCloser(bytes.NewReader(slices.Clone(body)))
	r.ContentLength = int64(len(body))
	r.TransferEncoding = nil
	paths, err := c.Changes(r, body)
	if err != nil {
		if refused, ok := errors.AsType[*enforce.Refusal](err); ok {
			return nil, refused
		}
		return nil, &enforce.Refusal{Kind: enforce.Malformed, Err: err}
	}
	return paths, nil
}
