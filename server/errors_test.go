package server

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectproto"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/snapshot"
	"github.com/cedarpost/cedarpost/store"
)

// A question that costs too much is refused with a code that no client takes for overload,
// because a check that fails open would then let through who asks it.
func TestTooCostlyIsNoOverload(t *testing.T) {
	for _, err := range []error{
		fmt.Errorf("%w: the policies of bundle %q take more", engine.ErrTooCostly, "shop"), access.ErrBusy, access.ErrNoTurn,
		snapshot.ErrLargeLoad, &engine.TooLargeError{Cause: errors.New("names an entity")}, &engine.TooLargeError{Batch: true},
	} {
		got := publicError(cedarpostv1connect.AuthorizationServiceAuthorizeProcedure, err)
		if got.Code() != connect.CodeFailedPrecondition || got.Message() != err.Error()+"; no decision was given" {
			t.Error(got)
		}
	}
}

// A write that was checked against an older state is tried again. If that does not help,
// the caller gets aborted.
func TestOutdatedWriteIsAborted(t *testing.T) {
	for _, err := range []error{store.ErrPolicyChanged, store.ErrOtherHistory} {
		err = fmt.Errorf("write entities: %w", err)
		if !outdated(err) {
			t.Errorf("%v is not tried again", err)
		}
		if got := publicError(cedarpostv1connect.EntityServiceWriteEntitiesProcedure, err); got.Code() != connect.CodeAborted {
			t.Errorf("%v becomes %v", err, got)
		}
	}
}

// Both texts in which Connect says that a message is too large become invalid_argument.
func TestTooLargeIsNoOverload(t *testing.T) {
	for text, want := range map[string]string{
		"message is larger than configured max 65536":                                        "the question has more than 65536 bytes, the limit",
		"message size 70000 is larger than configured max 65536":                             "the question has 70000 bytes, the limit is 65536",
		"message is larger than configured max 65536 - unable to determine message size: no": "the question has more than 65536 bytes, the limit",
	} {
		got := publicError(cedarpostv1connect.AuthorizationServiceAuthorizeProcedure, connect.NewError(connect.CodeResourceExhausted, text))
		if got.Code() != connect.CodeInvalidArgument || got.Message() != want {
			t.Error(got)
		}
	}
	busy := connect.NewError(connect.CodeResourceExhausted, "other bundles are being checked")
	if got := publicError(cedarpostv1connect.PolicyServiceApplyBundleProcedure, busy); got.Code() != connect.CodeResourceExhausted {
		t.Error(got)
	}
}

// The error of a request with a long text keeps its beginning, its end, its findings and its cause.
func TestLongErrorsAreCut(t *testing.T) {
	cause := errors.New("a cause")
	finding, err := connectproto.NewErrorDetail(&cedarpostv1.BundleFindings{})
	if err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("é", 1<<20)
	for _, err := range []error{
		&refusedError{procedure: cedarpostv1connect.EntityServiceWriteEntitiesProcedure, about: long},
		connect.NewError(connect.CodeInvalidArgument, "this "+long+"others").WithCause(cause).WithDetail(finding),
	} {
		got := publicError(cedarpostv1connect.EntityServiceWriteEntitiesProcedure, err)
		if text := got.Message(); len(text) > maxErrorBytes/2 || !utf8.ValidString(text) || !strings.HasPrefix(text, "this ") || !strings.HasSuffix(text, "others") || !strings.Contains(text, "bytes are left out") {
			t.Errorf("%d bytes: %s", len(text), text)
		}
		if got.Code() == connect.CodeInvalidArgument && (!errors.Is(got.Unwrap(), cause) || len(got.Details()) != 1) {
			t.Errorf("%v, %v", got.Unwrap(), got.Details())
		}
	}
	short := strings.Repeat("a", maxErrorBytes)
	if got := cut(short); got != short {
		t.Errorf("a text of %d bytes is cut to %d", len(short), len(got))
	}
}
