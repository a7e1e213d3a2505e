package store

import (
	"context"
	"time"

	"github.com/jackc/pgx/v5"
)

// BundleVersion is a published version of a bundle, without its schema, fields, manifest and policies.
type BundleVersion struct {
	Bundle
	// Live says that no later version replaced it.
	Live bool
	// DeletedAt and DeletedBy are not nil if it ended because the bundle was deleted.
	DeletedAt *time.Time
	DeletedBy *string
}

// BundleVersions reads a page of the versions of a bundle, the newest first: those before a version,
// if that is not 0. Versions are never removed.
func (db *DB) BundleVersions(ctx context.Context, name string, before int64, limit int) (_ []BundleVersion, err error) {
	defer wrap(&err, "list versions of a bundle")
	rows, _ := db.admin.Query(ctx, `
		select name, version, digest, description, owners, on_forbid_error, namespaces, policies, published_by, published_at,
		       message, change, rollback_of, approvals, rules, break_glass, since, until is null as live, deleted.at as deleted_at, deleted.caller as deleted_by
		from bundles
		left join revisions deleted on deleted.n = bundles.until and not exists (
			select from bundles next where next.name = bundles.name and next.since = bundles.until)
		where name = $1 and ($2 = 0 or version < $2)
		order by version desc
		limit $3`, name, before, limit)
	return pgx.CollectRows(rows, pgx.RowToStructByNameLax[BundleVersion])
}

// BundleVersion reads a version of a bundle. The error is [ErrNotFound] if there is none.
func (db *DB) BundleVersion(ctx context.Context, name string, version int64) (v BundleVersion, err error) {
	defer wrap(&err, "read a version of a bundle")
	list, err := db.BundleVersions(ctx, name, version+1, 1)
	if err == nil && (len(list) == 0 || list[0].Version != version) {
		err = ErrNotFound
	}
	if err != nil {
		return v, err
	}
	return list[0], nil
}

// ReadBundleFiles reads the files of a bundle as they were at a revision, by path, with their contents.
func (db *DB) ReadBundleFiles(ctx context.Context, revision int64, name string) (_ []File, err error) {
	defer wrap(&err, "read bundle files")
	rows, _ := db.admin.Query(ctx, `
		select path, content
		from bundle_files
		where bundle = $2 and since <= $1 and (until is null or until > $1)
		order by path`, revision, name)
	return pgx.CollectRows(rows, pgx.RowToStructByName[File])
}

// ChangedFile is a file that differs between two states of a bundle. A size is nil if the file is not
// in that state.
type ChangedFile struct {
	Path          string
	Before, After *int // bytes
}

// ChangedFiles lists the files of a bundle that differ between two revisions, by path.
func (db *DB) ChangedFiles(ctx context.Context, name string, before, after int64) (_ []ChangedFile, err error) {
	defer wrap(&err, "compare files of a bundle")
	// A file that did not change is the same row, whose content is not read.
	rows, _ := db.admin.Query(ctx, `
		select coalesce(b.path, a.path) as path, octet_length(b.content) as before, octet_length(a.content) as after
		from (select path, content, since from bundle_files where bundle = $1 and since <= $2 and (until is null or until > $2)) b
		full join (select path, content, since from bundle_files where bundle = $1 and since <= $3 and (until is null or until > $3)) a
			on a.path = b.path
		where b.since is distinct from a.since and b.content is distinct from a.content
		order by 1`, name, before, after)
	return pgx.CollectRows(rows, pgx.RowToStructByName[ChangedFile])
}
