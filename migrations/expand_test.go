package migrations_test

import (
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/cedarpost/cedarpost/migrations"
)

// A migration runs while servers of the previous release serve, and these may be started again after it.
// So a migration only adds what they can ignore. contract matches the comment with which a later one may
// take away what no release that is still in use reads or writes.
var contract = regexp.MustCompile(`(?m)^-- contract: since \S+ nothing (reads|writes|uses) \S`)

// breaks lists what a statement does that a server of the previous release does not live with. made are
// the tables that migrations since that release have made: it does not know them.
func breaks(statement string, made map[string]bool) (list []string) {
	s := strings.ToLower(strings.Join(strings.Fields(statement), " "))
	// known returns the table of a match, if the previous release knows it.
	known := func(re *regexp.Regexp) string {
		if m := re.FindStringSubmatch(s); len(m) > 1 && !made[m[1]] {
			return m[1]
		}
		return ""
	}
	if m := createTable.FindStringSubmatch(s); len(m) > 1 {
		made[m[1]] = true
		return nil
	}
	for what, re := range dropsOf {
		if table := known(re); table != "" {
			list = append(list, what+" "+table)
		}
	}
	if table := known(uniqueIndex); table != "" {
		list = append(list, "a new unique index on "+table)
	}
	if table := known(notConcurrently); slices.Contains(large, table) {
		list = append(list, "an index on the large table "+table+", which stops its writers while it is made")
	}
	if table := known(newTrigger); table != "" {
		list = append(list, "a new trigger on "+table)
	}
	table := known(alterTable)
	if table == "" {
		return list
	}
	for _, action := range actionsOf(alterTable.FindStringSubmatch(s)[2]) {
		switch {
		case strings.HasPrefix(action, "add column"), strings.HasPrefix(action, "add ") && !tableConstraint.MatchString(action):
			if strings.Contains(action, " not null") && !strings.Contains(action, " default ") && !strings.Contains(action, " generated ") {
				list = append(list, "a column without a default that must not be null: "+action)
			}
			if strings.Contains(action, " check ") || strings.Contains(action, " unique") || strings.Contains(action, " references ") {
				list = append(list, "a new constraint: "+action)
			}
		case strings.HasPrefix(action, "add "):
			list = append(list, "a new constraint: "+action)
		case strings.HasPrefix(action, "alter column") && (strings.Contains(action, " set default ") || strings.Contains(action, " drop not null") || strings.Contains(action, " set statistics ") || strings.Contains(action, " set storage ")):
		case strings.HasPrefix(action, "set ("), strings.HasPrefix(action, "owner to "), strings.HasPrefix(action, "enable always trigger"):
		default: // drop, rename, type, set not null, attach and what nobody has thought of
			list = append(list, table+": "+action)
		}
	}
	return list
}

// large are the tables whose rows are not bounded. An index on them is made by store.Migrate, day by day
// and without a lock.
var large = []string{"decisions", "events", "audit_batches", "entities", "revision_entries"}

var (
	name            = `(?:if (?:not )?exists )?(?:only )?(?:public\.)?"?([a-z0-9_]+)"?`
	createTable     = regexp.MustCompile(`^create (?:unlogged )?(?:table|view|sequence|type|materialized view) ` + name)
	alterTable      = regexp.MustCompile(`^alter table ` + name + ` (.*)$`)
	uniqueIndex     = regexp.MustCompile(`^create unique index .*\bon ` + name)
	notConcurrently = regexp.MustCompile(`^create index (?:[a-z0-9_]+ )?on ` + name)
	newTrigger      = regexp.MustCompile(`^create (?:constraint )?trigger .*\bon ` + name)
	tableConstraint = regexp.MustCompile(`^add (constraint|check|unique|primary key|foreign key|exclude)`)
	dropsOf         = map[string]*regexp.Regexp{
		"drop":     regexp.MustCompile(`^drop (?:table|view|index|function|type|sequence|trigger|schema|materialized view) ` + name),
		"revoke":   regexp.MustCompile(`^revoke .*\bon (?:table )?` + name),
		"rename":   regexp.MustCompile(`^alter (?:view|index|function|type|sequence|schema) ` + name + ` rename`),
		"truncate": regexp.MustCompile(`^truncate (?:table )?` + name),
		"delete":   regexp.MustCompile(`^delete from ` + name),
	}
)

// actionsOf splits the actions of an alter table at commas outside of brackets.
func actionsOf(text string) (list []string) {
	depth, from := 0, 0
	for i, r := range text {
		switch r {
		case '(':
			depth++
		case ')':
			depth--
		case ',':
			if depth == 0 {
				list = append(list, strings.TrimSpace(text[from:i]))
				from = i + 1
			}
		}
	}
	return append(list, strings.TrimSpace(text[from:]))
}

