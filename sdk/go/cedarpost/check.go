package cedarpost

import "errors"

// Check is one question: may this principal do this action on this resource, and
// which fields? Principal, Action and Resource are required.
type Check struct {
	Principal, Action, Resource EntityUID

	// Context is what the action's context declares. Values are bool, string, numbers,
	// json.Number, [EntityUID], time.Time (datetime), time.Duration (duration),
	// netip.Addr and netip.Prefix (ipaddr), slices and maps by string of these, and
	// types made of them. Cedar has whole numbers only. An IPv4 address or range that is
	// mapped into IPv6, such as ::ffff:10.1.2.3, is sent as the IPv4 one; a string is
	// sent as it is.
	Context map[string]any

	// Fields are the paths asked for; AllFields asks for all of the catalogue. Neither:
	// no fields are asked for, and none are permitted.
	Fields    []string
	AllFields bool
	// RequireAllFields is for writes: deny unless every field asked for is permitted.
	RequireAllFields bool

	// Entities come with the question, of types the schema marks @source("request").
	Entities []Entity

	// RequestID is the id of the request that is being served, for the record of the
	// decision. An answer from the cache has the record of the first question.
	RequestID string

	// AtLeastAsFresh is the token of a revision, as a write returned it: the answer
	// is to know of that write. Empty: what is at most as old as the client's
	// MaxStaleness. If a restore or a failover lost that revision, the error is
	// [ErrUnknownRevision].
	AtLeastAsFresh string
	// FullyConsistent asks for the newest there is, past every cache.
	FullyConsistent bool

	// FailOpen says why this check is let through when the service cannot be asked:
	// away, overloaded or too slow. Empty, the default: it is not, and Authorize
	// returns an error. What is let through has no fields, is counted, and is put into
	// the service's log with this reason once it is back. A question that the service
	// refuses is never let through, and neither is one whose caller gave up or set a
	// deadline that ended, nor one that a mistake on the client's side keeps from being asked.
	// [Config].FailOpenTime bounds for how long checks are let through.
	FailOpen string
}

// Entity is an entity that comes with a question.
type Entity struct {
	UID         EntityUID
	Attrs, Tags map[string]any
	Parents     []EntityUID
}

// Errors of a call. Each means that there is no decision: deny. They are told apart
// by errors.Is; the cause is there for errors.As, a *connect.Error where the service
// said something.
var (
	// ErrUnavailable: the service could not be asked, could not decide or could not
	// record; asking again later may help.
	ErrUnavailable = errors.New("cedarpost: no decision")
	// ErrInvalid: the question makes no sense to the service; asking again does not
	// help.
	ErrInvalid = errors.New("cedarpost: bad question")
	// ErrUnknownRevision: the service does not have the revision of AtLeastAsFresh: a restore
	// or a failover lost it, the token is older than the history that is kept, or it is of
	// another database. What was written with that revision may be lost, too: read it again,
	// write it again if it is gone, and ask with the new token or without one.
	ErrUnknownRevision = errors.New("cedarpost: the revision of AtLeastAsFresh is not known; read again, and ask with a new token or without one")
	// ErrWrongServer: the server at the URL has no such call, so the URL is probably that of
	// another plane, another path or another service; asking again does not help.
	ErrWrongServer = errors.New("cedarpost: this is not the decision plane of a Cedarpost server; is its URL that of another plane, path or service?")
	// ErrUnauthenticated: the service does not know this client's API key, or does not
	// let it ask.
	ErrUnauthenticated = errors.New("cedarpost: this client may not ask")
	// ErrClosed: the client was closed.
	ErrClosed = errors.New("cedarpost: client is closed")
)
