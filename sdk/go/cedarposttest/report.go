package cedarposttest

import (
	"encoding/json"
	"fmt"
	"html"
	"net/http"
	"slices"
	"strings"
	"text/tabwriter"
)

// Report has the outcomes of the tries of [TwoUsers].
type Report struct {
	// Tries are in the order in which they were made.
	Tries []Try
	// Uncovered lists routes that are registered and not tried, or the other way round.
	Uncovered []string

	opened map[string]bool // objects that a user reached without a right to
}

// Try is one request and its outcome.
type Try struct {
	// Pattern is the pattern of the route.
	Pattern string
	// User is the name of the user who asked, empty if there was none. Owner is the name of
	// the user to whom the object belongs.
	User, Owner string
	// Object is the kind and the values of the object: "order 42".
	Object string
	// Status is the status of the answer, 0 when there was no answer.
	Status int
	// Failure says in a sentence what is wrong. Empty: nothing.
	Failure string

	route       int // index in TwoUsers.Routes
	request     Route
	user, owner *User   // user is nil for a request without a user
	others      []*User // their secrets must not be in the answer
	answer      string
	err         error
}

// Failures returns the failures of all tries, and Uncovered.
func (r *Report) Failures() []string {
	var out []string
	for _, t := range r.Tries {
		if t.Failure != "" {
			out = append(out, t.Failure)
		}
	}
	return append(out, r.Uncovered...)
}

// String returns a table of the tries.
func (r *Report) String() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "ROUTE\tAS\tON\tSTATUS\t")
	for _, t := range r.Tries {
		who, on, verdict := t.User, t.whose(), "ok"
		if who == "" {
			who = "nobody"
		}
		if t.Failure != "" {
			verdict = "FAILED"
		}
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\n", t.Pattern, who, on, t.Status, verdict)
	}
	_ = w.Flush()
	return b.String()
}

// add judges a try and adds it to the report.
func (r *Report) add(t *Try) {
	if t.user != nil {
		t.User = t.user.Name
	}
	t.Owner = t.owner.Name
	if kind := t.request.Object; kind != "" {
		t.Object = strings.TrimSpace(kind + " " + t.owner.Objects[kind].String())
	}
	if problem := t.judge(); problem != "" {
		t.Failure = t.Pattern + ": " + problem
	}
	at := t.Owner + " " + t.Object
	if t.user != t.owner && t.succeeded() {
		if r.opened == nil {
			r.opened = map[string]bool{}
		}
		r.opened[at] = true
	}
	if t.user == t.owner && !t.succeeded() && t.Failure != "" && r.opened[at] {
		t.Failure += " (an earlier try reached this object, which it must not)"
	}
	t.answer = ""
	r.Tries = append(r.Tries, *t)
}

func (t *Try) succeeded() bool { return t.Status >= 200 && t.Status <= 299 }

// judge returns what is wrong with a try, or "".
func (t *Try) judge() string {
	who := t.User
	if t.user == nil {
		who = "a request without a user"
	}
	if t.err != nil {
		return fmt.Sprintf("%s asked for %s: no answer: %v", who, t.whose(), t.err)
	}
	if t.user == t.owner {
		return t.judgeOwn()
	}
	refusals := []int{http.StatusForbidden, http.StatusNotFound}
	if t.user == nil {
		refusals = append(refusals, http.StatusUnauthorized)
	}
	switch {
	case slices.Contains(refusals, t.Status):
		if leak := t.leak(); leak != "" {
			return fmt.Sprintf("%s was refused %s with %d, and the answer has %s", who, t.whose(), t.Status, leak)
		}
		return ""
	case t.succeeded():
		return fmt.Sprintf("%s %s %s: %d", who, t.did(), t.whose(), t.Status)
	case t.user == nil:
		return fmt.Sprintf("%s asked for %s: %d, not 401, 403 or 404", who, t.whose(), t.Status)
	}
	return fmt.Sprintf("%s asked for %s: %d, not 403 or 404", who, t.whose(), t.Status)
}

// judgeOwn judges a try on the user's own object.
func (t *Try) judgeOwn() string {
	want := "a success"
	ok := t.succeeded()
	if t.request.Success != 0 {
		want, ok = fmt.Sprint(t.request.Success), t.Status == t.request.Success
	}
	if !ok {
		return fmt.Sprintf("%s asked for %s: %d, not %s, so that no refusal proves anything", t.User, t.whose(), t.Status, want)
	}
	if leak := t.leak(); leak != "" {
		return fmt.Sprintf("%s got %s, and the answer has %s", t.User, t.whose(), leak)
	}
	return ""
}

// leak names a secret that the answer contains, plain or as JSON or HTML write it.
func (t *Try) leak() string {
	for _, u := range t.others {
		for _, secret := range u.Secrets {
			asJSON, _ := json.Marshal(secret) // it cannot fail for a text
			for _, form := range []string{secret, strings.Trim(string(asJSON), `"`), html.EscapeString(secret)} {
				if strings.Contains(t.answer, form) {
					return fmt.Sprintf("%q, a secret of %s", secret, u.Name)
				}
			}
		}
	}
	return ""
}

// whose names the object and its owner.
func (t *Try) whose() string {
	switch {
	case t.Object == "" && t.user == nil:
		return "it"
	case t.Object == "":
		return "what is " + t.Owner + "'s own"
	case t.user == t.owner:
		return "own " + t.Object
	}
	return t.Object + " of " + t.Owner
}

// did says what a successful request did to the object.
func (t *Try) did() string {
	switch method, _, _ := t.request.split(); method {
	case http.MethodGet, http.MethodHead, http.MethodOptions:
		return "read"
	case http.MethodDelete:
		return "deleted"
	case http.MethodPut, http.MethodPatch:
		return "changed"
	}
	return "acted on"
}
