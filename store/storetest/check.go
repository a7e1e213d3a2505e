package storetest

import (
	"testing"

	"pgregory.net/rapid"
)

// Check is [rapid.Check] with a largest number of cases. rapid.Check alone draws 100, which
// takes long if each case fills a database.
func Check(t *testing.T, cases int, prop func(*rapid.T)) {
	t.Helper()
	failed := false
	rapid.Check(t, func(rt *rapid.T) {
		if cases <= 0 && !failed { // a failed case runs again, to find a smaller one
			return
		}
		cases--
		passed := false
		defer func() { failed = failed || !passed || rt.Failed() }()
		prop(rt)
		passed = true
	})
}
