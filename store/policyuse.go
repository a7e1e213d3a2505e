package store

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

// useGap is how much later a use must be than the stored one to be stored.
const useGap = time.Minute

// NotePolicyUses stores when policies, each as "bundle/id", last determined a decision. A time that is
// stored already, or within a minute of it, costs no write.
func (db *DB) NotePolicyUses(ctx context.Context, last map[string]time.Time) (err error) {
	defer wrap(&err, "note the uses of policies")
	policies, times := make([]string, 0, len(last)), make([]time.Time, 0, len(last))
	for p, at := range last {
		policies, times = append(policies, p), append(times, at)
	}
	// In a fixed order, so that two servers do not wait for each other.
	_, err = db.admin.Exec(ctx, `
		insert into policy_uses (policy, at)
		select policy, used.at
		from unnest($1::text[], $2::timestamptz[]) as used (policy, at) left join policy_uses stored using (policy)
		where stored.at is null or stored.at < used.at - $3::interval
		order by policy
		on conflict (policy) do update set at = greatest(policy_uses.at, excluded.at)`, policies, times, useGap)
	return err
}

// PolicyUse says what is known about the use of a policy.
type PolicyUse struct {
	// ID is its id in its bundle.
	ID string
	// At is when it last determined a decision that was counted; zero if there is none.
	At time.Time
	// Since is from when on decisions are counted for it: since the database counts them, and the
	// policy was first published.
	Since time.Time
}

// policyUseRow is a row of the query of PolicyUses.
type policyUseRow struct {
	ID    string
	At    *time.Time
	Since time.Time
}

// PolicyUses reads what is known about the uses of policies of a bundle, by id.
func (db *DB) PolicyUses(ctx context.Context, bundle string, ids []string) (_ map[string]PolicyUse, err error) {
	defer wrap(&err, "read the uses of policies")
	rows, _ := db.admin.Query(ctx, `
		select asked.id, u.at, greatest(first.published_at, h.policy_uses_since) as since
		from unnest($2::text[]) as asked (id)
		cross join lateral ( -- looks up each policy, where a join would read all of the bundle
			select min(b.published_at) as published_at
			from policies p join bundles b on b.name = p.bundle and b.since = p.since
			where p.bundle = $1 and p.id = asked.id
		) first
		left join policy_uses u on u.policy = $1 || '/' || asked.id
		cross join history h
		where first.published_at is not null`, bundle, ids)
	list, err := pgx.CollectRows(rows, pgx.RowToStructByName[policyUseRow])
	uses := make(map[string]PolicyUse, len(list))
	for _, r := range list {
		uses[r.ID] = PolicyUse{ID: r.ID, At: orZero(r.At), Since: r.Since}
	}
	return uses, err
}
