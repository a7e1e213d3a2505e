-- Marks of revisions, how far back history goes, and imports under way.

-- +goose Up

-- The mark tells a revision from another one of the same number: after a failover
-- a number can be given out again for another content. Unlike the timeline of the
-- write-ahead log, it can be read on a standby.
alter table revisions add column mark uuid not null default gen_random_uuid();

-- Revisions below oldest can no longer be read: the sweeper moves it up first, and
-- then removes what only they need.
create table history (
	one    boolean primary key default true check (one),
	oldest bigint  not null default 0
);
insert into history default values;

-- How far each unfinished import got. It moves in the transaction of each chunk, so
-- that an import that was cut off goes on where it ended, and nothing is put twice.
create table imports (
	id         text        collate "C" primary key,
	entities   bigint      not null,
	revision   bigint      not null,
	caller     text        not null,
	updated_at timestamptz not null default clock_timestamp()
);
