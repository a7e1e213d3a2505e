package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"strings"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/snapshot"
	"github.com/cedarpost/cedarpost/server/wire"
	"github.com/cedarpost/cedarpost/store"
)

// Handlers return the errors that they get. The guard turns each of them, once, into the
// error that the caller sees.

// outcome says what a failed call to a procedure did not do. It is added to a message.
func outcome(procedure string) string {
	switch {
	case procedure == cedarpostv1connect.AuthorizationServiceAuthorizeProcedure,
		procedure == cedarpostv1connect.AuthorizationServiceAuthorizeBatchProcedure:
		return "; no decision was given"
	case strings.HasPrefix(procedure, "/"+cedarpostv1connect.AuditServiceName+"/"):
		return "; nothing was read"
	}
	return ""
}

// couldNot begins the message of an error of the database or of the log.
const couldNot = "the service could not read or record"

// maxErrorBytes is the largest text of an error that leaves the server or is logged. A longer one
// repeats a long text of a request, and is cut.
const maxErrorBytes = 4 << 10

// cut returns a text of at most maxErrorBytes bytes. Of a longer one it keeps the beginning, which says
// what is wrong, and the end, which can say what to do. So it stays short when something is added.
func cut(text string) string {
	if len(text) <= maxErrorBytes {
		return text
	}
	const head, tail = maxErrorBytes / 4, maxErrorBytes / 8
	return strings.ToValidUTF8(text[:head], "") + fmt.Sprintf(" … (%d bytes are left out) … ", len(text)-head-tail) + strings.ToValidUTF8(text[len(text)-tail:], "")
}

// publicError is the error for the caller: that of knownError, with a text that is cut.
func publicError(procedure string, err error) *connect.Error {
	e := knownError(procedure, err)
	text := cut(e.Message())
	if text == e.Message() {
		return e
	}
	short := connect.NewError(e.Code(), text).WithCause(e.Unwrap())
	for _, d := range e.Details() {
		short = short.WithDetail(d)
	}
	return short
}

// knownError is the table from errors inside of the server to codes and messages for
// its callers. The text of an error that is not in the table does not leave the server:
// it is the cause, which is logged.
func knownError(procedure string, err error) *connect.Error {
	so := outcome(procedure)
	var ce *connect.Error
	var bad *engine.RequestError
	var large *engine.TooLargeError
	var swept *store.SweptError
	var unknown *access.UnauthenticatedError
	var refused *refusedError
	var token *access.TokenError
	var principalToken *principalTokenError
	var notToken *snapshot.TokenError
	var history *snapshot.HistoryError
	switch {
	case errors.As(err, &ce):
		if errors.Is(ce, os.ErrDeadlineExceeded) && strings.HasSuffix(ce.Message(), "i/o timeout") { // from Connect, with addresses
			return connect.NewError(connect.CodeDeadlineExceeded, "the message did not come in time").WithCause(err)
		}
		return tooLarge(procedure, ce)
	case errors.As(err, &bad):
		return connect.NewError(connect.CodeInvalidArgument, bad.Message)
	case errors.Is(err, snapshot.ErrStale), errors.Is(err, snapshot.ErrBehind):
		return connect.NewError(connect.CodeUnavailable, err.Error())
	case errors.As(err, &unknown):
		return connect.NewError(connect.CodeUnauthenticated, unknown.Error())
	case errors.As(err, &token):
		return connect.NewError(connect.CodeUnauthenticated, token.Error())
	case errors.As(err, &principalToken):
		return connect.NewError(principalToken.code(), principalToken.Error()+so)
	case errors.Is(err, access.ErrTooManyFailures):
		// Not resource_exhausted: a caller whose key was revoked must not take it for overload,
		// and let checks with FailOpen through.
		return connect.NewError(connect.CodeUnauthenticated, err.Error())
	case errors.As(err, &refused):
		return connect.NewError(connect.CodePermissionDenied, refused.Error())
	case errors.Is(err, access.ErrRateLimited), errors.Is(err, access.ErrOverloaded):
		return connect.NewError(connect.CodeResourceExhausted, err.Error())
	case errors.As(err, &notToken):
		return connect.NewError(connect.CodeInvalidArgument, notToken.Error())
	case errors.As(err, &history):
		return connect.NewError(connect.CodeAborted, history.Error())
	case errors.Is(err, snapshot.ErrTooManyWatchers), errors.Is(err, snapshot.ErrTooSlow):
		return connect.NewError(connect.CodeResourceExhausted, err.Error())
	case errors.Is(err, store.ErrBehind):
		return connect.NewError(connect.CodeUnavailable, "the database is at another revision than this server"+so)
	case errors.Is(err, decisionlog.ErrRecorderDown):
		return connect.NewError(connect.CodeUnavailable, "the decision log is not available"+so)
	case errors.Is(err, decisionlog.ErrQueueFull):
		return connect.NewError(connect.CodeResourceExhausted, "too many decisions are waiting to be recorded; try again later")
	case errors.Is(err, engine.ErrTooCostly), errors.Is(err, access.ErrBusy), errors.Is(err, access.ErrNoTurn), errors.Is(err, snapshot.ErrLargeLoad):
		// Not resource_exhausted, which says that the service is overloaded: clients would let
		// checks with FailOpen through, and a user can choose a costly question.
		return connect.NewError(connect.CodeFailedPrecondition, err.Error()+so)
	case errors.As(err, &large):
		// As for ErrTooCostly: a user whose entities are large must not fail open.
		return connect.NewError(connect.CodeFailedPrecondition, large.Error()+so).WithCause(large.Cause)
	case errors.Is(err, engine.ErrTooManyAncestors):
		return connect.Errorf(connect.CodeFailedPrecondition, "an entity has more than %d ancestors%s", engine.MaxAncestors, so)
	case errors.As(err, &swept):
		return connect.Errorf(connect.CodeOutOfRange, "history begins at revision %d; earlier revisions cannot be read any more", swept.Oldest)
	case errors.Is(err, store.ErrTooManyGroups):
		return connect.Errorf(connect.CodeFailedPrecondition, "ancestor: more than %d groups are below it; ask for one of them", store.MaxGroups)
	case errors.Is(err, store.ErrTooManyKeys):
		return connect.NewError(connect.CodeResourceExhausted, store.ErrTooManyKeys.Error())
	case errors.Is(err, store.ErrNotFound):
		return connect.NewError(connect.CodeNotFound, "not found")
	case errors.Is(err, store.ErrText):
		return connect.NewError(connect.CodeInvalidArgument, "the request, or its page token, has text with a NUL character, or text that is not UTF-8").WithCause(err)
	case errors.Is(err, store.ErrPolicyChanged):
		return connect.NewError(connect.CodeAborted, "policies changed meanwhile; try again")
	case errors.Is(err, store.ErrOtherHistory):
		return connect.NewError(connect.CodeAborted, "the database has another history than before, as after a failover; try again")
	}
	if strings.HasPrefix(procedure, "/"+cedarpostv1connect.AuditServiceName+"/") && errors.Is(err, context.DeadlineExceeded) {
		return connect.NewError(connect.CodeDeadlineExceeded, "reading the log took too long: ask about a shorter time").WithCause(err)
	}
	// Postgres is away, a commit failed, or a timeout of the server itself ended. If the
	// call's own context has ended, callerError says so instead.
	return connect.NewError(connect.CodeUnavailable, couldNot+so).WithCause(err)
}

