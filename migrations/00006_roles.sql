-- Who may do what in the database, and how old days of the log go.
--
-- Before this file runs, the roles were made, and all that is here was given to
-- cedarpost_owner, which runs it. A role has no login: who connects takes one on.
-- Nobody but the owner can rewrite the log, and the server never acts as the owner.
-- docs/audit.md has the whole picture.

-- +goose Up

-- A function that runs as the owner must not find what its caller made: pg_temp,
-- which is first where it is not named, comes last.
select set_config('search_path', format('%I, pg_temp', current_schema()), true);
alter function log_append set search_path from current;
alter function log_guard set search_path from current;
alter function create_log_partitions set search_path from current;

-- Functions are for everybody unless it is said otherwise: here, and for later files.
revoke execute on function log_append, log_guard, create_log_partitions from public;
alter default privileges revoke execute on functions from public;

-- The writer appends to the log. Of a partition it knows nothing: to write to the
-- table above is enough.
grant insert on decisions, events to cedarpost_writer;
grant execute on function log_append, log_guard to cedarpost_writer;
grant select on audit_batches to cedarpost_writer; -- a batch whose reply was lost
grant select, insert, update (ended) on audit_writers to cedarpost_writer;
grant select on revision, revisions to cedarpost_writer;

-- The auditor reads the log, what proves it, and the history that decisions were
-- made from. It cannot read keys.
grant select on decisions, events, audit_batches, audit_nodes, checkpoints, audit_writers to cedarpost_auditor;
grant select on revision, revisions, revision_entries, history, entities, bundles, policies, bundle_files
	to cedarpost_auditor;

-- The application does all else. Bundles and keys are never removed.
grant select, update on revision, history to cedarpost_app;
grant select, insert, delete on revisions, revision_entries to cedarpost_app;
grant select, insert, update, delete on entities, imports to cedarpost_app;
grant select, insert, update on bundles, policies, bundle_files, api_keys to cedarpost_app;
grant select on goose_db_version to cedarpost_app, cedarpost_auditor;
-- The sweeper notes what the decisions of a day need.
-- +goose StatementBegin
do $$
begin
	if to_regclass('decision_days') is not null then
		grant select, insert, update, delete on decision_days to cedarpost_app;
	end if;
end
$$;
-- +goose StatementEnd
-- Of the log it knows how much there is, and which revisions that needs. It adds the
-- event of a change in the transaction of the change, and makes tree and checkpoints.
grant select (at, revision) on decisions to cedarpost_app;
grant select (at), insert on events to cedarpost_app;
grant execute on function log_append, create_log_partitions to cedarpost_app;
grant select on audit_batches to cedarpost_app;
grant select, insert, update (ended) on audit_writers to cedarpost_app;
grant select, insert, update on audit_nodes to cedarpost_app;
grant select, insert on checkpoints to cedarpost_app;

-- For how many days a day of the log stays at least. Who serves cannot shorten it.
create table log_retention (
	one  boolean primary key default true check (one),
	days integer not null check (days > 0)
);
insert into log_retention (days) values (30);
grant select on log_retention to cedarpost_app;

-- The second line, for the owner's own mistakes. The setting is that of
-- drop_log_batches, and of no use to others.
-- +goose StatementBegin
create or replace function refuse_rewrite() returns trigger language plpgsql as $$
begin
	if tg_op = 'DELETE' and tg_table_name = 'audit_batches' and current_user = 'cedarpost_owner'
	   and current_setting('cedarpost.drop_log_batches', true) = 'on' then
		return null;
	end if;
	raise exception 'the decision log is append-only: % on % refused', tg_op, tg_table_name
		using errcode = 'restrict_violation';
end
$$;
-- +goose StatementEnd

-- drop_log_day drops a day's partitions and says how many there were. The day must
-- have ended as long ago as log_retention has it, and the log must say that it goes:
-- a retention_drop of that day, committed before. So whoever reads the log learns
-- of each day that is gone.
--
-- To drop a partition locks the table above against all. Writers queue behind that
-- for as long as the lock is waited for, hence not long: who calls tries again.
-- +goose StatementBegin
create function drop_log_day(day date) returns integer language plpgsql security definer
set search_path from current set lock_timeout = '100ms' as $$
declare
	kept    integer;
	whole   text;
	part    regclass;
	dropped integer := 0;
begin
	-- A number for this transaction: what was committed before has a smaller one.
	perform pg_current_xact_id();
	select days into strict kept from log_retention;
	if day is null or day + 1 + kept > now() at time zone 'UTC' then
		raise exception 'the log of % is kept for % days', day, kept using errcode = 'restrict_violation';
	end if;
	perform from events
		join audit_batches on audit_batches.batch = events.batch
		where kind = 'retention_drop' and subject = to_char(drop_log_day.day, 'YYYY-MM-DD')
		  and least(age(events.xmin), age(audit_batches.xmin)) > 0;
	if not found then
		raise exception 'the log does not say yet that % is dropped', day
			using errcode = 'object_not_in_prerequisite_state';
	end if;
	foreach whole in array array['decisions', 'events'] loop
		select inhrelid into part from pg_inherits
		where inhparent = whole::regclass and inhrelid = to_regclass(whole || '_' || to_char(day, 'YYYYMMDD'));
		continue when not found;
		execute format('drop table %s', part);
		dropped := dropped + 1;
	end loop;
	return dropped;
end
$$;
-- +goose StatementEnd
grant execute on function drop_log_day to cedarpost_app;

-- drop_log_batches removes the batches of dropped days before a day, oldest first,
-- about as many as it is told, and says how many. The tree stays as it was: only
-- whole tiles of 256 leaves go, whose hashes are those in audit_nodes, and never the
-- newest, which tells the next leaf. It is for the owner alone.
-- +goose StatementBegin
create function drop_log_batches(before date, most integer) returns integer language plpgsql security definer
set search_path from current as $$
declare
	kept    integer;
	leaf    bigint; -- the first of a tile
	dropped integer := 0;
begin
	select days into strict kept from log_retention;
	if before is null or before + kept > now() at time zone 'UTC' then
		raise exception 'the log before % is kept for % days', before, kept using errcode = 'restrict_violation';
	end if;
	for leaf in
		select distinct seq / 256 * 256 as first
		from (select seq from audit_batches order by seq limit most) as oldest
		order by first
	loop
		perform from audit_batches b
			where b.seq between leaf and leaf + 255
			having count(*) = 256
			   and max(b.day) < before
			   and bool_and(to_regclass('decisions_' || to_char(b.day, 'YYYYMMDD')) is null
			                and to_regclass('events_' || to_char(b.day, 'YYYYMMDD')) is null)
			   and string_agg(sha256('\x00' || b.header), '' order by b.seq)
			       = (select hashes from audit_nodes where level = 0 and tile = leaf / 256)
			   and exists (select from audit_batches where seq > leaf + 255);
		continue when not found;
		perform set_config('cedarpost.drop_log_batches', 'on', true);
		delete from audit_batches where seq between leaf and leaf + 255;
		perform set_config('cedarpost.drop_log_batches', 'off', true);
		dropped := dropped + 256;
	end loop;
	return dropped;
end
$$;
-- +goose StatementEnd
