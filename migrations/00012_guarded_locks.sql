-- Logins without rights cannot stop the service, and a change of the API keys that was made by
-- hand is noticed like any other one.

-- +goose Up

-- As in migration 6: a function that runs as the owner must not find what its caller
-- made, so pg_temp comes last.
select set_config('search_path', format('%I, pg_temp', current_schema()), true);

-- The locks of the service. Every login that can connect can hold any advisory lock, so
-- the service locks these views instead, which needs a right on them. A view is never
-- vacuumed, so its lock can be held for days. The mode is always SHARE UPDATE EXCLUSIVE,
-- the weakest one that excludes itself. Postgres takes the weaker modes of a statement before
-- it looks up rights, so every login can hold them; they do not conflict with this one. The view migration_lock is older
-- than all migrations: migrate makes it.
create view log_lock as select true as one;        -- the next leaf of the log
create view signer_lock as select true as one;     -- signs the log
create view sweep_lock as select true as one;      -- removes old history
create view state_root_lock as select true as one; -- records the state root of a day
create view retention_lock as select true as one;  -- drops old days of the log
-- LOCK demands one of the rights to write, and a view without a table has nothing to write.
grant update on signer_lock, sweep_lock, state_root_lock, retention_lock to cedarpost_app;

-- log_append is that of migration 9 with another lock.
-- +goose StatementBegin
create or replace function log_append(
	batch uuid, writer uuid, writer_seq bigint, rows integer, header bytea, day date,
	first_at timestamptz, last_at timestamptz
) returns bigint language plpgsql security definer set search_path from current as $$
declare
	leaf bigint;
begin
	if (rows between 0 and 100000 and writer_seq >= 0 and octet_length(header) <= 65536
	    and day between date '2000-01-01' and date '9999-12-31'
	    and (first_at is null) = (rows = 0) and (last_at is null) = (rows = 0)
	    and coalesce(first_at between timestamptz '2000-01-01 00:00:00+00' and last_at, true)
	    and coalesce(last_at < timestamptz '9999-12-31 00:00:00+00', true)) is not true then
		raise exception 'this is not a batch of the log' using errcode = 'data_corrupted';
	end if;
	lock table log_lock in share update exclusive mode;
	-- A statement after the lock sees what was committed before it.
	select coalesce(max(b.seq), -1) + 1 into leaf from audit_batches b;
	insert into audit_batches (seq, batch, writer, writer_seq, rows, header, day, first_at, last_at)
	values (leaf, log_append.batch, log_append.writer, log_append.writer_seq, log_append.rows,
	        log_append.header, log_append.day, log_append.first_at, log_append.last_at);
	return leaf;
end
$$;
-- +goose StatementEnd

-- create_log_partitions is that of migration 9 with another lock: the one on decisions that
-- attaching a partition takes anyway. It does not wait for those who write to the log.
-- +goose StatementBegin
create or replace function create_log_partitions(from_day date, days integer) returns integer
language plpgsql security definer set search_path from current set datestyle = 'ISO, YMD' as $$
declare
	whole text;
	day   date;
	part  text;
	made  integer := 0;
begin
	if days > 400 then
		raise exception 'not more than 400 days at once';
	end if;
	if (from_day between date '2000-01-01' and date '9998-01-01') is not true then
		raise exception 'the log has no day %', from_day using errcode = 'invalid_parameter_value';
	end if;
	lock table only decisions in share update exclusive mode;
	foreach whole in array array['decisions', 'events'] loop
		for i in 0 .. days - 1 loop
			day  := from_day + i;
			part := whole || '_' || to_char(day, 'YYYYMMDD');
			continue when to_regclass(part) is not null;
			execute format('create table %I (like %I including constraints)', part, whole);
			execute format('create trigger refuse_rewrite before update or delete or truncate on %I
				for each statement execute function refuse_rewrite()', part);
			execute format('alter table %I attach partition %I for values from (%L) to (%L)',
				whole, part, to_char(day, 'YYYY-MM-DD') || ' 00:00:00+00', to_char(day + 1, 'YYYY-MM-DD') || ' 00:00:00+00');
			made := made + 1;
		end loop;
	end loop;
	return made;
end
$$;
-- +goose StatementEnd

-- How often the API keys changed. Servers read them again when it has grown, so a key that
-- is revoked or deleted by hand ends as fast as any other one, although no revision says so.
alter table history add column key_changes bigint not null default 0;

-- +goose StatementBegin
create function count_key_change() returns trigger language plpgsql security definer set search_path from current as $$
begin
	update history set key_changes = key_changes + 1;
	perform pg_notify('cedarpost_revision', '');
	return null;
end
$$;
-- +goose StatementEnd
create trigger count_key_change after insert or update or delete or truncate on api_keys
	for each statement execute function count_key_change();
-- Always: also in a session that has turned triggers off with session_replication_role.
alter table api_keys enable always trigger count_key_change;
revoke execute on function count_key_change from public;
