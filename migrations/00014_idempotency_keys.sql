-- Idempotency keys of writes, with the answers that their repetitions get.

-- +goose Up

-- request is the SHA-256 of what was asked for. A row is stored in the transaction of its write,
-- and counts for a day.
create table idempotency_keys (
	caller  text        collate "C" not null,
	key     text        collate "C" not null,
	request bytea       not null check (length(request) = 32),
	answer  bytea       not null,
	at      timestamptz not null default clock_timestamp(),
	primary key (caller, key)
);
create index idempotency_keys_at on idempotency_keys (at);
grant select, insert, update, delete on idempotency_keys to cedarpost_app;
