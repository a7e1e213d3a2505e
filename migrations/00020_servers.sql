-- Which servers run, and what each has applied.

-- +goose Up

-- A server writes its row every few seconds. All times are those of the database. The table is unlogged,
-- so a write costs no flush of the disk and waits for no standby; after a crash of the database it is
-- empty, and the servers that run write their rows again. revision is the newest revision that the server
-- has applied, 0 if the database does not have that revision. The server is live until live_until.
create unlogged table servers (
	id         uuid        primary key,
	name       text        collate "C" not null,
	version    text        collate "C" not null,
	revision   bigint      not null,
	seen_at    timestamptz not null,
	live_until timestamptz not null
);
grant select, insert, update, delete on servers to cedarpost_app;
