-- A commit to the log costs less: one call for everything around its rows, and one index in place
-- of two large ones.

-- +goose Up

-- As in migration 6: a function that runs as the owner must not find what its caller
-- made, so pg_temp comes last.
select set_config('search_path', format('%I, pg_temp', current_schema()), true);

-- Hashes of principal and resource, to find decisions by. Two indexes on the names themselves
-- took more than half of the time of a COPY, because each row has its place somewhere in them. Here
-- a new row is appended to the list of pending entries, and merge_log_keys sorts many of them
-- into the index at once. A query reads the list, too. Without merges, the list grows to 32 MB; then
-- the commit that fills it merges.
--
-- store/decision.go has the same expression. `migrate` has made the index of each partition before
-- this file runs, so no build of it stops those who write to the log.
create index decisions_keys on decisions using gin ((array[
	hashtextextended(principal_id, hashtextextended(principal_type, 0)),
	hashtextextended(resource_id, hashtextextended(resource_type, 1))
])) with (gin_pending_list_limit = 32768);
drop index decisions_principal;
drop index decisions_resource;

-- merge_log_keys sorts the pending entries of the days around today into decisions_keys, and
-- says how many pages they had. It does not stop those who write to the log.
-- +goose StatementBegin
create function merge_log_keys() returns bigint language plpgsql security definer set search_path from current as $$
declare
	part  regclass;
	pages bigint := 0;
begin
	for part in
		select indexrelid
		from pg_inherits join pg_index on indexrelid = inhrelid
		where inhparent = 'decisions_keys'::regclass
		  and indrelid in (select to_regclass('decisions_' || to_char(now() at time zone 'UTC' + n * interval '1 day', 'YYYYMMDD'))
		                   from generate_series(-1, 1) as n)
	loop
		pages := pages + gin_clean_pending_list(part);
	end loop;
	return pages;
end
$$;
-- +goose StatementEnd
revoke execute on function merge_log_keys from public;
grant execute on function merge_log_keys to cedarpost_app;

-- append_batch makes a batch the next leaf, as log_append did, and does everything else that a
-- commit of decisions needs, because each statement of a commit costs as much as some rows:
-- it makes the commit wait for the disk, refuses the batch if this database lacks the revision
-- that the decisions were made at (null: no decisions), and returns the newest revision.
--
-- log_append refuses what no batch can be. Nobody could take it away again, and whoever
-- reads the log would have to bear it. A header is text of some lines.
-- +goose StatementBegin
create function append_batch(
	batch uuid, writer uuid, writer_seq bigint, rows integer, header bytea, day date,
	first_at timestamptz, last_at timestamptz, revision bigint, mark uuid,
	out leaf bigint, out database uuid, out timeline bigint, out newest bigint, out newest_mark uuid
) language plpgsql security definer set search_path from current as $$
declare
	known boolean;
begin
	if (rows between 0 and 100000 and writer_seq >= 0 and octet_length(header) <= 65536
	    and day between date '2000-01-01' and date '9999-12-31'
	    and (first_at is null) = (rows = 0) and (last_at is null) = (rows = 0)
	    and coalesce(first_at between timestamptz '2000-01-01 00:00:00+00' and last_at, true)
	    and coalesce(last_at < timestamptz '9999-12-31 00:00:00+00', true)) is not true then
		raise exception 'this is not a batch of the log' using errcode = 'data_corrupted';
	end if;
	if current_setting('synchronous_commit') <> 'on' then
		perform set_config('synchronous_commit', 'on', true); -- to the end of the transaction
	end if;
	-- pg_walfile_name starts with the timeline in eight hex digits.
	select r.database, ('x' || left(pg_walfile_name(pg_current_wal_lsn()), 8))::bit(32)::bigint, r.n,
	       coalesce(s.mark, '00000000-0000-0000-0000-000000000000'),
	       append_batch.revision is null or exists (
	       	select from revisions g where g.n = append_batch.revision and g.mark = append_batch.mark)
	into append_batch.database, timeline, newest, newest_mark, known
	from revision r left join revisions s on s.n = r.n;
	if known is not true then
		raise exception 'revision % is not one of this database', append_batch.revision using errcode = 'CP001';
	end if;
	lock table log_lock in share update exclusive mode;
	-- A statement after the lock sees what was committed before it.
	insert into audit_batches (seq, batch, writer, writer_seq, rows, header, day, first_at, last_at)
	values ((select coalesce(max(b.seq), -1) + 1 from audit_batches b), append_batch.batch, append_batch.writer,
	        append_batch.writer_seq, append_batch.rows, append_batch.header, append_batch.day,
	        append_batch.first_at, append_batch.last_at)
	returning seq into leaf;
end
$$;
-- +goose StatementEnd
revoke execute on function append_batch from public;
grant execute on function append_batch to cedarpost_writer;

-- log_append is append_batch for the event of a change, whose transaction holds its revision.
-- Servers from before this migration append all batches with it.
-- +goose StatementBegin
create or replace function log_append(
	batch uuid, writer uuid, writer_seq bigint, rows integer, header bytea, day date,
	first_at timestamptz, last_at timestamptz
) returns bigint language plpgsql security definer set search_path from current as $$
begin
	return (select a.leaf from append_batch(log_append.batch, log_append.writer, log_append.writer_seq, log_append.rows,
	        log_append.header, log_append.day, log_append.first_at, log_append.last_at, null, null) a);
end
$$;
-- +goose StatementEnd
