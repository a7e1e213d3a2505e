package server

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"regexp"

	"connectrpc.com/connect/v2/connectproto"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/cedarpost/cedarpost/server/wire"
)

// strictBinary refuses fields that the contract does not know, fields that are sent twice, and
// deep nesting. A question that is understood only in part could be decided wrongly.
type strictBinary struct{ *connectproto.BinaryCodec }

// UnmarshalRead implements connect.Codec.
func (c strictBinary) UnmarshalRead(_ context.Context, src io.Reader, msg any) error {
	m, ok := msg.(proto.Message)
	if !ok {
		return fmt.Errorf("%T is not a message", msg)
	}
	data, err := readAll(src)
	if err != nil {
		return err
	}
	if err := wire.CheckFields(data, m.ProtoReflect().Descriptor()); err != nil {
		return cleanDecodeError(err)
	}
	return cleanDecodeError(c.UnmarshalOptions.Unmarshal(data, m))
}

// readAll reads a message. Connect uses the buffer of the message again, so whoever decodes the result
// must copy from it.
func readAll(src io.Reader) ([]byte, error) {
	if buffer, ok := src.(*bytes.Buffer); ok {
		return buffer.Bytes(), nil
	}
	return io.ReadAll(src)
}

// strictJSON refuses unknown fields and deep nesting. It also writes empty lists and false,
// because "permitted": [] is an answer.
type strictJSON struct{ *connectproto.JSONCodec }

func newStrictJSON() strictJSON {
	c := connectproto.NewJSONCodec()
	c.UnmarshalOptions = protojson.UnmarshalOptions{RecursionLimit: maxNesting}
	c.MarshalOptions = protojson.MarshalOptions{EmitDefaultValues: true}
	return strictJSON{c}
}

// UnmarshalRead implements connect.Codec.
func (c strictJSON) UnmarshalRead(ctx context.Context, src io.Reader, msg any) error {
	data, err := readAll(src)
	if err != nil {
		return err
	}
	if wire.ReadJSON(data, msg) {
		return nil
	}
	return cleanDecodeError(c.JSONCodec.UnmarshalRead(ctx, bytes.NewReader(data), msg))
}

// MarshalWrite implements connect.Codec.
func (c strictJSON) MarshalWrite(ctx context.Context, dst io.Writer, msg any) error {
	if buffer, ok := dst.(*bytes.Buffer); ok {
		if data, ok := wire.AppendJSON(buffer.AvailableBuffer(), msg); ok {
			_, err := buffer.Write(data)
			return err
		}
	}
	return c.JSONCodec.MarshalWrite(ctx, dst, msg)
}

// protoPrefix matches the prefix of errors of the protobuf module. The kind of space in it
// differs from build to build.
var protoPrefix = regexp.MustCompile(`^proto:[\s\x{a0}]*`)

// jwt matches what looks like an access token. The error of a value in the wrong place repeats the value,
// and is logged. A token must not be in it.
var jwt = regexp.MustCompile(`[\w-]{8,}\.[\w-]{8,}\.[\w-]*`)

// decodeError is the error of a body that does not decode. Its text is for the caller.
type decodeError struct {
	msg   string
	cause error
}

func (e *decodeError) Error() string { return e.msg }

func (e *decodeError) Unwrap() error { return e.cause }

func cleanDecodeError(err error) error {
	if err == nil {
		return nil
	}
	text := protoPrefix.ReplaceAllString(err.Error(), "")
	return &decodeError{jwt.ReplaceAllString(text, "(a token)"), err}
}
