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
)

// This file decides which errors mean that the service is away. Only those let a check
// with FailOpen through, and only those (but for overload) open the breaker of a server. docs/sdk-go/check.md
// has the same as a table, and TestWhatFailsOpenOverTheWire has a row for each.

// early is how long before the caller's deadline an error that the deadline caused can
// arrive. The deadline travels to the server in whole milliseconds, so the
// server's copy of it ends up to one millisecond before.
const early = 2 * time.Millisecond

// over says whether the time of a context has ended, as a server may have seen it.
func over(ctx context.Context) bool {
	end, bounded := ctx.Deadline()
	return ctx.Err() != nil || bounded && time.Until(end) <= early
}

// away says whether an error shows that the service cannot be asked: it is not reached,
// it is overloaded, it cannot decide or record, or it does not answer in time. No
// other error does: a question that makes the service fail must not be let through for
// that, and neither must one that a mistake on the client's side keeps from being asked.
func away(err error) bool {
	if errors.Is(err, errOwnSide) {
		return false
	}
	// If the server did not send resource_exhausted, the client did: the answer is too large.
	overloaded := connect.CodeOf(err) == connect.CodeResourceExhausted && answered(err)
	return failed(err) || overloaded
}

// failed says whether an error shows that a server does not work. An error such as
// `internal` does not: the server is there, and the question may have caused it.
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

// untrusted says whether a TLS connection did not come about because one side does not
// accept the other: a certificate that is not trusted, has another name or has expired,
// or a port that does not speak TLS; or whether a port of plain http does not speak
// HTTP/2. An attacker on the network could cause that.
func untrusted(err error) bool {
	if errors.Is(err, errNotHTTP2) {
		return true
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return true
	}
	if _, ok := errors.AsType[tls.RecordHeaderError](err); ok {
		return true
	}
	// The TLS library reports alerts of either side in this way.
	if op, ok := errors.AsType[*net.OpError](err); ok && (op.Op == "remote error" || op.Op == "local error") {
		return true
	}
	return errors.Is(err, http.ErrSchemeMismatch)
}

// answered says whether a server answered, be it with an error.
func answered(err error) bool {
	var ce *connect.Error
	return err == nil || errors.As(err, &ce) && ce.IsRemote()
}

// exhausted says whether this machine lacks what a connection takes: a file descriptor, a
// port or memory. Many requests to the program can cause that; it says nothing about the
// service.
func exhausted(err error) bool {
	for _, errno := range []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.EADDRNOTAVAIL, syscall.ENOBUFS, syscall.ENOMEM} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// broken turns the several errors that a broken connection can cause into one, with the
// code unavailable. It returns other errors as they are: what a server said, and an answer
// that is not Cedarpost's, such as a page of a proxy.
func broken(err error) error {
	if errors.Is(err, errNotHTTP2) {
		return connect.NewError(connect.CodeUnavailable, errNotHTTP2.Error()).WithCause(err)
	}
	var ce *connect.Error
	if !errors.As(err, &ce) || ce.IsRemote() && ce.Code() != connect.CodeCanceled {
		return err
	}
	switch ce.Code() {
	case connect.CodeCanceled: // and the caller did not cancel
	case connect.CodeUnknown: // with a cause: the answer could not be read
		if ce.Unwrap() == nil {
			return err
		}
	case connect.CodeInternal: // the answer ended too early; a stream that the server reset is not broken
		if !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return err
		}
	default:
		return err
	}
	return connect.NewError(connect.CodeUnavailable, "the connection broke: "+ce.Message()).WithCause(err)
}
