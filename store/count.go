package store

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// Group is what decisions are counted by.
type Group int

// The groups.
const (
	ByPrincipal Group = iota + 1
	ByAction
	// ByPolicy counts a decision once for each policy that determined it.
	ByPolicy
	ByOutcome
	ByResource
	// ByField counts a decision once for each field that it permitted or denied. Allowed and Denied then
	// count what it said about the field.
	ByField
)

// DecisionCount counts the decisions of one group.
type DecisionCount struct {
	// Type and ID are those of the principal, the action or the resource. ID is "bundle/id" for a
	// policy, and the path of a field.
	Type, ID string
	// DeniedAt is the outcome: 0 if allowed.
	DeniedAt        int16
	Allowed, Denied int64
	// Total is the number of decisions in all groups. It is the same in each.
	Total int64
}

// countDecisions is a format for the columns of a group. It counts before it sums up, so
// that parallel workers can share the counting.
const countDecisions = `
		with groups as (
			select %s,
			       count(*) filter (where allowed) as allowed,
			       count(*) filter (where not allowed) as denied
			from decisions r` + decisionFilter + `
			group by 1, 2, 3)
		select type, id, denied_at, allowed, denied, (sum(allowed + denied) over ())::bigint as total
		from groups
		order by allowed + denied desc, type, id, denied_at
		limit $20`

// countByPolicy first counts the lists of policies, of which there are few. A list can
// have a policy twice, once for the object and once for its fields.
const countByPolicy = `
		with lists as (
			select policies,
			       count(*) filter (where allowed) as allowed,
			       count(*) filter (where not allowed) as denied
			from decisions r` + decisionFilter + `
			group by policies)
		select '' as type, policy as id, 0::smallint as denied_at,
		       sum(allowed)::bigint as allowed, sum(denied)::bigint as denied,
		       (select sum(allowed + denied) from lists where policies <> '{}')::bigint as total
		from lists cross join lateral (select distinct unnest(policies) as policy) as of_list
		group by policy
		order by sum(allowed + denied) desc, policy
		limit $20`

// countByField first counts the lists of fields, of which there are few.
const countByField = `
		with lists as (
			select fields, count(*) as decisions
			from decisions r` + decisionFilter + `
			group by fields)
		select '' as type, substr(field, 2) as id, 0::smallint as denied_at,
		       coalesce(sum(decisions) filter (where field like '+%'), 0)::bigint as allowed,
		       coalesce(sum(decisions) filter (where field like '-%'), 0)::bigint as denied,
		       (select coalesce(sum(decisions), 0)::bigint from lists where fields <> '{}') as total
		from lists cross join lateral unnest(fields) as field
		group by substr(field, 2)
		order by sum(decisions) desc, id
		limit $20`

func (g Group) query() string {
	switch g {
	case ByPrincipal:
		return fmt.Sprintf(countDecisions, "principal_type as type, principal_id as id, 0::smallint as denied_at")
	case ByAction:
		return fmt.Sprintf(countDecisions, "action_type as type, action_id as id, 0::smallint as denied_at")
	case ByResource:
		return fmt.Sprintf(countDecisions, "resource_type as type, resource_id as id, 0::smallint as denied_at")
	case ByField:
		return countByField
	case ByPolicy:
		return countByPolicy
	case ByOutcome:
		return fmt.Sprintf(countDecisions, "'' as type, '' as id, case when allowed then 0 else coalesce(denied_at, 0) end::smallint as denied_at")
	}
	panic(fmt.Sprintf("no group %d", g))
}

// countMemory is enough for the groups of a busy day. With less they would go to disk.
const countMemory = "64MB"

// CountDecisions counts decisions by group, the largest groups first.
func (db *DB) CountDecisions(ctx context.Context, q DecisionQuery, by Group) (counts []DecisionCount, err error) {
	defer wrap(&err, "count decisions")
	err = pgx.BeginTxFunc(ctx, db.audit, pgx.TxOptions{AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "set local work_mem = '"+countMemory+"'"); err != nil {
			return err
		}
		rows, _ := tx.Query(ctx, by.query(), q.args()...)
		counts, err = pgx.CollectRows(rows, pgx.RowToStructByName[DecisionCount])
		return err
	})
	return counts, err
}
