package auditlog_test

import (
	"testing"

	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/auditlog"
)

// RootBuilder returns the same root as Root, and a call of its Root in between changes nothing.
func TestRootBuilder(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		all := leaves(rapid.IntRange(0, 600).Draw(t, "leaves"))
		asked := rapid.IntRange(0, len(all)).Draw(t, "asked after")
		var b auditlog.RootBuilder
		for i, leaf := range all {
			if i == asked && b.Root() != auditlog.Root(all[:i]) {
				t.Fatalf("another root of %d leaves", i)
			}
			b.Add(leaf)
		}
		if got, want := b.Root(), auditlog.Root(all); got != want {
			t.Fatalf("the root of %d leaves is %v, want %v", len(all), got, want)
		}
	})
}
