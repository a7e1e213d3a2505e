package store

import (
	"context"
	"errors"

	"github.com/jackc/pgx/v5"
)

// ErrEntitiesStored refuses to delete a bundle whose entities were stored meanwhile.
var ErrEntitiesStored = errors.New("entities of the bundle were stored meanwhile")

// BundleDeletion ends the live version of a bundle. The name keeps its versions, with their files, and its
// freeze and changes.
type BundleDeletion struct {
	Name           string
	Caller, Reason string
	// BaseRevision is the [DB.PolicyRevision] that the deletion was checked against, and At the position
	// of that, as in [Publish].
	BaseRevision int64
	At           Position
	// Empty are the types of entities of which none may be stored. The error is [ErrEntitiesStored].
	Empty []string
	// Rules is called under the revision lock with the state of the bundle. Its error refuses the
	// deletion.
	Rules func(PolicyState) error
	// Once, if not nil, makes the deletion happen once.
	Once *Once[Published]
}

// DeleteBundle ends the live version of a bundle, as one revision. The error is [ErrNotFound] if there is
// none, [ErrPolicyChanged] if any bundle was published or deleted after BaseRevision, and [ErrRepeated] if
// there is an answer for the key of Once already. The result has the version that ended.
func (db *DB) DeleteBundle(ctx context.Context, d BundleDeletion) (made Published, err error) {
	defer wrap(&err, "delete bundle")
	err = db.inTurn(ctx, func(tx pgx.Tx) error {
		if made.Revision, err = nextRevision(ctx, tx, d.Caller); err != nil {
			return err
		}
		if made.Mark, err = readMark(ctx, tx, made.Revision); err != nil {
			return err
		}
		if err := recheck(ctx, tx, Publish{BaseRevision: d.BaseRevision, At: d.At}); err != nil {
			return err
		}
		state, err := readPolicyState(ctx, tx, d.Name, "")
		if err != nil {
			return err
		}
		if err := d.Rules(state); err != nil {
			return err
		}
		var stored bool
		err = tx.QueryRow(ctx, `
			select exists (
				select from unnest($1::text[]) as named (type)
				where exists (select from entities where type = named.type and until is null))`, orEmpty(d.Empty)).Scan(&stored)
		if err != nil {
			return err
		}
		if stored {
			return ErrEntitiesStored
		}
		var before []byte
		err = tx.QueryRow(ctx, `
			update bundles set until = $1 where name = $2 and until is null
			returning convert_to(digest, 'UTF8'), version`, made.Revision, d.Name).Scan(&before, &made.Version)
		if err != nil {
			return notFound(err)
		}
		for _, parts := range [...]string{
			"update policies set until = $1 where bundle = $2 and until is null",
			"update bundle_files set until = $1 where bundle = $2 and until is null",
		} {
			if _, err := tx.Exec(ctx, parts, made.Revision, d.Name); err != nil {
				return err
			}
		}
		if err := addEntry(ctx, tx, made.Revision, KindBundle, d.Name); err != nil {
			return err
		}
		err = db.changes.send(ctx, tx, Changed{
			Revision: made.Revision, Caller: d.Caller, Kind: KindBundle, ID: d.Name, Version: made.Version, Before: before, Reason: d.Reason,
		})
		if err != nil {
			return err
		}
		return d.Once.keep(ctx, tx, d.Caller, made)
	})
	if err != nil {
		return Published{}, err
	}
	return made, nil
}

// TypeCount says how many entities of a type are stored.
type TypeCount struct {
	Type string
	// Count is at most [MaxTypeCount]: then there may be more.
	Count int64
}

// MaxTypeCount bounds a [TypeCount].
const MaxTypeCount = 100_000

// CountTypes counts the entities of some types that are stored now. Types without any are left out.
func (db *DB) CountTypes(ctx context.Context, types []string) (_ []TypeCount, err error) {
	defer wrap(&err, "count entities")
	rows, _ := db.admin.Query(ctx, `
		select named.type, counted.n as count
		from unnest($1::text[]) as named (type)
		cross join lateral (
			select count(*) as n
			from (select from entities where type = named.type and until is null limit $2) as live
		) as counted
		where counted.n > 0
		order by named.type collate "C"`, orEmpty(types), MaxTypeCount)
	return pgx.CollectRows(rows, pgx.RowToStructByName[TypeCount])
}
