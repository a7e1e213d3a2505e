-- API keys end: by expiry, and by revocation through the service. The service's own grants need
-- no table: they are entities of the type Cedarpost::Grant, with their history and their events.

-- +goose Up

-- As in migration 6: a function that runs as the owner must not find what its caller
-- made, so pg_temp comes last.
select set_config('search_path', format('%I, pg_temp', current_schema()), true);

-- expires_at is when the key ends; null: never. until is the revision that revoked it; a key
-- that was revoked by hand has revoked_at alone.
alter table api_keys add column expires_at timestamptz, add column until bigint;

-- add_api_key is that of migration 10 with an end. Servers older than this migration cannot add
-- keys any more.
drop function add_api_key(text, text, bytea, bigint);
-- +goose StatementBegin
create function add_api_key(id text, name text, hash bytea, expires_at timestamptz, revision bigint) returns void
language plpgsql security definer set search_path from current as $$
begin
	perform logged_key_change(add_api_key.id, add_api_key.revision);
	insert into api_keys (id, name, hash, expires_at, since)
	values (add_api_key.id, add_api_key.name, add_api_key.hash, add_api_key.expires_at, add_api_key.revision);
end
$$;
-- +goose StatementEnd

-- revoke_api_key ends a key. The log must say so, as for add_api_key.
-- +goose StatementBegin
create function revoke_api_key(id text, revision bigint) returns void
language plpgsql security definer set search_path from current as $$
begin
	perform logged_key_change(revoke_api_key.id, revoke_api_key.revision);
	update api_keys set revoked_at = clock_timestamp(), until = revoke_api_key.revision
	where api_keys.id = revoke_api_key.id and revoked_at is null;
	if not found then
		raise exception 'there is no live key %', id using errcode = 'no_data_found';
	end if;
end
$$;
-- +goose StatementEnd

-- logged_key_change fails unless the log has, from this transaction, an event of the kind change,
-- about this key, of the newest revision, in a batch.
-- +goose StatementBegin
create function logged_key_change(id text, revision bigint) returns void
language plpgsql set search_path from current as $$
begin
	perform from events
		join audit_batches on audit_batches.batch = events.batch
		join revision on revision.n = events.revision
		where events.kind = 'change' and events.subject = logged_key_change.id and events.revision = logged_key_change.revision
		  and events.xmin = pg_current_xact_id()::xid and audit_batches.xmin = pg_current_xact_id()::xid;
	if not found then
		raise exception 'the log does not say in this transaction that revision % changes the key %', revision, id
			using errcode = 'object_not_in_prerequisite_state';
	end if;
end
$$;
-- +goose StatementEnd
revoke execute on function logged_key_change from public;

revoke execute on function add_api_key, revoke_api_key from public;
grant execute on function add_api_key, revoke_api_key to cedarpost_app;

-- audited_keys is that of migration 10 with the ends.
drop function audited_keys();
-- +goose StatementBegin
create function audited_keys() returns table (id text, name text, hash bytea, expires_at timestamptz, revoked boolean, since bigint, until bigint)
language sql stable security definer set search_path from current as $$
	select api_keys.id, api_keys.name, sha256(api_keys.hash), api_keys.expires_at, api_keys.revoked_at is not null, api_keys.since, api_keys.until
	from api_keys
$$;
-- +goose StatementEnd
revoke execute on function audited_keys from public;
grant execute on function audited_keys to cedarpost_auditor;

-- When each key was used last, to the hour. It is no part of the history: nothing depends on it.
create table key_uses (
	id text        collate "C" primary key,
	at timestamptz not null
);
grant select, insert, update on key_uses to cedarpost_app;
