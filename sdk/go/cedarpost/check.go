package cedarpost

import "errors"

// Check is one question: may this principal do this action on this resource, and which
// fields? Action and Resource are required, and either Principal or PrincipalToken.
type Check struct {
	Principal, Action, Resource EntityUID

	// PrincipalToken is the access token of the user who is the principal. The service verifies it, and
	// the bundle says which principal it stands for, and which attributes of the context its claims
	// fill: Context must not have these. The client keeps an answer under a hash of the token, and for
	// no longer than the token is valid. Such a check cannot have FailOpen. If the token is not
	// accepted, the error is [ErrPrincipalToken].
	PrincipalToken PrincipalToken

	// Context has the attributes that the action's context declares. Values are bool,
	// string, numbers, json.Number, [EntityUID], time.Time (datetime), time.Duration
	// (duration), netip.Addr and netip.Prefix (ipaddr), slices of these and maps of these
	// by string, and types derived from them. Cedar has whole numbers only. An IPv4 address
	// or range that is mapped into IPv6, such as ::ffff:10.1.2.3, is sent as IPv4. A string
	// is sent unchanged.
	Context map[string]any

	// Fields are the paths asked for. AllFields asks for all paths of the catalogue. With
	// neither, no fields are asked for and none are permitted.
	Fields    []string
	AllFields bool
	// RequireAllFields is for writes: it denies the check unless every field asked for is
	// permitted. A path above others is denied then: give its leaves.
	RequireAllFields bool

	// Entities are sent with the question. Their types must be marked @source("request") in
	// the schema.
	Entities []Entity

	// RequestID is the id of the request that the program serves. It is in the record of the
	// decision. A reused answer has the record of the first question.
	RequestID string

	// AtLeastAsFresh is the token of a revision, for example from a write: the answer takes
	// that write into account. Empty: the answer is at most as old as the client's
	// MaxStaleness. If a restore or a failover lost the revision, the error is
	// [ErrUnknownRevision].
	AtLeastAsFresh string
	// FullyConsistent asks for an answer at the newest revision, past every cache.
	FullyConsistent bool

	// FailOpen is the reason to let this check through when the service cannot be asked: it
	// is away, overloaded or too slow. Empty, the default: Authorize then returns an error.
	// A check that is let through has no fields, is counted, and is in the service's log
	// with this reason once the service is back. A check is never let through if the service
	// refuses the question, if its caller gave up or its caller's deadline ended, or if a
	// mistake on the client's side prevents it from being asked. [Config].FailOpenTime
	// bounds for how long checks are let through.
	FailOpen string
}

// Entity is an entity that is sent with a question.
type Entity struct {
	UID         EntityUID
	Attrs, Tags map[string]any
	Parents     []EntityUID
}

// Errors of a call. Each means that there is no decision: deny. Tell them apart with
// errors.Is. errors.As finds the cause, which is a *connect.Error if the service sent one.
var (
	// ErrUnavailable: the service could not be asked, could not decide or could not
	// record. Asking again later may help.
	ErrUnavailable = errors.New("cedarpost: no decision")
	// ErrInvalid: the question is not valid. Asking again does not help.
	ErrInvalid = errors.New("cedarpost: bad question")
	// ErrUnknownRevision: the service does not have the revision of AtLeastAsFresh. A restore
	// or a failover lost it, the token is older than the history that is kept, or it is of
	// another database. The write that returned the token may be lost too: read what it
	// wrote, write it again if it is gone, and ask with the new token or without one.
	ErrUnknownRevision = errors.New("cedarpost: the revision of AtLeastAsFresh is not known; read again, and ask with a new token or without one")
	// ErrWrongServer: the server at the URL does not know the call. The URL is probably that
	// of another plane, another path or another service. Asking again does not help.
	ErrWrongServer = errors.New("cedarpost: this is not the decision plane of a Cedarpost server; is its URL that of another plane, path or service?")
	// ErrUnauthenticated: the service does not accept this client's API key or access token: it
	// is unknown, was revoked, or has expired.
	ErrUnauthenticated = errors.New("cedarpost: the service does not accept this client's API key or access token")
	// ErrPermissionDenied: the service knows this client, and the client has no right to ask this.
	// It says nothing about the principal of the check.
	ErrPermissionDenied = errors.New("cedarpost: this client has no right to ask this; it needs a grant")
	// ErrNoToken: the client's TokenSource has no token, so nothing was asked. Asking again later
	// may help.
	ErrNoToken = errors.New("cedarpost: no token to authenticate with")
	// ErrClosed: the client was closed.
	ErrClosed = errors.New("cedarpost: client is closed")
)
