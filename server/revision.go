package server

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"errors"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/store"
)

// A revision token is base64url of: one byte 1 (its format), the database's id
// (16 bytes), the timeline (4) and the number (8), big endian.
const (
	tokenFormat = 1
	tokenBytes  = 1 + 16 + 4 + 8
)

// encodeRevision puts a revision of the position's database on the wire.
func encodeRevision(p store.Position, number int64) *cedarpostv1.Revision {
	b := make([]byte, 0, tokenBytes)
	b = append(b, tokenFormat)
	b = append(b, p.Database[:]...)
	b = binary.BigEndian.AppendUint32(b, p.Timeline)
	b = binary.BigEndian.AppendUint64(b, uint64(number))
	return &cedarpostv1.Revision{Token: base64.RawURLEncoding.EncodeToString(b), Number: number}
}

var errToken = errors.New("not a revision token of this service")

// parseToken reads a token into the position it names.
func parseToken(token string) (store.Position, error) {
	b, err := base64.RawURLEncoding.Strict().DecodeString(token)
	if err != nil || len(b) != tokenBytes || b[0] != tokenFormat {
		return store.Position{}, errToken
	}
	p := store.Position{
		Timeline: binary.BigEndian.Uint32(b[17:]),
		Number:   int64(binary.BigEndian.Uint64(b[21:])),
	}
	copy(p.Database[:], b[1:17])
	if p.Number < 0 {
		return store.Position{}, errToken
	}
	return p, nil
}

// decodeRevision reads a revision from the wire and refuses one that another
// database, or an abandoned timeline of this one, gave out. The latter is no mistake
// of the caller, who has to begin afresh.
func decodeRevision(here store.Position, r *cedarpostv1.Revision) (int64, error) {
	p, err := parseToken(r.GetToken())
	if err != nil {
		return 0, connect.Errorf(connect.CodeInvalidArgument, "revision: %s", err)
	}
	if !bytes.Equal(p.Database[:], here.Database[:]) {
		return 0, connect.NewError(connect.CodeAborted, "revision: the token was given out by another database")
	}
	if p.Timeline != here.Timeline {
		return 0, connect.NewError(connect.CodeAborted, "revision: the token was given out before a failover; read again and use a new one")
	}
	return p.Number, nil
}
