package cedarpost

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"syscall"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/cedarpost/cedarpost/internal/clienttls"
)

// This file decides which errors mean that the service is away. Only these let a check
// with FailOpen through. Only these, except overload, open the breaker of a server.
// docs/sdk-go/check.md has the same as a table, and TestWhatFailsOpenOverTheWire has a row
// for each.

// early is how long before the caller's deadline an error that the deadline caused can
// arrive. The client sends the deadline in whole milliseconds, so the server's copy ends
// up to one millisecond earlier.
const early = 2 * time.Millisecond

// over says whether the deadline of a context has passed, perhaps only on the server.
func over(ctx context.Context) bool {
	end, bounded := ctx.Deadline()
	return ctx.Err() != nil || bounded && time.Until(end) <= early
}

// away says whether an error shows that the service cannot be asked: it is not reached,
// it is overloaded, it cannot decide or record, or it does not answer in time. No other
// error does. A question must not be let through because it makes the service fail, or
// because a mistake on the client's side prevents it from being asked.
func away(err error) bool {
	if errors.Is(err, errOwnSide) {
		return false
	}
	// A resource_exhausted that no server sent is the client's own: the answer is too large.
	overloaded := connect.CodeOf(err) == connect.CodeResourceExhausted && answered(err)
	return failed(err) || overloaded
}

// failed says whether an error shows that a server does not work. An error such as
// `internal` does not: the server answers, and the question may have caused the error.
func failed(err error) bool {
	switch connect.CodeOf(err) {
	case connect.CodeUnavailable, connect.CodeDeadlineExceeded:
		return true
	}
	return false
}

// errOwnSide marks the error of a check that cannot be asked because of the client itself
// or because of a server's certificate or protocol. Such a check does not fail open.
var errOwnSide = errors.New("the cause is on the client's side or is the server's certificate or protocol, so the check does not fail open")

// untrusted says whether a TLS connection failed because one side does not accept the
// other: the certificate is not trusted, has another name or has expired, or the port does
// not speak TLS. It also says whether a port of plain http does not speak HTTP/2. An
// attacker on the network could cause these errors.
func untrusted(err error) bool {
	if errors.Is(err, errNotHTTP2) || errors.Is(err, clienttls.ErrRefused) {
		return true
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return true
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return true
	}
	// The TLS library reports the alerts of both sides in this way.
	if op, ok := errors.AsType[*net.OpError](err); ok && (op.Op == "remote error" || op.Op == "local error") {
		return true
	}
	return errors.Is(err, http.ErrSchemeMismatch)
}

// answered says whether a server answered, also if the answer is an error.
func answered(err error) bool {
	var ce *connect.Error
	return err == nil || errors.As(err, &ce) && ce.IsRemote()
}

// exhausted says whether this machine has no file descriptor, port or memory left for a
// connection. Many requests to the program can cause that. It says nothing about the
// service.
func exhausted(err error) bool {
	for _, errno := range []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.EADDRNOTAVAIL, syscall.ENOBUFS, syscall.ENOMEM} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// broken turns the various errors of a broken connection into one with the code
// unavailable. It returns other errors unchanged: errors that a server sent, and answers
// that are not Cedarpost's, such as a page of a proxy.
func broken(err error) error {
	if errors.Is(err, errNotHTTP2) {
		return connect.NewError(connect.CodeUnavailable, errNotHTTP2.Error()).WithCause(err)
	}
	var ce *connect.Error
	if !errors.As(err, &ce) || ce.IsRemote() && ce.Code() != connect.CodeCanceled {
		return err
	}
	switch ce.Code() {
	case connect.CodeCanceled: // the caller did not cancel, so the connection broke
	case connect.CodeUnknown: // with a cause, it means that the answer could not be read
		if ce.Unwrap() == nil {
			return err
		}
	case connect.CodeInternal: // an answer that ended too early; not a stream that the server reset
		if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return err
		}
	default:
		return err
	}
	return connect.NewError(connect.CodeUnavailable, "the connection broke: "+ce.Message()).WithCause(err)
}
