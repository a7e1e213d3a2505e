-- The login that serves can add to policies, data and keys, and cannot rewrite or
-- remove what is stored. What it may no longer do itself, functions of the owner do
-- after they have checked it.

-- +goose Up

-- As in migration 6: a function that runs as the owner must not find what its caller
-- made, so pg_temp comes last.
select set_config('search_path', format('%I, pg_temp', current_schema()), true);

-- Content is never overwritten: all that ever changes in a row is `until`.
revoke update, delete on entities, bundles, policies, bundle_files from cedarpost_app;
grant update (until) on entities, bundles, policies, bundle_files to cedarpost_app;

-- The counter counts; it does not move to another database. The database itself sets
-- the time of a revision, which says how long it is kept, and its mark.
revoke update on revision from cedarpost_app;
grant update (n) on revision to cedarpost_app;
revoke insert, delete on revisions from cedarpost_app;
grant insert (n, caller, note) on revisions to cedarpost_app;
revoke delete on revision_entries from cedarpost_app;

-- The sweep goes through the functions below.
revoke update on history from cedarpost_app;
revoke all on decision_days from cedarpost_app;
revoke select (revision) on decisions from cedarpost_app;

-- A key is added by add_api_key. `since` is the revision that added it: 0 for a key
-- whose revision was swept before there was this column.
revoke insert, update on api_keys from cedarpost_app;
alter table api_keys add column since bigint not null default 0;
update api_keys set since = revision_entries.revision
from revision_entries
where revision_entries.kind = 'key' and revision_entries.id = api_keys.id;

-- add_api_key adds a key. The log must say so, in this transaction: an event of the
-- kind change, about this key, of the newest revision, in a batch.
-- +goose StatementBegin
create function add_api_key(id text, name text, hash bytea, revision bigint) returns void
language plpgsql security definer set search_path from current as $$
begin
	perform from events
		join audit_batches on audit_batches.batch = events.batch
		join revision on revision.n = events.revision
		where events.kind = 'change' and events.subject = add_api_key.id and events.revision = add_api_key.revision
		  and events.xmin = pg_current_xact_id()::xid and audit_batches.xmin = pg_current_xact_id()::xid;
	if not found then
		raise exception 'the log does not say in this transaction that revision % adds the key %', revision, id
			using errcode = 'object_not_in_prerequisite_state';
	end if;
	insert into api_keys (id, name, hash, since)
	values (add_api_key.id, add_api_key.name, add_api_key.hash, add_api_key.revision);
end
$$;
-- +goose StatementEnd

-- audited_keys lists the keys for those who verify them. The hash of a key's secret
-- is hashed once more: what is listed here proves nothing to a server.
-- +goose StatementBegin
create function audited_keys() returns table (id text, name text, hash bytea, revoked boolean, since bigint)
language sql stable security definer set search_path from current as $$
	select api_keys.id, api_keys.name, sha256(api_keys.hash), api_keys.revoked_at is not null, api_keys.since
	from api_keys
$$;
-- +goose StatementEnd

-- decision_partitions lists the days that the decision log has a partition for.
-- +goose StatementBegin
create function decision_partitions() returns table (day date)
language sql stable security definer set search_path from current as $$
	select to_date(right(relname, 8), 'YYYYMMDD')
	from pg_inherits join pg_class on pg_class.oid = inhrelid
	where inhparent = 'decisions'::regclass and relname ~ '^decisions_[0-9]{8}$'
$$;
-- +goose StatementEnd

-- read_decision_day notes in decision_days what the decisions of one more day need,
-- and says which day that was; null: all are noted, up to the day before yesterday.
-- There is no index to tell the smallest revision of a day, so a large one takes its
-- time, once. A decision that is written to a day later than that is from a server
-- whose clock is days behind; its revision is a new one all the same.
-- +goose StatementBegin
create function read_decision_day() returns date language plpgsql security definer
set search_path from current as $$
declare
	unread date;