var (
	comment = regexp.MustCompile(`(?m)--.*$`)
	block   = regexp.MustCompile(`(?s)-- \+goose StatementBegin\n(.*?)-- \+goose StatementEnd`)
)

// statementsOf returns the statements of a migration as goose runs them.
func statementsOf(text string) (list []string) {
	for _, m := range block.FindAllStringSubmatch(text, -1) {
		list = append(list, comment.ReplaceAllString(m[1], ""))
	}
	text = comment.ReplaceAllString(block.ReplaceAllString(text, ""), "")
	for s := range strings.SplitSeq(text, ";") {
		if s = strings.TrimSpace(s); s != "" {
			list = append(list, s)
		}
	}
	return list
}

// previousMigration reads the last migration of the previous release.
func previousMigration(t *testing.T) int {
	t.Helper()
	text, err := os.ReadFile("../scripts/previous-release")
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`(?m)^migration (\d+)$`).FindSubmatch(text)
	if m == nil {
		t.Fatal("scripts/previous-release names no migration")
	}
	n, err := strconv.Atoi(string(m[1]))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// Servers of the previous release live with each migration since. make upgrade shows it with real ones.
func TestMigrationsOnlyAdd(t *testing.T) {
	previous := previousMigration(t)
	names, err := fs.Glob(migrations.FS, "*.sql")
	if err != nil {
		t.Fatal(err)
	}
	made := map[string]bool{}
	for _, file := range names {
		n, err := strconv.Atoi(file[:5])
		if err != nil {
			t.Fatal(err)
		}
		if n <= previous {
			continue
		}
		t.Run(file, func(t *testing.T) {
			text, err := fs.ReadFile(migrations.FS, file)
			if err != nil {
				t.Fatal(err)
			}
			if contract.Match(text) {
				t.Log("it takes away what nothing uses any more")
				return
			}
			for _, s := range statementsOf(string(text)) {
				for _, what := range breaks(s, made) {
					t.Errorf("servers of the previous release do not live with %s\nadd first, and take away in a later release with a comment \"-- contract: since VERSION nothing reads …\": CONTRIBUTING.md", what)
				}
			}
		})
	}
}

// The rules find what they are for, and let what is harmless pass.
func TestRulesOfMigrations(t *testing.T) {
	for statement, wrong := range map[string]bool{
		"alter table bundles drop column rules":                                                true,
		"alter table bundles rename column rules to more":                                      true,
		"ALTER TABLE ONLY public.bundles RENAME TO sheaves":                                    true,
		"alter table bundles alter column rules type jsonb":                                    true,
		"alter table bundles alter column note set not null":                                   true,
		"alter table bundles add column a text not null":                                       true,
		"alter table bundles add column a text not null default '', add column b int not null": true,
		"alter table bundles add constraint a check (version > 0)":                             true,
		"alter table bundles add column a int check (a > 0)":                                   true,
		"alter table bundles add check (version > 0)":                                          true,
		"alter table bundles disable trigger user":                                             true,
		"create unique index on bundles (digest)":                                              true,
		"create index on decisions (caller)":                                                   true,
		"create trigger a before insert on bundles for each row execute function b()":          true,
		"drop table bundles":                          true,
		"drop view if exists signer_lock":             true,
		"drop function refuse_unruled_publish":        true,
		"revoke insert on bundles from cedarpost_app": true,
		"delete from policies":                        true,
		"truncate policies":                           true,

		"alter table bundles add column a text not null default ''":                                         false,
		"alter table bundles add column a text, add b numeric(10, 2) not null default 0":                    false,
		"alter table bundles alter column note drop not null":                                               false,
		"create table fresh (a int primary key check (a > 0))":                                              false,
		"alter table fresh alter column a set not null":                                                     false,
		"create unique index on fresh (a)":                                                                  false,
		"drop table fresh":                                                                                  false,
		"create index on bundles (digest)":                                                                  false,
		"grant select on bundles to cedarpost_auditor":                                                      false,
		"create or replace function a() returns trigger language plpgsql as $$ begin delete from x; end $$": false,
	} {
		got := breaks(statement, map[string]bool{"fresh": true})
		if (len(got) > 0) != wrong {
			t.Errorf("%s: %q", statement, got)
		}
	}
	text := "-- x\n-- +goose Up\n-- +goose StatementBegin\ncreate function a() as $$ begin; end; $$;\n-- +goose StatementEnd\nalter table b -- drop\n  add column c int;\n"
	if got := statementsOf(text); len(got) != 2 || !strings.Contains(got[0], "begin; end;") || strings.Contains(got[1], "drop") {
		t.Errorf("%q", got)
	}
	for text, is := range map[string]bool{"-- contract: since v1.4.0 nothing reads bundles.rules\ndrop": true, "-- contract: drop it": false} {
		if contract.MatchString(text) != is {
			t.Errorf("%s: %v", text, !is)
		}
	}
}
