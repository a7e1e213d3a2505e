-- Why a version of a bundle was published, and changes of bundles that are not published yet.

-- +goose Up

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