// largerThan matches Connect's error of a message that is too large. Of a unary call in Connect's
// own protocol the size is not known, because the rest of it is not read.
var largerThan = regexp.MustCompile(`^message (?:size (\d+) )?is larger than configured max (\d+)`)

// tooLarge turns Connect's error of a message that is too large into invalid_argument. Connect's
// own code is resource_exhausted, which says that the service is overloaded: clients would let
// checks with FailOpen through, and a user can make a question large. Other errors it returns as
// they are.
func tooLarge(procedure string, ce *connect.Error) *connect.Error {
	m := largerThan.FindStringSubmatch(ce.Message())
	if m == nil || ce.Code() != connect.CodeResourceExhausted {
		return ce
	}
	what := "message"
	switch procedure {
	case cedarpostv1connect.AuthorizationServiceAuthorizeProcedure:
		what = "question"
	case cedarpostv1connect.AuthorizationServiceAuthorizeBatchProcedure:
		what = "batch"
	}
	return connect.NewError(connect.CodeInvalidArgument, wire.TooLarge(what, m[1], m[2])).WithCause(ce)
}

// bodyError returns the error of a call whose body could not be read, such as one that is shorter
// than its Content-Length. Connect does not know it, and the caller can cause it with each call.
func bodyError(r *request, err error) error {
	if r.body.broken && connect.CodeOf(err) == connect.CodeUnknown {
		return connect.NewError(connect.CodeInvalidArgument, "the body of the request ends too early, or is not what its headers say").WithCause(err)
	}
	return err
}

// outdated reports whether the store refused a write, before it wrote anything, because the
// policies or the history that it was checked against have changed. The write may be checked
// again.
func outdated(err error) bool {
	return errors.Is(err, store.ErrPolicyChanged) || errors.Is(err, store.ErrOtherHistory)
}

// callerError returns the error to answer a call with. ctx is the context that the call
// came with, without the server's own timeout. If ctx has ended, the error becomes
// canceled or deadline_exceeded, whatever part of the server it comes from: the call was
// ended by its caller and is no failure of the server. Errors about the question itself
// stay as they are, and so does a panic.
func callerError(ctx context.Context, err error) error {
	// A read or write on a socket can fail at the deadline a moment before ctx ends.
	end, bounded := ctx.Deadline()
	late := bounded && !time.Now().Before(end)
	if err == nil || ctx.Err() == nil && !late {
		return err
	}
	switch connect.CodeOf(err) {
	case connect.CodeUnavailable, connect.CodeCanceled, connect.CodeUnknown:
	case connect.CodeDeadlineExceeded:
		if !late { // the server stopped reading, which also cancels the context
			return err
		}
	default:
		return err
	}
	code, message := connect.CodeCanceled, "the caller gave up"
	if late {
		code, message = connect.CodeDeadlineExceeded, "the deadline that the caller set has ended"
	}
	var ce *connect.Error
	if errors.As(err, &ce) { // its message may say what the call did not do
		if so := strings.TrimPrefix(strings.TrimPrefix(ce.Message(), couldNot), "; "); so != "" {
			message += "; " + so
		}
	}
	return connect.NewError(code, message).WithCause(err)
}
