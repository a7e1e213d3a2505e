-- A copy of a database is another database: it gets an id of its own, so that what the
-- original gave out means nothing there.

-- +goose Up

-- As in migration 6: a function that runs as the owner must not find what its caller
-- made, so pg_temp comes last.
select set_config('search_path', format('%I, pg_temp', current_schema()), true);

-- Where the database was when its id was made: the cluster's system identifier, and the
-- oid of the database in it. A physical standby has the same ones. A restored dump, a
-- database made from a template, and an upgraded cluster have others. Null: not known
-- yet.
alter table revision add column home text;

-- database_home is where this database is. Where the system identifier cannot be read,
-- as in some services that are not quite Postgres, copies within a cluster alone are
-- noticed.
-- +goose StatementBegin
create function database_home() returns text language plpgsql stable security definer
set search_path from current as $$
declare
	cluster text := 'unknown';
	place   text;
begin
	begin
		select system_identifier into cluster from pg_control_system();
	exception when insufficient_privilege or undefined_function or feature_not_supported then
		null;
	end;
	select oid into strict place from pg_database where datname = current_database();
	return cluster || ' ' || place;
end
$$;
-- +goose StatementEnd

-- database_is_copy says whether the id of this database was made for another one.
-- +goose StatementBegin
create function database_is_copy() returns boolean language sql stable security definer
set search_path from current as $$
	select home is not null and home <> database_home() from revision
$$;
-- +goose StatementEnd

-- renew_database gives this database a new id, always, and returns the old one and the
-- new one. It is for the owner: a copy of the files has the home of the original.
-- +goose StatementBegin
create function renew_database(out before uuid, out after uuid) language plpgsql security definer
set search_path from current as $$
declare
	newest bigint;
begin
	select database, n into strict before, newest from revision for update;
	after := gen_random_uuid();
	update revision set database = after, home = database_home();
	perform pg_notify('cedarpost_revision', newest::text);
end
$$;
-- +goose StatementEnd

-- claim_database is renew_database for a copy, and returns no row for anything else. A
-- database whose home is not known gets this one. The lock is that of revisions: of
-- several that call it at once, one renews.
-- +goose StatementBegin
create function claim_database() returns table (before uuid, after uuid) language plpgsql security definer
set search_path from current as $$
declare
	was text;
begin
	select home into strict was from revision for update;
	if was is null then
		update revision set home = database_home();
	elsif was <> database_home() then
		return query select r.before, r.after from renew_database() r;
	end if;
end
$$;
-- +goose StatementEnd

revoke execute on function database_home, database_is_copy, renew_database, claim_database from public;
grant execute on function database_is_copy, claim_database to cedarpost_app;
