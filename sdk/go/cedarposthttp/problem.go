package cedarposthttp

import (
	"encoding/json"
	"net/http"
	"strconv"
	"time"

	"github.com/cedarpost/cedarpost/sdk/go/enforce"
)

// problem is the body of a refusal (https://www.rfc-editor.org/rfc/rfc9457). It must have no
// other members: the client sees all of them.
type problem struct {
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail,omitempty"`
	// DecisionID leads support to the record, if the user reports it.
	DecisionID string `json:"decision_id,omitempty"`
	// Fields are the denied fields that the user named.
	Fields []string `json:"fields,omitempty"`
}

var statuses = map[enforce.Kind]int{
	enforce.Forbidden: http.StatusForbidden, enforce.Hidden: http.StatusNotFound,
	enforce.NoPrincipal: http.StatusUnauthorized, enforce.StepUp: http.StatusUnauthorized,
	enforce.Unmet: http.StatusForbidden, enforce.Unavailable: http.StatusServiceUnavailable,
	enforce.Fault: http.StatusInternalServerError, enforce.Malformed: http.StatusBadRequest,
	enforce.TooLarge: http.StatusRequestEntityTooLarge, enforce.WrongType: http.StatusUnsupportedMediaType,
	enforce.Unmapped: http.StatusNotFound, enforce.Conflict: http.StatusConflict,
}

// refuse answers a refused request.
func refuse(w http.ResponseWriter, r *http.Request, refused *enforce.Refusal) {
	status, known := statuses[refused.Kind]
	if !known {
		status = http.StatusInternalServerError
	}
	p := problem{Title: refused.Kind.Title(), Status: status, Detail: refused.Kind.Detail(), DecisionID: refused.DecisionID, Fields: refused.Fields}
	if refused.Kind == enforce.Hidden {
		p.DecisionID = "" // the answer must be the same as that of NotFound
	}
	h := w.Header()
	if refused.Challenge != "" {
		h.Set("WWW-Authenticate", refused.Challenge)
	}
	if refused.RetryAfter > 0 {
		h.Set("Retry-After", strconv.FormatInt(int64((refused.RetryAfter+time.Second-1)/time.Second), 10))
	}
	writeProblem(w, r, p)
}

// NotFound answers that there is no such object. The answer is the same as that of a route
// with Hide for an object that the user may not know of.
func NotFound(w http.ResponseWriter, r *http.Request) {
	refuse(w, r, &enforce.Refusal{Kind: enforce.Hidden})
}

func writeProblem(w http.ResponseWriter, r *http.Request, p problem) {
	p.Type = "about:blank"
	body, err := json.Marshal(p)
	if err != nil {
		body = nil // it cannot fail for strings and a number
	}
	h := w.Header()
	h.Set("Content-Type", "application/problem+json")
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("Cache-Control", "no-store")
	w.WriteHeader(p.Status)
	if r.Method != http.MethodHead {
		_, _ = w.Write(body) // an error means that the client is gone
	}
}
