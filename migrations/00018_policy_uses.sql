-- When policies last determined a decision.

-- +goose Up

-- policy is "bundle/id". A server stores the uses that it counted every ten seconds. They are counted since
-- policy_uses_since. There are never more rows than policies, which are never removed.
create table policy_uses (
	policy text        collate "C" primary key,
	at     timestamptz not null
);
grant select, insert, update on policy_uses to cedarpost_app;
alter table history add column policy_uses_since timestamptz not null default clock_timestamp();
