package store

import (
	"context"
	"errors"
	"time"

	"github.com/google/uuid"
)

// maxLooseReports is how many reports of a bundle are kept that belong to no change, or are not complete.
const maxLooseReports = 50

// ImpactReport is a report of what a change of a bundle would have done to recorded decisions.
type ImpactReport struct {
	ID, Bundle string
	Change     string // "" if it is about edits that are in no change
	Complete   bool
	Shadow     bool // it grows while the change is evaluated beside the live bundle
	CreatedAt  time.Time
	// Cursor is where the analysis goes on.
	Cursor DecisionCursor
	Report []byte
}

// DecisionCursor has At and ID of the last decision that was looked at. The zero value is before all.
type DecisionCursor struct {
	At time.Time
	ID uuid.UUID
}

// ErrReportComplete says that the stored report is complete, so nothing replaces it.
var ErrReportComplete = errors.New("the report is complete")

// PutImpactReport stores a report in place of the one with its id. The error is [ErrReportComplete] if that
// one is complete. It removes the oldest reports of the bundle that belong to no change or are not complete,
// and those of changes and shadows that are a day old and that no change names.
func (db *DB) PutImpactReport(ctx context.Context, r ImpactReport) (err error) {
	defer wrap(&err, "store a report")
	put, err := db.admin.Exec(ctx, `
		insert into impact_reports (id, bundle, change, complete, created_at, cursor_at, cursor_id, report, shadow)
		values ($1, $2, $3, $4, $5, $6, $7, $8, $9)
		on conflict (id) do update set complete = excluded.complete, cursor_at = excluded.cursor_at, cursor_id = excluded.cursor_id, report = excluded.report
		where not impact_reports.complete`,
		r.ID, r.Bundle, r.Change, r.Complete, r.CreatedAt, orNull(r.Cursor.At), orNull(r.Cursor.ID), r.Report, r.Shadow)
	if err == nil && put.RowsAffected() == 0 {
		err = ErrReportComplete
	}
	if err != nil {
		return err
	}
	_, err = db.admin.Exec(ctx, `
		delete from impact_reports
		where id in (
			select id from impact_reports
			where bundle = $1 and (change = '' or not complete and not shadow) and id <> $2
			order by created_at desc
			offset $3)
		or bundle = $1 and change <> '' and (complete or shadow) and id <> $2 and created_at < now() - interval '1 day' and not exists (
			select from entities e
			where e.type = '`+ChangeType+`' and e.id = impact_reports.change and e.until is null
			  and (e.attrs -> 'reports' @> jsonb_build_array(jsonb_build_object('id', impact_reports.id)) or e.attrs -> 'shadow' ->> 'report' = impact_reports.id))`,
		r.Bundle, r.ID, maxLooseReports-1)
	return err
}

// ImpactReport reads a report. The error is [ErrNotFound] if there is none with the id.
func (db *DB) ImpactReport(ctx context.Context, id string) (r ImpactReport, err error) {
	defer wrap(&err, "read a report")
	var at *time.Time
	var last *uuid.UUID
	err = db.admin.QueryRow(ctx, "select id, bundle, change, complete, shadow, created_at, cursor_at, cursor_id, report from impact_reports where id = $1", id).
		Scan(&r.ID, &r.Bundle, &r.Change, &r.Complete, &r.Shadow, &r.CreatedAt, &at, &last, &r.Report)
	r.Cursor = DecisionCursor{orZero(at), orZero(last)}
	return r, notFound(err)
}
