package storetest

import (
	"testing"

	"pgregory.net/rapid"
)

// Check is [rapid.Check] on so many cases at most. By itself it would draw 100, which
// takes minutes where each case has a database.
func Check(t *testing.T, cases int, prop func(*rapid.T)) {
	t.Helper()
	failed := false
	rapid.Check(t, func(rt *rapid.T) {
		if cases <= 0 && !failed { // one that failed is run again, to find a smaller one
			return
		}
		cases--
		passed := false
		defer func() { failed = failed || !passed || rt.Failed() }()
		prop(rt)
		passed = true
	})
}
