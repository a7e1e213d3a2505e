-- Reports of what a change of a bundle would have done to recorded decisions.

-- +goose Up

-- report is a message ImpactReport. shadow says that it grows while the change is evaluated beside the live bundle. cursor is where an analysis goes on: the time and the id of the last
-- decision that was looked at. A change names its complete reports with their SHA-256, which is in the
-- log, so a report that somebody altered is found.
create table impact_reports (
	id         text        collate "C" primary key,
	bundle     text        collate "C" not null,
	change     text        collate "C" not null,
	complete   boolean     not null,
	shadow     boolean     not null,
	created_at timestamptz not null,
	cursor_at  timestamptz,
	cursor_id  uuid,
	report     bytea       not null
);
create index impact_reports_bundle on impact_reports (bundle, created_at);
create index impact_reports_shadow on impact_reports (id) where shadow and not complete;
grant select, insert, update, delete on impact_reports to cedarpost_app;
grant select on impact_reports to cedarpost_auditor;

-- The lock of the server that compares new decisions with those by changes in shadow. See migration 12.
create view shadow_lock as select true as one;
grant update on shadow_lock to cedarpost_app;
