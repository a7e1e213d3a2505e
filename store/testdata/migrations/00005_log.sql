-- The decision log as a Merkle tree, and records of other kinds in it.
--
-- Each commit to the log is a batch: its rows, and one row in audit_batches, which
-- is a leaf of the tree. docs/audit.md has the format.

-- +goose Up

-- `batch` and `pos` say which leaf of which batch the row is; `crc`, the CRC-32C of the
-- record, proves nothing, but tells which row of a batch is damaged. `fields` are the leaf
-- paths that were decided, "+path" or "-path". `masked` are the keyed hashes that
-- stand in the record for sensitive values.
alter table decisions
	add column fields text[] collate "C" not null default '{}',
	add column masked bytea[] not null default '{}',
	add column batch  uuid not null default '00000000-0000-0000-0000-000000000000',
	add column pos    integer not null default 0,
	add column crc    integer not null default 0;
alter table decisions
	alter column fields drop default,
	alter column masked drop default,
	alter column batch drop default,
	alter column pos drop default;

-- What else is in the log: changes, failed authentication, refused rights, reads of
-- the log, reuse of answers, and what the service did to the log itself.
create table events (
	event_id   uuid        not null,
	at         timestamptz not null,
	kind       text        collate "C" not null,
	caller     text        collate "C" not null,
	server     text        collate "C" not null,
	subject    text        collate "C" not null,
	revision   bigint,
	request_id text        collate "C",
	trace_id   text        collate "C",
	record     bytea       not null,
	batch      uuid        not null,
	pos        integer     not null,
	crc        integer     not null,
	primary key (at, event_id)
) partition by range (at);
create index events_kind on events (kind, at desc, event_id desc);
create index events_caller on events (caller, at desc, event_id desc);
create index events_subject on events (subject, at desc, event_id desc);

create trigger refuse_rewrite before update or delete or truncate on events
	for each statement execute function refuse_rewrite();

-- One row per commit. `header` holds the exact bytes that are hashed; the columns
-- only help to find it. `first_at` and `last_at` bound the time of its rows.
create table audit_batches (
	seq        bigint      primary key check (seq >= 0),
	batch      uuid        not null unique,
	writer     uuid        not null,
	writer_seq bigint      not null,
	rows       integer     not null,
	header     bytea       not null,
	day        date        not null,
	first_at   timestamptz,
	last_at    timestamptz,
	unique (writer, writer_seq)
);
create index audit_batches_day on audit_batches (day);

-- The tree, in tiles of height 8 as C2SP tlog-tiles has them: up to 256 hashes of 32
-- bytes. Only the last tile of a level can be partial, and grows.
create table audit_nodes (
	level  smallint not null,
	tile   bigint   not null,
	hashes bytea    not null,
	primary key (level, tile)
);

-- Signed checkpoints, as they were given out.
create table checkpoints (
	size bigint      not null,
	note bytea       not null,
	at   timestamptz not null default clock_timestamp(),
	origin text      collate "C" not null,
	primary key (origin, size)
);

-- Who writes to the log, so that one that crashed with decisions at risk is known.
-- `bound` is how many answered decisions it could lose.
create table audit_writers (
	writer     uuid        primary key,
	server     text        collate "C" not null,
	bound      integer     not null,
	started_at timestamptz not null default clock_timestamp(),
	ended      boolean     not null default false
);

-- log_append makes a batch the next leaf. The lock is held to the commit, so the
-- order of leaves is the order of commits and none is missing. The batch that a
-- lost reply is tried again for is the same one: whichever attempt is second fails
-- on its unique writer_seq, and its rows go with it.
-- +goose StatementBegin
create function log_append(
	batch uuid, writer uuid, writer_seq bigint, rows integer, header bytea, day date,
	first_at timestamptz, last_at timestamptz
) returns bigint language plpgsql security definer set search_path from current as $$
declare
	leaf bigint;
begin
	perform pg_advisory_xact_lock(hashtextextended('cedarpost.log', 0));
	-- A statement after the lock sees what was committed before it.
	select coalesce(max(b.seq), -1) + 1 into leaf from audit_batches b;
	insert into audit_batches (seq, batch, writer, writer_seq, rows, header, day, first_at, last_at)
	values (leaf, log_append.batch, log_append.writer, log_append.writer_seq, log_append.rows,
	        log_append.header, log_append.day, log_append.first_at, log_append.last_at);
	return leaf;
end
$$;
-- +goose StatementEnd

create trigger refuse_rewrite before update or delete or truncate on audit_batches
	for each statement execute function refuse_rewrite();
create trigger refuse_rewrite before update or delete or truncate on checkpoints
	for each statement execute function refuse_rewrite();

-- create_log_partitions makes the missing daily partitions (UTC days) of decisions
-- and events, TABLE_YYYYMMDD, and says how many it made. A partition is made beside
-- the log and then attached, which unlike CREATE … PARTITION OF does not stop those
-- who are writing to it.
-- +goose StatementBegin
create function create_log_partitions(from_day date, days integer) returns integer
language plpgsql security definer set search_path from current as $$
declare
	whole text;
	day   date;
	part  text;
	made  integer := 0;
begin
	if days > 400 then
		raise exception 'not more than 400 days at once';
	end if;
	perform pg_advisory_xact_lock(hashtextextended('cedarpost.decision_partitions', 0));
	foreach whole in array array['decisions', 'events'] loop
		for i in 0 .. days - 1 loop
			day  := from_day + i;
			part := whole || '_' || to_char(day, 'YYYYMMDD');
			continue when to_regclass(part) is not null;
			execute format('create table %I (like %I including constraints)', part, whole);
			execute format('create trigger refuse_rewrite before update or delete or truncate on %I
				for each statement execute function refuse_rewrite()', part);
			execute format('alter table %I attach partition %I for values from (%L) to (%L)',
				whole, part, day || ' 00:00:00+00', day + 1 || ' 00:00:00+00');
			made := made + 1;
		end loop;
	end loop;
	return made;
end
$$;
-- +goose StatementEnd
drop function create_decision_partitions(date, integer);
