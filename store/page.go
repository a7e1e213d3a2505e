package store

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// Room bounds the bytes of the rows that a page has. It is called with the bytes of each row
// before the row is kept. At an error the page ends before that row; if it is the first one, the
// read fails with the error. nil bounds nothing.
type Room func(bytes int) error

// How many rows a read gets at a time: few while their size is not known, or if they are large.
const (
	fewRows   = 8
	manyRows  = 64
	largeRows = 512 << 10 // bytes of so many rows are too many at a time
)

// readPage reads the rows of a query, at most limit ones, through a cursor: when they have no
// more room, or are enough, Postgres sends no others. cut reports whether they had no room.
//
// cursor is the name of the cursor. pgx keeps the description of its rows by that name, so each
// list of columns has its own.
func readPage[T any](ctx context.Context, conn interface {
	Begin(ctx context.Context) (pgx.Tx, error)
}, cursor, query string, args []any, limit int, room Room, scan pgx.RowToFunc[T]) (page []T, cut bool, err error) {
	if room == nil {
		room = func(int) error { return nil }
	}
	err = pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "declare "+cursor+" no scroll cursor for "+query, args...); err != nil {
			return err
		}
		bytes := 0
		for next := fewRows; len(page) < limit; {
			rows, err := tx.Query(ctx, fmt.Sprintf("fetch %d from %s", next, cursor), pgx.QueryExecModeCacheDescribe)
			if err != nil {
				return err
			}
			n := 0
			for ; rows.Next() && len(page) < limit; n++ {
				size := 0
				for _, v := range rows.RawValues() {
					size += len(v)
				}
				if err := room(size); err != nil {
					rows.Close() // reads the others of this fetch
					if cut = len(page) > 0; cut {
						return rows.Err()
					}
					return err
				}
				row, err := scan(rows)
				if err != nil {
					rows.Close()
					return err
				}
				page = append(page, row)
				bytes += size
			}
			rows.Close()
			if err := rows.Err(); err != nil || n < next {
				return err
			}
			if next = fewRows; bytes/len(page)*manyRows <= largeRows {
				next = manyRows
			}
		}
		return nil
	})
	if err != nil {
		return nil, false, err
	}
	return page, cut, nil
}