begin
	select min(day) into unread from decision_partitions()
	where day < (now() at time zone 'UTC')::date - 1
	  and not exists (select from decision_days where decision_days.day = decision_partitions.day);
	if unread is not null then
		insert into decision_days (day, min_revision)
		select unread, min(revision) from decisions
		where at >= unread::timestamp at time zone 'UTC' and at < (unread + 1)::timestamp at time zone 'UTC'
		on conflict do nothing;
	end if;
	return unread;
end
$$;
-- +goose StatementEnd

-- raise_oldest moves the first revision that can be read up to the newest of those
-- made longer ago than keep, or to the smallest that a decision of a past day was
-- made at, and returns it. It never goes down. The decisions of today and yesterday
-- are not in decision_days: at most 48 hours old, they are covered by the shortest
-- time to keep. One hour is kept besides: a decision can be made at a revision that
-- another one replaced seconds before, by a server whose clock is not the database's.
--
-- It looks for the first young revision, and not for the last old one: when the
-- clock was set back meanwhile, rather too much is kept. And it looks from the old
-- end: at most one sweep's worth of revisions is passed.
-- +goose StatementBegin
create function raise_oldest(keep interval) returns bigint language plpgsql security definer
set search_path from current as $$
declare
	bound  bigint;
	raised bigint;
begin
	if keep is null or keep < interval '48 hours' then
		raise exception 'history is kept for 48 hours at least' using errcode = 'restrict_violation';
	end if;
	delete from decision_days where day not in (select day from decision_partitions());
	perform from decision_partitions()
	where day < (now() at time zone 'UTC')::date - 1
	  and not exists (select from decision_days where decision_days.day = decision_partitions.day);
	if found then -- what the decisions of that day need is not known yet
		return (select oldest from history);
	end if;
	select least(revision.n, coalesce((select max(revisions.n) from revisions), 0), (select min(min_revision) from decision_days))
	into strict bound from revision;
	update history
	set oldest = greatest(oldest, coalesce(
		(select revisions.n - 1 from revisions
		 where revisions.n > history.oldest and revisions.n <= bound and at >= now() - keep - interval '1 hour'
		 order by revisions.n limit 1),
		bound))
	returning oldest into strict raised;
	return raised;
end
$$;
-- +goose StatementEnd

-- sweep_history removes rows of a table that only revisions before history.oldest
-- need: at most so many, in the order of an index, from where the call before got to.
-- Without that, each would walk once more over all that those before it removed,
-- which stays in the index as long as some old snapshot may see it.
--
-- The rows of revision oldest itself stay, and so do the newest revision's.
-- +goose StatementBegin
create function sweep_history(whole text, start bigint, most integer, out gone bigint, out last bigint)
language plpgsql security definer set search_path from current as $$
declare
	kept bigint;
begin
	select oldest into strict kept from history;
	if whole = 'entities' then
		with swept as (
			delete from entities
			where ctid = any (array (
				select ctid from entities
				where until >= start and until <= kept
				order by until limit most))
			returning until as n
		)
		select count(*), coalesce(max(n), 0) into gone, last from swept;
	elsif whole = 'revision_entries' then
		with swept as (
			delete from revision_entries
			where ctid = any (array (
				select ctid from revision_entries
				where revision >= start and revision < kept
				order by revision limit most))
			returning revision as n
		)
		select count(*), coalesce(max(n), 0) into gone, last from swept;
	elsif whole = 'revisions' then
		with swept as (
			delete from revisions
			where ctid = any (array (
				select ctid from revisions
				where revisions.n >= start and revisions.n < kept
				order by revisions.n limit most))
			returning revisions.n
		)
		select count(*), coalesce(max(n), 0) into gone, last from swept;
	else
		raise exception '% is not a table of history', whole using errcode = 'invalid_parameter_value';
	end if;
end
$$;
-- +goose StatementEnd

revoke execute on function add_api_key, audited_keys, decision_partitions, read_decision_day, raise_oldest, sweep_history
	from public;
grant execute on function add_api_key, read_decision_day, raise_oldest, sweep_history to cedarpost_app;
grant execute on function audited_keys to cedarpost_auditor;
