package decisionlog

import (
	"context"
	"maps"
	"slices"
	"time"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/store"
)

// goneRows counts missing rows of one day.
type goneRows struct {
	leaf, batches, rows int64 // leaf is the first one
}

// allGone handles a batch whose rows are all missing. It is a fault if the partition of their
// day exists. Otherwise goneDays decides.
func (v *verification) allGone(ctx context.Context, b store.Batch) error {
	gone, known := v.isGone[b.Day]
	if !known {
		var err error
		if gone, err = v.db.DayGone(ctx, b.Day); err != nil {
			return err
		}
		v.isGone[b.Day] = gone
	}
	if !gone {
		v.fault(b.Leaf, -1, "all %d rows are missing, and their day was not dropped", b.Rows)
		return nil
	}
	if v.rootDay.After(b.Day.AddDate(0, 0, 1)) {
		// A login that may append to the log can forge a batch of a dropped day. Such a batch
		// must not excuse revisions without an event.
		v.fault(b.Leaf, -1, "all %d rows are missing, and the batch was appended more than a day after their day", b.Rows)
		return nil
	}
	if v.history != nil {
		v.history.missing(1)
	}
	g := v.gone[b.Day]
	if g == nil {
		g = &goneRows{leaf: b.Leaf}
		v.gone[b.Day] = g
	}
	g.batches++
	g.rows += int64(b.Rows)
	return nil
}

// droppedMeanwhile handles days that were dropped since the verification began. Their records
// come after its end, so it also verifies the batches that were appended meanwhile.
func (v *verification) droppedMeanwhile(ctx context.Context, end int64) error {
	for day := range v.gone {
		if v.droppedDay.IsZero() || day.After(v.droppedDay) {
			now, err := v.db.NextLeaf(ctx)
			for from := end; from < now && err == nil; {
				from, err = v.chunk(ctx, from, min(from+verifyBatches, now))
			}
			return err
		}
	}
	return nil
}

// goneDays counts missing rows as dropped if the log proves that their day was dropped.
// Retention drops the oldest day first, so the record of one day also proves all days before.
func (v *verification) goneDays() {
	for _, day := range slices.SortedFunc(maps.Keys(v.gone), time.Time.Compare) {
		g := v.gone[day]
		if v.droppedDay.IsZero() || day.After(v.droppedDay) {
			v.fault(g.leaf, -1, "all %d rows of %d batches of %s are missing, and no record in the log made at least %.4g days after that day says that it was dropped",
				g.rows, g.batches, day.Format(time.DateOnly), v.v.MinRetention.Hours()/24)
			continue
		}
		v.done.Dropped += g.rows
		v.done.Batches += g.batches
	}
}

// head checks that the batches before the first stored one have only rows of dropped days. The
// owner of the database may remove such batches, in whole tiles of the tree.
func (v *verification) head(ctx context.Context, first int64) error {
	batches, err := v.db.Batches(ctx, first, 1)
	if err != nil {
		return err
	}
	var day time.Time
	if len(batches) > 0 {
		if h, err := auditlog.ParseHeader(batches[0].Header); err == nil {
			day = DayOf(h.Made)
		}
	}
	dropped := first%(1<<auditlog.TileHeight) == 0 && !v.droppedDay.IsZero() && !day.IsZero() &&
		!day.After(v.droppedDay.AddDate(0, 0, 1)) && (v.droppedBefore == 0 || first <= v.droppedBefore)
	if !dropped {
		v.fault(0, -1, "is missing, and all batches up to %d: no record in the log says that they are of dropped days", first-1)
	}
	return nil
}
