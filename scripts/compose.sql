-- Run once by the Postgres of docker-compose.yml: what cedarpost migrate
-- --print-roles prints, with passwords.
create role cedarpost_migrate login password 'local-only';
create role cedarpost_serve login password 'local-only';
create role cedarpost_audit login password 'local-only';
create role cedarpost_owner;
create role cedarpost_app;
create role cedarpost_writer;
create role cedarpost_auditor;
grant cedarpost_owner to cedarpost_migrate;
grant cedarpost_app, cedarpost_writer, cedarpost_auditor to cedarpost_serve;
grant cedarpost_auditor to cedarpost_audit;
grant usage, create on schema "public" to cedarpost_owner;
grant usage on schema "public" to cedarpost_app, cedarpost_writer, cedarpost_auditor;
do $$ begin execute format('revoke connect, temporary on database %I from public', current_database()); end $$;
do $$ begin execute format('grant connect on database %I to cedarpost_migrate, cedarpost_serve, cedarpost_audit', current_database()); end $$;
do $$ begin execute format('grant temporary on database %I to cedarpost_migrate', current_database()); end $$;
