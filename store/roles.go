package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
)

// The roles of the database. None can log in: a connection takes a role on when it is
// made, and then has the rights of that role only. Migration 6 says what each role may
// do.
const (
	ownerRole   = "cedarpost_owner"   // owns all tables and functions, and migrates; no server has it
	appRole     = "cedarpost_app"     // everything but the log
	writerRole  = "cedarpost_writer"  // appends to the log
	auditorRole = "cedarpost_auditor" // reads the log
)

// servingRoles are the roles that the login of a server has.
var servingRoles = []string{appRole, writerRole, auditorRole}

// ErrRoles means that the login lacks roles or rights that it needs. The error has the
// SQL that an administrator of the database has to run.
var ErrRoles = errors.New("the database login lacks rights")

// as returns a config for connections that take a role on when they are made.
func as(c *pgx.ConnConfig, role string) *pgx.ConnConfig {
	c = c.Copy()
	c.RuntimeParams["role"] = role
	return c
}

// Roles returns the SQL that makes the roles, a login for each of the two commands and one for auditors,
// in a database whose tables are in schema public. An administrator reads, changes and
// runs it.
func Roles() string {
	const migrate, serve, audit = "cedarpost_migrate", "cedarpost_serve", "cedarpost_audit"
	sql := []string{"create role " + migrate + " login", "create role " + serve + " login", "create role " + audit + " login"}
	for _, role := range append([]string{ownerRole}, servingRoles...) {
		sql = append(sql, "create role "+role)
	}
	sql = append(sql, "grant "+ownerRole+" to "+migrate, "grant "+strings.Join(servingRoles, ", ")+" to "+serve,
		"grant "+auditorRole+" to "+audit)
	return "-- Once in each cluster. Give the logins passwords, or another way to prove who they are.\n" +
		script(sql) +
		"-- In the database.\n" +
		script(schemaGrants("public")) +
		"-- Other logins of the cluster may not connect to this database, nor fill it. Grant connect to each\n" +
		"-- further login that needs it.\n" +
		script([]string{
			"do $$ begin execute format('revoke connect, temporary on database %I from public', current_database()); end $$",
			"do $$ begin execute format('grant connect on database %I to " + migrate + ", " + serve + ", " + audit + "', current_database()); end $$",
			"do $$ begin execute format('grant temporary on database %I to " + migrate + "', current_database()); end $$",
		}) +
		"-- Other logins can still take all connections of the cluster. So bound those of each of them:\n" +
		"-- alter role OTHER connection limit 20;\n"
}

// schemaGrants lets the owner make tables, and the other roles see them.
func schemaGrants(schema string) []string {
	schema = sanitize(schema)
	return []string{
		"grant usage, create on schema " + schema + " to " + ownerRole,
		"grant usage on schema " + schema + " to " + strings.Join(servingRoles, ", "),
	}
}

func sanitize(name string) string { return pgx.Identifier{name}.Sanitize() }

func script(sql []string) string { return strings.Join(sql, ";\n") + ";\n" }

// roleState is a role as the login of a connection sees it.
type roleState struct {
	Name          string
	Made, Granted bool // Made: it exists; Granted: the login may take it on
}

// readRoles looks up roles. Since Postgres 16 a member of a role may lack the right to
// SET it.
func readRoles(ctx context.Context, conn *pgx.Conn, names ...string) ([]roleState, error) {
	rows, _ := conn.Query(ctx, `
		select name, oid is not null as made,
		       coalesce(pg_has_role(session_user, oid,
		           case when current_setting('server_version_num')::int < 160000 then 'MEMBER' else 'SET' end), false) as granted
		from unnest($1::text[]) with ordinality as named (name, n)
		left join pg_roles on rolname = name
		order by n`, names)
	return pgx.CollectRows(rows, pgx.RowToStructByName[roleState])
}

