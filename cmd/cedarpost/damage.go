package main

import (
	"fmt"

	"github.com/cedarpost/cedarpost/logformat"
)

// damagedRow returns a damaged row as the row of a table whose last two columns are a text
// and an id.
func damagedRow(d *logformat.Damage, columns int) []string {
	row := []string{"-", "DAMAGED"}
	if d.Time != nil {
		row[0] = localTime(d.Time)
	}
	if d.Kind == "missing" {
		row[1] = "MISSING"
	}
	for len(row) < columns-2 {
		row = append(row, "-")
	}
	return append(row, d.Reason, d.ID)
}

// warnDamaged warns on stderr, because a program may read stdout.
func (c *console) warnDamaged(n int) {
	if n > 0 {
		fmt.Fprintf(c.err, "%s damaged: verify the log (cedarpost audit verify)\n", count(n, "row is", "rows are"))
	}
}
