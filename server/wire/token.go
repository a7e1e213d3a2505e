package wire

import (
	"encoding/base64"
	"encoding/binary"
	"errors"

	"github.com/google/uuid"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// Token is the content of a revision's token. Its text is base64url of: one byte 2 (the
// format), the database's id (16 bytes), the timeline (4), the number (8), the number of the
// anchor (8) and the mark of the anchor (16), numbers big endian.
//
// The mark of a revision is a random id that is made with it. After a restore the same
// number is used again, for other content and with another mark.
//
// The anchor is a revision of the same history: that of the token or a later one. A
// history with a revision that has the number and the mark of the anchor has the revision
// of the token too.
type Token struct {
	Database uuid.UUID
	Timeline uint32
	Number   int64
	// Anchor is the number of the anchor, at least Number, and Mark is its mark. Only
	// revision 0, the empty database, has no mark.
	Anchor int64
	Mark   uuid.UUID
}

const (
	tokenFormat = 2
	tokenBytes  = 1 + 16 + 4 + 8 + 8 + 16
)

// Revision makes the message of a token.
func (t Token) Revision() *cedarpostv1.Revision {
	b := make([]byte, 0, tokenBytes)
	b = append(b, tokenFormat)
	b = append(b, t.Database[:]...)
	b = binary.BigEndian.AppendUint32(b, t.Timeline)
	b = binary.BigEndian.AppendUint64(b, uint64(t.Number))
	b = binary.BigEndian.AppendUint64(b, uint64(t.Anchor))
	b = append(b, t.Mark[:]...)
	return &cedarpostv1.Revision{Token: base64.RawURLEncoding.EncodeToString(b), Number: t.Number}
}

var errToken = errors.New("not a revision token of this service")

// ParseToken reads a token. Each token has exactly one text.
func ParseToken(text string) (Token, error) {
	b, err := base64.RawURLEncoding.Strict().DecodeString(text)
	// Decoding skips line breaks. The length shows that there are none.
	if err != nil || len(b) != tokenBytes || len(text) != base64.RawURLEncoding.EncodedLen(tokenBytes) || b[0] != tokenFormat {
		return Token{}, errToken
	}
	t := Token{
		Timeline: binary.BigEndian.Uint32(b[17:]), Number: int64(binary.BigEndian.Uint64(b[21:])),
		Anchor: int64(binary.BigEndian.Uint64(b[29:])),
	}
	copy(t.Database[:], b[1:17])
	copy(t.Mark[:], b[37:])
	if t.Number < 0 || t.Anchor < t.Number || (t.Anchor == 0) != (t.Mark == uuid.Nil) {
		return Token{}, errToken
	}
	return t, nil
}
