package store

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
)

// Asker says how often a caller asked about an action.
type Asker struct {
	Action UID
	Caller string
	Count  int64
}

// Askers is what [DB.Askers] found.
type Askers struct {
	// List is by count, the largest first, and then by caller and action.
	List []Asker
	// Since is the time from which on all decisions were counted. It is the one that was asked for,
	// unless the time to count in was over before.
	Since time.Time
}

// maxAskerGroups bounds the pairs of a caller and an action that are read for one part of the time.
const maxAskerGroups = 10_000

// selectAskers counts the decisions of one part of the time. It reads the rows of the time by the
// primary key: there is no index by action, because each more costs every commit.
const selectAskers = `
		select action_type, action_id, caller, count(*)
		from decisions r
		where at >= $1 and at < $2 and action_type = any ($3)
		  and (action_type, action_id) in (select * from unnest($3::text[], $4::text[]))
		  and ` + ofBatch + `
		group by action_type, action_id, caller
		order by count(*) desc
		limit $5`

// Askers counts the decisions about some actions from a time on, by caller. It reads the newest decisions
// first, in parts that become longer, and ends after a time: then [Askers.Since] is later than from.
func (db *DB) Askers(ctx context.Context, actions []UID, from, to time.Time, within time.Duration) (found Askers, err error) {
	defer wrap(&err, "count who asked")
	types, ids := make([]string, len(actions)), make([]string, len(actions))
	for i, a := range actions {
		types[i], ids[i] = a.Type, a.ID
	}
	type key struct {
		action UID
		caller string
	}
	counts := map[key]int64{}
	found.Since = to
	ends := time.Now().Add(within)
	err = pgx.BeginTxFunc(ctx, db.audit, pgx.TxOptions{AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		for part := time.Hour; found.Since.After(from); part *= 2 {
			left := time.Until(ends)
			if left < time.Millisecond {
				return nil
			}
			begin := found.Since.Add(-part)
			if begin.Before(from) {
				begin = from
			}
			if _, err := tx.Exec(ctx, "select set_config('statement_timeout', $1, true)", fmt.Sprint(left.Milliseconds())); err != nil {
				return err
			}
			rows, _ := tx.Query(ctx, selectAskers, pgx.QueryExecModeCacheDescribe, begin, found.Since, types, ids, maxAskerGroups)
			var typ, id, caller string
			var n int64
			groups := 0
			_, err := pgx.ForEachRow(rows, []any{&typ, &id, &caller, &n}, func() error {
				counts[key{UID{typ, id}, caller}] += n
				groups++
				return nil
			})
			if err != nil || groups == maxAskerGroups { // then there may be more, and this part was not counted whole
				return err
			}
			found.Since = begin
		}
		return nil
	})
	if sqlState(err) == "57014" { // query_canceled: statement_timeout
		err = nil
	}
	for k, n := range counts {
		found.List = append(found.List, Asker{k.action, k.caller, n})
	}
	slices.SortFunc(found.List, func(a, b Asker) int {
		return cmp.Or(cmp.Compare(b.Count, a.Count), cmp.Compare(a.Caller, b.Caller), a.Action.compare(b.Action))
	})
	return found, err
}
