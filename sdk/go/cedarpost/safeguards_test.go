package cedarpost

import (
	"os"
	"testing"

	"github.com/cedarpost/cedarpost/internal/mutant"
)

// mutants are caches, each without one of its safeguards.
var mutants = []mutant.Mutant{
	mutant.AsItIs,
	{Name: "an answer that comes late is taken for a new one", Edits: []mutant.Edit{
		{File: "cache.go", Old: "epoch: ep, number: t.number,", New: "epoch: ep, number: max(t.number, ep.applied.Load()),"}}},
	{Name: "a gap goes unnoticed", Edits: []mutant.Edit{
		{File: "cache.go", Old: "m.GetReset_() || m.GetAfter() > applied", New: "m.GetReset_()"}}},
	{Name: "a reset goes unnoticed", Edits: []mutant.Edit{
		{File: "cache.go", Old: "m.GetReset_() || m.GetAfter() > applied", New: "m.GetAfter() > applied"}}},
	{Name: "a change does not reach its tags", Edits: []mutant.Edit{
		{File: "cache.go", Old: "raise(&ep.newest[tag%changeSlots], number)", New: "_ = tag"}}},
	{Name: "the lease begins when the proof arrives", Edits: []mutant.Edit{
		{File: "cache.go", Old: "proof{t.number, sent})", New: "proof{t.number, c.clock()})"}}},
	{Name: "the lease begins before the watch is there", Edits: []mutant.Edit{
		{File: "cache.go", Old: "len(c.asked) > 0 && c.asked[0].number <= ep.applied.Load()", New: "len(c.asked) > 0"}}},
	{Name: "nobody looks at the lease", Edits: []mutant.Edit{
		{File: "cache.go", Old: "lease == nil || now.since(*lease) > c.bound {", New: "lease == nil {"}}},
	{Name: "time stands still while the machine is suspended", Edits: []mutant.Edit{
		{File: "clock.go", Old: "max(now.mono-t.mono, now.wall-t.wall)", New: "now.mono-t.mono"}}},
	{Name: "an answer of another history is kept", Edits: []mutant.Edit{
		{File: "cache.go", Old: "if t.history != ep.history {\n\t\tc.entries.Invalidate(key)\n\t\treturn\n\t}\n", New: ""}}},
	{Name: "an answer takes the place of a newer one", Edits: []mutant.Edit{
		{File: "cache.go", Old: "found && old.epoch == ep && old.number > e.number", New: "found && false"},
		{File: "cache.go", Old: " && !c.seen.beyond(t)", New: ""}}},
	{Name: "an answer that may not be kept leaves an older one", Edits: []mutant.Edit{
		{File: "cache.go", Old: "return nil, otter.InvalidateOp", New: "return nil, otter.CancelOp"}}},
	{Name: "answers outlive their history", Edits: []mutant.Edit{
		{File: "cache.go", Old: "e.epoch != ep || e.number < ep.floor.Load()", New: "e.number < ep.floor.Load()"},
		{File: "cache.go", Old: "c.epoch.Store(ep)\n\tc.entries.InvalidateAll()", New: "c.epoch.Store(ep)"},
		{File: "cache.go", Old: "c.epoch.Store(nil)\n\tc.entries.InvalidateAll()", New: "c.epoch.Store(nil)"}}},
	{Name: "a lease outlives its history", Edits: []mutant.Edit{
		{File: "cache.go", Old: "if !ok || ep == nil || ep.history != t.history {\n\t\treturn false", New: "if !ok || ep == nil {\n\t\treturn false"}}},
	{Name: "what was before the watch is taken for known", Edits: []mutant.Edit{
		{File: "cache.go", Old: "ep.floor.Store(t.number)", New: ""}}},
	{Name: "an answer never gets too old", Edits: []mutant.Edit{
		{File: "cache.go", Old: "|| now.since(e.sent) > e.maxAge", New: ""}}},
	{Name: "any answer is fresh enough", Edits: []mutant.Edit{
		{File: "cache.go", Old: "ok && t.history == ep.history && t.number <= ep.applied.Load()", New: "ok && t.number >= 0"}}},
	{Name: "what was applied goes back", Edits: []mutant.Edit{
		{File: "cache.go", Old: "if ep.token.Load() == nil || number > ep.applied.Load() {", New: "{"}}},
}

const modelTest = "^TestNoAnswerIsOlderThanTheBound$"

// The edits of all mutants fit the code.
func TestMutantsFit(t *testing.T) { mutant.Check(t, mutants) }

// Without any one of its safeguards the cache fails the model test.
func TestSoakSafeguards(t *testing.T) {
	if os.Getenv("CEDARPOST_SOAK") == "" {
		t.Skip("set CEDARPOST_SOAK=1 to run")
	}
	t.Setenv("CEDARPOST_MODEL_RUNS", "20000")
	mutant.Test(t, modelTest, mutants)
}
