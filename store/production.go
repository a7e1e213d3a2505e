package store

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
)

// ErrUnsafe means that the database can lose committed data, or that the login of the
// server can rewrite the log.
var ErrUnsafe = errors.New("this database is not fit for production")

// CheckProduction refuses a database that can lose committed data, a login that can rewrite
// the log, and a database in which other logins may write to policies, data or keys. The
// roles of a server cannot rewrite the log, but an attacker who takes over the server has
// its login. The error is [ErrUnsafe] and says what is wrong.
//
// It does not check full_page_writes, which is not needed on a file system that writes a
// page as a whole or not at all.
func (db *DB) CheckProduction(ctx context.Context) (err error) {
	defer wrap(&err, "check the database")
	rows, _ := db.admin.Query(ctx, selectUnsafe)
	found, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil || len(found) == 0 {
		return err
	}
	return fmt.Errorf("%w:\n  - %s\nserve with a login that has no more than the roles %s (cedarpost migrate --print-roles), and let no other login write",
		ErrUnsafe, strings.Join(found, "\n  - "), strings.Join(servingRoles, ", "))
}

// Exposed lists what every login of the cluster may do in the database without need. Such a
// login reads and changes nothing, but it can take connections, send notifications, and fill
// the disk.
func (db *DB) Exposed(ctx context.Context) (found []string, err error) {
	defer wrap(&err, "check the rights of other logins")
	rows, _ := db.admin.Query(ctx, `
		select case privilege_type
		       when 'CONNECT' then 'every login of the cluster may connect to this database'
		       else 'every login of the cluster may make temporary tables in this database, and so fill its disk' end
		from pg_database, aclexplode(coalesce(datacl, acldefault('d', datdba)))
		where datname = current_database() and grantee = 0 and privilege_type in ('CONNECT', 'TEMPORARY')
		order by 1`)
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// A login that is a member of a role counts as the role even if it does not inherit,
// because it may take the role on. A superuser is a member of all roles, so the other checks
// leave superusers out.
const selectUnsafe = `
	with login as (
		select rolname, rolsuper from pg_roles where rolname = session_user
	), self as (
		select oid, rolname, rolsuper, rolcreaterole from pg_roles
		where pg_has_role(session_user, oid, 'MEMBER') and not (select rolsuper from login)
	), log as (
		select oid, relowner from pg_class
		where oid in ('decisions'::regclass, 'events'::regclass, 'audit_batches'::regclass, 'checkpoints'::regclass)
		   or oid in (select inhrelid from pg_inherits where inhparent in ('decisions'::regclass, 'events'::regclass))
	), schema as (
		select oid, nspname, nspowner from pg_namespace
		where oid = (select relnamespace from pg_class where oid = 'decisions'::regclass)
	), content as (
		select relname, relowner, privilege_type, grantee
		from pg_class, lateral (
			select acl.privilege_type, acl.grantee from aclexplode(relacl) as acl
			union
			select acl.privilege_type, acl.grantee from pg_attribute, aclexplode(attacl) as acl where attrelid = pg_class.oid
		) as granted
		where oid in ('entities'::regclass, 'policies'::regclass, 'bundles'::regclass, 'bundle_files'::regclass, 'api_keys'::regclass,
		              'revision'::regclass, 'revisions'::regclass, 'revision_entries'::regclass, 'history'::regclass)
		  and privilege_type in ('INSERT', 'UPDATE', 'DELETE', 'TRUNCATE', 'TRIGGER')
		  and grantee <> relowner
		  and not exists (select from pg_roles where oid = grantee and (rolsuper or rolname in ('cedarpost_owner', 'cedarpost_app')))
	)
	select 'fsync is off: what was committed can be lost' as found
	where current_setting('fsync') = 'off'
	union all
	select format('the login %I is a superuser', rolname)
	from login where rolsuper
	union all
	select format('the login may act as %I, a superuser', rolname)
	from self where rolsuper
	union all
	select format('the login may act as %I, who may make itself a member of others (CREATEROLE)', rolname)
	from self where rolcreaterole
	union all
	select format('the login may act as %I', rolname)
	from self
	where rolname in ('pg_write_all_data', 'pg_write_server_files', 'pg_execute_server_program')
	   or oid in (select relowner from log)
	union all
	select format('the login may act as %I, who may rewrite the log (%s)', rolname, string_agg(distinct privilege, ', '))
	from self, log, unnest(array['UPDATE', 'DELETE', 'TRUNCATE', 'TRIGGER']) as privilege
	where has_table_privilege(self.oid, log.oid, privilege)
	   or privilege = 'UPDATE' and has_any_column_privilege(self.oid, log.oid, privilege)
	group by rolname
	having bool_and(self.oid <> relowner)
	union all
	select format('the login may act as %I, who owns the schema %I, and may drop what is in it', rolname, nspname)
	from self, schema where self.oid = nspowner
	union all
	select format('the login may act as %I, who may make tables and functions in the schema %I', rolname, nspname)
	from self, schema where has_schema_privilege(self.oid, schema.oid, 'CREATE') and self.oid <> nspowner
	union all
	select format('the login may act as %I, who owns the database', rolname)
	from self, pg_database where datname = current_database() and self.oid = datdba
	union all
	select format('the login may act as %I, who may set session_replication_role and so turn triggers off', rolname)
	from self where has_parameter_privilege(self.oid, 'session_replication_role', 'SET')
	union all
	select format('%s may write to %s (%s)', case when grantee = 0 then 'every login' else pg_get_userbyid(grantee) end,
	              relname, string_agg(privilege_type, ', ' order by privilege_type))
	from content
	group by grantee, relname
	union all
	select format('%I may write to all tables, as a member of pg_write_all_data', rolname)
	from pg_roles
	where not rolsuper and rolcanlogin and rolname <> session_user and pg_has_role(oid, 'pg_write_all_data', 'MEMBER')`
