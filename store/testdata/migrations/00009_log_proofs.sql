-- What the login of a server could still do to the proofs of the log.

-- +goose Up

select set_config('search_path', format('%I, pg_temp', current_schema()), true);

-- tile_root is the root of the tree over the 256 hashes of a full tile, as RFC 6962,
-- section 2.1 has it.
-- +goose StatementBegin
create function tile_root(hashes bytea) returns bytea language plpgsql immutable strict set search_path from current as $$
begin
	while length(hashes) > 32 loop
		select string_agg(sha256('\x01'::bytea || substring(hashes from i * 64 + 1 for 64)), ''::bytea order by i) into hashes
		from generate_series(0, length(hashes) / 64 - 1) as i;
	end loop;
	return hashes;
end
$$;
-- +goose StatementEnd

-- log_checkpoint stores tiles of the tree, and the checkpoint that covers them. It takes
-- only what follows from the batches: a tile keeps the hashes that it has, a hash of
-- level 0 is that of a header, a hash above is the root of the full tile below it, and
-- the checkpoint names its origin and a size that the log has. The tiles come in order
-- of level. A checkpoint that is there stays. The signature is for verifiers to check.
-- +goose StatementBegin
create function log_checkpoint(
	levels smallint[], tiles bigint[], hashes bytea[], origin text, size bigint, note bytea
) returns void language plpgsql security definer set search_path from current as $$
declare
	wrong text;
begin
	for i in 1 .. coalesce(array_length(levels, 1), 0) loop
		declare
			l constant smallint := levels[i];
			t constant bigint := tiles[i];
			h constant bytea := hashes[i];
			w constant integer := length(hashes[i]) / 32;
			had bytea := '';
			must bytea;
		begin
			if (w between 1 and 256 and w * 32 = length(h)) is not true then
				raise exception 'tile % of level % has % bytes', t, l, length(h) using errcode = 'data_corrupted';
			end if;
			select n.hashes into had from audit_nodes n where n.level = l and n.tile = t for update;
			had := coalesce(had, '');
			if had <> substring(h for length(had)) then
				raise exception 'tile % of level % loses hashes that it has', t, l using errcode = 'data_corrupted';
			end if;
			continue when length(had) = length(h);
			if l = 0 then
				select string_agg(sha256('\x00'::bytea || b.header), ''::bytea order by b.seq) into must
				from audit_batches b
				where b.seq >= t * 256 + length(had) / 32 and b.seq < t * 256 + w;
			else
				select string_agg(tile_root(n.hashes), ''::bytea order by n.tile) into must
				from audit_nodes n
				where n.level = l - 1 and n.tile >= t * 256 + length(had) / 32 and n.tile < t * 256 + w
				  and length(n.hashes) = 8192;
			end if;
			if must is distinct from substring(h from length(had) + 1) then
				raise exception 'tile % of level % is not that of the log', t, l using errcode = 'data_corrupted';
			end if;
			insert into audit_nodes (level, tile, hashes) values (l, t, h)
			on conflict (level, tile) do update set hashes = excluded.hashes;
		end;
	end loop;
	wrong := case
		when log_checkpoint.size is null or log_checkpoint.size <= 0
		     or log_checkpoint.size > (select coalesce(max(seq), -1) + 1 from audit_batches) then 'a size that the log does not have'
		when position(e'\n' in origin) > 0 or substring(note for octet_length(origin || e'\n' || size || e'\n'))
		     is distinct from convert_to(origin || e'\n' || size || e'\n', 'UTF8') then 'a text of another origin or size'
	end;
	if wrong is not null then
		raise exception 'the checkpoint of size % has %', size, wrong using errcode = 'data_corrupted';
	end if;
	insert into checkpoints (origin, size, note)
	values (log_checkpoint.origin, log_checkpoint.size, log_checkpoint.note)
	on conflict do nothing;
end
$$;
-- +goose StatementEnd

revoke insert, update on audit_nodes from cedarpost_app;
revoke insert on checkpoints from cedarpost_app;
grant execute on function log_checkpoint to cedarpost_app;

-- drop_log_day also demands that the day is the oldest one, so that the record of the
-- last dropped day says that all days before it are gone; and that the log has the root
-- of all stored data on a later day, which the history after it is proven from.
-- +goose StatementBegin
create or replace function drop_log_day(day date) returns integer language plpgsql security definer
set search_path from current set lock_timeout = '100ms' as $$
declare
	kept    integer;
	whole   text;
	part    regclass;
	oldest  date;
	dropped integer := 0;
begin
	-- A number for this transaction: what was committed before has a smaller one.
	perform pg_current_xact_id();
	select days into strict kept from log_retention;
	if day is null or day + 1 + kept > now() at time zone 'UTC' then
		raise exception 'the log of % is kept for % days', day, kept using errcode = 'restrict_violation';
	end if;
	select min(to_date(substring(relname from '_([0-9]{8})$'), 'YYYYMMDD')) into oldest
	from pg_inherits join pg_class on pg_class.oid = inhrelid
	where inhparent in ('decisions'::regclass, 'events'::regclass);
	if oldest < day then
		raise exception 'the log of % is dropped only after that of %', day, oldest using errcode = 'restrict_violation';
	end if;
	perform from events
		join audit_batches on audit_batches.batch = events.batch
		where kind = 'state_root' and at >= (drop_log_day.day + 1)::timestamp at time zone 'UTC'
		limit 1;
	if not found then
		raise exception 'the log has no root of the stored data of a day after %', day using errcode = 'restrict_violation';
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
