-- Why a version of a bundle was published, and changes of bundles that are not published yet.

-- +goose Up

-- As in migration 6: a function must not find what its caller made, so pg_temp comes last.
select set_config('search_path', format('%I, pg_temp', current_schema()), true);

-- message is what the caller said. change is the id of the change that the version was published
-- from, or ''. rollback_of is the version whose files it has, if it is a rollback, or 0. approvals is
-- the number of approvals that the next change needs: that of bundle.yaml, or more after a rollback.
alter table bundles
	add column message     text    not null default '',
	add column change      text    collate "C" not null default '',
	add column rollback_of bigint  not null default 0,
	add column approvals   integer not null default 0;

-- The edits of changes. A change itself is an entity of the type Cedarpost::Change. content is null if
-- the change removes the file.
create table change_edits (
	change  text  collate "C" not null,
	path    text  collate "C" not null,
	content bytea,
	primary key (change, path)
);
grant select, insert, update, delete on change_edits to cedarpost_app;
grant select on change_edits to cedarpost_auditor;

-- The changes of one bundle are counted under the revision lock.
create index entities_changes on entities ((attrs ->> 'bundle')) where type = 'Cedarpost::Change' and until is null;

-- The second line, for servers of an earlier version while servers are replaced: they know neither
-- freezes nor approvals, and would publish past both.
-- +goose StatementBegin
create function refuse_unruled_publish() returns trigger language plpgsql set search_path from current as $$
declare
	needed integer;
begin
	if new.rollback_of = 0 and exists (
		select from entities where type = 'Cedarpost::BundleFreeze' and id = new.name and until is null) then
		raise exception 'the bundle % is frozen', new.name using errcode = 'restrict_violation';
	end if;
	select approvals into needed from bundles where name = new.name order by version desc limit 1;
	if needed > 0 and new.rollback_of = 0 and new.change = '' then
		raise exception 'the bundle % needs % approvals', new.name, needed using errcode = 'restrict_violation';
	end if;
	return new;
end
$$;
-- +goose StatementEnd
create trigger refuse_unruled_publish before insert on bundles for each row execute function refuse_unruled_publish();
