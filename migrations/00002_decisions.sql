-- The decision log.
--
-- There is no default partition on purpose: a row that has none must be refused,
-- since it would sit in the way of the partition that comes later.

-- +goose Up

-- `at` is the millisecond time inside the UUIDv7, so an id tells its partition.
-- `denied_at` is 1 function, 2 object, 3 field. `policies` are "bundle/id".
-- `record` holds the exact bytes of the record; the columns only help to find it.
--
-- The primary key is in the order of pages, newest last, so one index serves the
-- look-up of an id and the pages of an unfiltered query.
create table decisions (
	decision_id    uuid        not null,
	at             timestamptz not null,
	revision       bigint      not null,
	caller         text        collate "C" not null,
	server         text        collate "C" not null,
	principal_type text        collate "C" not null,
	principal_id   text        collate "C" not null,
	action_type    text        collate "C" not null,
	action_id      text        collate "C" not null,
	resource_type  text        collate "C" not null,
	resource_id    text        collate "C" not null,
	allowed        boolean     not null,
	denied_at      smallint    check (denied_at between 1 and 3),
	policies       text[]      collate "C" not null,
	request_id     text        collate "C",
	trace_id       text        collate "C",
	record         bytea       not null,
	primary key (at, decision_id)
) partition by range (at);

create index decisions_principal on decisions (principal_type, principal_id, at desc, decision_id desc);
create index decisions_resource on decisions (resource_type, resource_id, at desc, decision_id desc);
create index decisions_denied on decisions (at desc, decision_id desc) where not allowed;
create index decisions_request on decisions (request_id) where request_id is not null;

-- +goose StatementBegin
create function refuse_rewrite() returns trigger language plpgsql as $$
begin
	raise exception 'the decision log is append-only: % on % refused', tg_op, tg_table_name
		using errcode = 'restrict_violation';
end
$$;
-- +goose StatementEnd

-- Statement triggers of the parent do not fire for its partitions: each
-- partition gets its own below.
create trigger refuse_rewrite before update or delete or truncate on decisions
	for each statement execute function refuse_rewrite();

-- create_decision_partitions makes the missing daily partitions (UTC days)
-- decisions_YYYYMMDD from from_day on, and says how many it made. A partition is
-- made beside the log and then attached, which unlike CREATE … PARTITION OF does
-- not stop those who are writing to it.
-- +goose StatementBegin
create function create_decision_partitions(from_day date, days integer) returns integer language plpgsql as $$
declare
	day  date;
	part text;
	made integer := 0;
begin
	perform pg_advisory_xact_lock(hashtextextended('cedarpost.decision_partitions', 0));
	for i in 0 .. days - 1 loop
		day  := from_day + i;
		part := 'decisions_' || to_char(day, 'YYYYMMDD');
		continue when to_regclass(part) is not null;
		execute format('create table %I (like decisions including constraints)', part);
		execute format('create trigger refuse_rewrite before update or delete or truncate on %I
			for each statement execute function refuse_rewrite()', part);
		execute format('alter table decisions attach partition %I for values from (%L) to (%L)',
			part, day || ' 00:00:00+00', day + 1 || ' 00:00:00+00');
		made := made + 1;
	end loop;
	return made;
end
$$;
-- +goose StatementEnd
