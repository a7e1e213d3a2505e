package servertest

import (
	"fmt"
	"testing"
)

// MustStoreHeavy stores users deep0, deep1, … of the shop, as somebody does who writes entities to
// slow down others. Each is suspended, and is in the same n roles. All those are in the same 1,000
// other roles, whose names have 1 KB. So there are few entities, and n MB of parents.
//
// It writes to the table itself: writes through the service would take much longer.
func MustStoreHeavy(t *testing.T, s *Server, users, n int) {
	t.Helper()
	conn := Session(t, s.URL)
	MustExec(t, conn, "drop index entities_parents") // takes most of the time, and no decision uses it
	MustExec(t, conn, fmt.Sprintf(`
		insert into entities (type, id, attrs, tags, parents, since)
		select 'Shop::Role', 'mid' || i, '{}', '{}', many.parents, revision.n
		from generate_series(1, %d) as i,
		     (select array_agg('Shop::Role ' || lpad(i::text, 4, '0') || repeat('r', 1000)) as parents from generate_series(1, 1000) as i) as many,
		     revision`, n))
	MustExec(t, conn, fmt.Sprintf(`
		insert into entities (type, id, attrs, tags, parents, since)
		select 'Shop::User', 'deep' || i, '{"region": "eu", "suspended": true}', '{}', mids.parents, revision.n
		from generate_series(0, %d) as i, (select array_agg('Shop::Role mid' || i) as parents from generate_series(1, %d) as i) as mids, revision`, users-1, n))
}
