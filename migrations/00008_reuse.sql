-- Which decisions were used again from a cache.

-- +goose Up

-- `decisions` are those that an event reports the uses of. The default is for servers
-- from before, which go on while others are replaced.
alter table events add column decisions uuid[] not null default '{}';

-- Few events name any, so the others are left out of the index.
create index events_decisions on events using gin (decisions) where decisions <> '{}';
