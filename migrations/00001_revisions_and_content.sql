-- Revisions, and the content they count: entities, bundles and API keys.
--
-- Content is never overwritten. A row holds from revision `since` (inclusive) to
-- revision `until` (exclusive); `until` is null while it is live. Text that
-- pages are ordered by is COLLATE "C", so that the order is Go's, on any server.

-- +goose Up

-- The counter. Each write takes `UPDATE revision SET n = n + 1 RETURNING n` in its
-- own transaction: the row lock is held to the commit, so revision order is
-- commit order. The uuid tells databases apart that number revisions alike.
create table revision (
	one      boolean primary key default true check (one),
	n        bigint  not null,
	database uuid    not null default gen_random_uuid()
);
insert into revision (n) values (0);

-- The notification only wakes readers up: what changed is in revision_entries.
-- +goose StatementBegin
create function notify_revision() returns trigger language plpgsql as $$
begin
	perform pg_notify('cedarpost_revision', new.n::text);
	return null;
end
$$;
-- +goose StatementEnd

create trigger notify_revision after update of n on revision
	for each row execute function notify_revision();

-- Who wrote each revision.
create table revisions (
	n      bigint      primary key,
	at     timestamptz not null default clock_timestamp(),
	caller text        not null,
	note   text        not null default ''
);

-- What each revision changed. Every revision has at least one entry.
--   kind     type            id
--   entity   entity's type   entity's id
--   bundle   ''              bundle's name
--   key      ''              API key's id
create table revision_entries (
	revision bigint not null,
	kind     text   collate "C" not null,
	type     text   collate "C" not null,
	id       text   collate "C" not null,
	primary key (revision, kind, type, id)
);

-- A parent is written "Type id": the type, one space, the id. Types hold no
-- space, ids may.
create table entities (
	type    text   collate "C" not null check (strpos(type, ' ') = 0),
	id      text   collate "C" not null,
	attrs   jsonb  not null check (jsonb_typeof(attrs) = 'object'),
	tags    jsonb  not null check (jsonb_typeof(tags) = 'object'),
	parents text[] collate "C" not null,
	since   bigint not null,
	until   bigint check (until > since),
	primary key (type, id, since)
);
create unique index entities_live on entities (type, id) where until is null;
create index entities_parents on entities using gin (parents) where until is null;
create index entities_until on entities (until) where until is not null;

-- One row per published version of a bundle; schema is Cedar schema text, fields
-- the field catalogue as the engine reads it: a JSON array of paths with their
-- groups, or null. The text of fields.yaml is in bundle_files.
create table bundles (
	name            text        collate "C" not null,
	version         bigint      not null,
	digest          text        not null,
	description     text        not null,
	owners          text[]      not null,
	on_forbid_error text        not null,
	namespaces      text[]      not null,
	schema          text        not null,
	fields          text        not null,
	policies        integer     not null,
	published_by    text        not null,
	published_at    timestamptz not null default clock_timestamp(),
	since           bigint      not null,
	until           bigint      check (until > since),
	primary key (name, since)
);
create unique index bundles_live on bundles (name) where until is null;
create unique index bundles_version on bundles (name, version);

-- A policy keeps its row for as many versions of its bundle as it does not change.
create table policies (
	bundle text    collate "C" not null,
	id     text    collate "C" not null,
	file   text    not null,
	line   integer not null,
	text   text    not null,
	since  bigint  not null,
	until  bigint  check (until > since),
	primary key (bundle, id, since)
);
create unique index policies_live on policies (bundle, id) where until is null;

-- The files a bundle was published from, as they came.
create table bundle_files (
	bundle  text   collate "C" not null,
	path    text   collate "C" not null,
	content bytea  not null,
	since   bigint not null,
	until   bigint check (until > since),
	primary key (bundle, path, since)
);
create unique index bundle_files_live on bundle_files (bundle, path) where until is null;

-- hash is the SHA-256 of the secret; the secret itself is never stored.
create table api_keys (
	id         text        collate "C" primary key,
	name       text        not null,
	hash       bytea       not null unique,
	created_at timestamptz not null default clock_timestamp(),
	revoked_at timestamptz
);
