package server

import (
	"bytes"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/wire"
	"github.com/cedarpost/cedarpost/store"
)

// encodeRevision puts a revision of the position's database on the wire.
func encodeRevision(p store.Position, number int64) *cedarpostv1.Revision {
	return wire.Token{Database: p.Database, Timeline: p.Timeline, Number: number}.Revision()
}

// parseToken reads a token into the position it names.
func parseToken(token string) (store.Position, error) {
	t, err := wire.ParseToken(token)
	return store.Position{Database: t.Database, Timeline: t.Timeline, Number: t.Number}, err
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
