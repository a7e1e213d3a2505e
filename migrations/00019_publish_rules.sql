-- Break-glass, and rules that outlive a rollback.

-- +goose Up

-- As in migration 6: a function must not find what its caller made, so pg_temp comes last.
select set_config('search_path', format('%I, pg_temp', current_schema()), true);

-- break_glass is why the version was published past rules, or ''. rules are those that the next publish
-- meets besides those of bundle.yaml, as JSON, or ''. ruled says that a server published it that knows all
-- of these rules, and asked them.
alter table bundles
	add column break_glass text    not null default '',
	add column rules       text    not null default '',
	add column ruled       boolean not null default false;

-- The second line is for servers of an earlier version, as in migration 16. It cannot know what break-glass
-- is for, so it leaves alone what a server published that knows the rules.
-- +goose StatementBegin
create or replace function refuse_unruled_publish() returns trigger language plpgsql set search_path from current as $$
declare
	needed integer;
begin
	if new.ruled then
		return new;
	end if;
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