// checkRoles makes sure at the start that the login can take on the roles that it needs.
// Its error says what to do.
func checkRoles(ctx context.Context, s *sessions, config *pgx.ConnConfig, needed ...string) error {
	conn, err := s.connect(ctx, config)
	if err != nil {
		return err
	}
	defer closeConn(conn)
	roles, err := readRoles(ctx, conn, needed...)
	if err != nil {
		return err
	}
	var lacking []string
	for _, r := range roles {
		if !r.Made {
			return fmt.Errorf("%w (there is no role %s)", ErrNotMigrated, r.Name)
		}
		if !r.Granted {
			lacking = append(lacking, r.Name)
		}
	}
	if len(lacking) > 0 {
		return fmt.Errorf("%w: an administrator has to run\n\n%s", ErrRoles,
			script([]string{"grant " + strings.Join(lacking, ", ") + " to " + sanitize(config.User)}))
	}
	return nil
}

// ensureRoles makes missing roles and grants before migrations run as the owner. Roles
// belong to the whole cluster, and another database in it may be migrated at the same
// time, so it tries again if a role appears in the meantime.
func ensureRoles(ctx context.Context, conn *pgx.Conn) error {
	for try := 1; ; try++ {
		missing, err := missingRoles(ctx, conn)
		if err != nil {
			return err
		}
		for i := 0; i < len(missing) && err == nil; i++ {
			_, err = conn.Exec(ctx, missing[i])
		}
		switch sqlState(err) {
		case "42501": // insufficient_privilege
			return fmt.Errorf("%w: an administrator has to run in this database\n\n%s\n(%w)", ErrRoles, script(missing), err)
		case "42710", "23505", "XX000": // duplicate_object, unique_violation, "tuple concurrently updated"
			if try < 10 {
				continue
			}
		}
		return err
	}
}

// missingRoles returns the SQL for missing roles and grants.
func missingRoles(ctx context.Context, conn *pgx.Conn) (sql []string, err error) {
	roles, err := readRoles(ctx, conn, append([]string{ownerRole}, servingRoles...)...)
	if err != nil {
		return nil, err
	}
	made := true
	for _, r := range roles {
		if !r.Made {
			sql = append(sql, "create role "+r.Name)
			made = false
		}
	}
	var login, schema string
	err = conn.QueryRow(ctx, "select session_user, coalesce(current_schema(), 'public')").Scan(&login, &schema)
	if err != nil {
		return nil, err
	}
	// A superuser may take on any role.
	if i := slices.IndexFunc(roles, func(r roleState) bool { return r.Name == ownerRole }); !roles[i].Granted {
		sql = append(sql, "grant "+ownerRole+" to "+sanitize(login))
	}
	granted := false
	if made {
		err = conn.QueryRow(ctx, `
			select has_schema_privilege($2::text, $1::text, 'CREATE') and bool_and(has_schema_privilege(role, $1::text, 'USAGE'))
			from unnest($3::text[]) as role`, schema, ownerRole, servingRoles).Scan(&granted)
	}
	if !granted {
		sql = append(sql, schemaGrants(schema)...)
	}
	return sql, err
}

// adopt gives the owner the tables and functions that migrations made before there was an
// owner.
func adopt(ctx context.Context, conn *pgx.Conn) error {
	const sql = `
		do $$
		declare
			ours    oid := to_regnamespace(current_schema());
			command text;
		begin
			perform from pg_class where oid = to_regclass('goose_db_version') and relowner <> 'cedarpost_owner'::regrole;
			if not found then
				return;
			end if;
			for command in
				select format('alter table %s owner to cedarpost_owner', oid::regclass)
				from pg_class
				where relnamespace = ours
				  and (relname in ('goose_db_version', 'revision', 'revisions', 'revision_entries', 'entities', 'bundles',
				                   'policies', 'bundle_files', 'api_keys', 'history', 'imports', 'decision_days',
				                   'decisions', 'events', 'audit_batches', 'audit_nodes', 'checkpoints', 'audit_writers')
				       or oid in (select inhrelid from pg_inherits
				                  where inhparent in (to_regclass('decisions'), to_regclass('events'))))
				union all
				select format('alter function %s owner to cedarpost_owner', oid::regprocedure)
				from pg_proc
				where pronamespace = ours
				  and proname in ('notify_revision', 'refuse_rewrite', 'create_decision_partitions',
				                  'log_append', 'log_guard', 'create_log_partitions')
			loop
				execute command;
			end loop;
		end
		$$`
	_, err := conn.Exec(ctx, sql)
	return err
}
