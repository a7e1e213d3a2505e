package server

import (
	"context"
	"crypto/sha256"
	"errors"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"

	"github.com/cedarpost/cedarpost/store"
)

// errOtherRequest is the error of an idempotency key that is used for another request.
var errOtherRequest = connect.NewError(connect.CodeAlreadyExists, "idempotency_key: it was used for another request within the last day; take a new key")

// once is the idempotency key of a call, which makes its write happen once. It is nil for calls
// without a key.
type once struct {
	key     string
	request [sha256.Size]byte
}

// writeOnce calls write, unless the caller has made the same request with the same key before: then it
// reads the stored answer into answer, which is empty before, and returns it. Without a key it always
// calls write. request is all that the caller asks for.
func writeOnce[A proto.Message](ctx context.Context, db *store.DB, procedure, key string, request proto.Message, answer A, write func(*once) (A, error)) (A, error) {
	if key == "" {
		return write(nil)
	}
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(request)
	if err != nil {
		return answer, err
	}
	o := &once{key, sha256.Sum256(append([]byte(procedure+"\x00"), b...))}
	if err := o.read(ctx, db, answer); !errors.Is(err, store.ErrNotFound) {
		return answer, err
	}
	if err := db.MayKeep(ctx, callerFrom(ctx)); err != nil {
		return answer, err
	}
	made, err := write(o)
	if err != nil {
		// Another call with the same key may have been faster, or this write was committed and the
		// reply of the database was lost.
		if again := o.read(ctx, db, answer); again == nil || errors.Is(again, errOtherRequest) {
			return answer, again
		}
	}
	return made, err
}

// read reads the answer that is stored for the key. The error is [store.ErrNotFound] if there is none,
// and errOtherRequest if it is the answer to another request.
func (o *once) read(ctx context.Context, db *store.DB, answer proto.Message) error {
	request, b, err := db.Answered(ctx, callerFrom(ctx), o.key)
	if err != nil {
		return err
	}
	if request != o.request {
		return errOtherRequest
	}
	return proto.Unmarshal(b, answer)
}

// keep returns what the store needs to store the answer together with the write.
func keep[R any](o *once, answer func(R) proto.Message) *store.Once[R] {
	if o == nil {
		return nil
	}
	return &store.Once[R]{Key: o.key, Request: o.request, Answer: func(r R) ([]byte, error) { return proto.Marshal(answer(r)) }}
}
