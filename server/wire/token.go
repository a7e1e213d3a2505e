package wire

import (
	"encoding/base64"
	"encoding/binary"
	"errors"

	"github.com/google/uuid"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// Token is what a revision's token says. On the wire it is base64url of: one byte 1
// (its format), the database's id (16 bytes), the timeline (4) and the number (8), big
// endian.
type Token struct {
	Database uuid.UUID
	Timeline uint32
	Number   int64
}

const (
	tokenFormat = 1
	tokenBytes  = 1 + 16 + 4 + 8
)

// Revision puts a token on the wire.
func (t Token) Revision() *cedarpostv1.Revision {
	b := make([]byte, 0, tokenBytes)
	b = append(b, tokenFormat)
	b = append(b, t.Database[:]...)
	b = binary.BigEndian.AppendUint32(b, t.Timeline)
	b = binary.BigEndian.AppendUint64(b, uint64(t.Number))
	return &cedarpostv1.Revision{Token: base64.RawURLEncoding.EncodeToString(b), Number: t.Number}
}

var errToken = errors.New("not a revision token of this service")

// ParseToken reads a token. Each has one text only.
func ParseToken(text string) (Token, error) {
	b, err := base64.RawURLEncoding.Strict().DecodeString(text)
	// Line breaks are skipped in decoding: the length shows that there are none.
	if err != nil || len(b) != tokenBytes || len(text) != base64.RawURLEncoding.EncodedLen(tokenBytes) || b[0] != tokenFormat {
		return Token{}, errToken
	}
	t := Token{Timeline: binary.BigEndian.Uint32(b[17:]), Number: int64(binary.BigEndian.Uint64(b[21:]))}
	copy(t.Database[:], b[1:17])
	if t.Number < 0 {
		return Token{}, errToken
	}
	return t, nil
}
