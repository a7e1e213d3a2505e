package offline

import (
	"fmt"
	"slices"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/server/engine"
)

// Lint looks for what is valid and probably a mistake in a bundle of a set that was compiled from it and
// from the sources of others. It leaves out the rules that the bundle switches off.
func Lint(b *bundle.Bundle, others []engine.Source, set *engine.Set) []engine.LintFinding {
	list := set.Lint(b.Name, append(slices.Clone(others), Source(b)))
	for _, id := range b.LintDisabled {
		if !engine.IsLintRule(id) {
			list = append(list, engine.LintFinding{Rule: engine.RuleUnknown, Finding: engine.Finding{
				Bundle: b.Name, File: bundle.ManifestName, Message: fmt.Sprintf("lint.disable names %q, and there is no such rule", id), Warning: true,
			}})
		}
	}
	return Enabled(b, list)
}

// Enabled leaves out the findings of rules that a bundle switches off.
func Enabled(b *bundle.Bundle, list []engine.LintFinding) []engine.LintFinding {
	return slices.DeleteFunc(list, func(f engine.LintFinding) bool { return slices.Contains(b.LintDisabled, f.Rule) })
}
