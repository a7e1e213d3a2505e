package snapshot

import (
	"os"
	"testing"

	"github.com/cedarpost/cedarpost/internal/mutant"
)

// smallPages does no harm: the follower loads everything again so often that a fault in that
// shows.
var smallPages = mutant.Edit{File: "follower.go", Old: "= 50_000", New: "= 4"}

var mutants = []mutant.Mutant{
	mutant.AsItIs,
	{Name: "small pages", Harmless: true, Edits: []mutant.Edit{smallPages}},
	{Name: "a load that raced with a change is kept", Edits: []mutant.Edit{
		{File: "cache.go", Old: "if *c.slot(l.uid) > at {", New: "if false {"}}},
	{Name: "a load by an old schema is kept", Edits: []mutant.Edit{
		{File: "cache.go", Old: "if at < c.floor || snap.schema != c.schema {", New: "if at < c.floor {"}}},
	{Name: "an entry serves older snapshots", Edits: []mutant.Edit{
		{File: "cache.go", Old: "if !ok || v.from > snap.Position.Number || v.schema != snap.schema {", New: "if !ok || v.schema != snap.schema {"}}},
	{Name: "an entry serves other schemas", Edits: []mutant.Edit{
		{File: "cache.go", Old: "if !ok || v.from > snap.Position.Number || v.schema != snap.schema {", New: "if !ok || v.from > snap.Position.Number {"}}},
	{Name: "an absence is good from the beginning", Edits: []mutant.Edit{
		{File: "cache.go", Old: "from: at, schema: snap.schema", New: "schema: snap.schema"}}},
	{Name: "a row is good from the beginning", Edits: []mutant.Edit{
		{File: "cache.go", Old: "v.from = l.since", New: "v.from = 0"}}},
	{Name: "a change does not drop the entry", Edits: []mutant.Edit{
		{File: "cache.go", Old: "c.entries.Invalidate(uid)", New: "_ = uid"}}},
	{Name: "a new schema does not empty the cache", Edits: []mutant.Edit{
		{File: "follower.go", Old: "if anew || len(next.Set.ChangedTypes(old.Set)) > 0 {", New: "if anew {"}}},
	{Name: "the snapshot is given out before its changes reach the cache", Edits: []mutant.Edit{
		{File: "follower.go", Old: "\t\tf.cache.apply(changes)\n", New: "\t\tf.snap.Store(next)\n\t\tf.cache.apply(changes)\n"}}},
	{Name: "changes after the first page are left out", Edits: []mutant.Edit{
		smallPages,
		{File: "follower.go", Old: "anew = len(changes) == 0 || changes[len(changes)-1].Revision < v.Position.Number", New: ""}}},
	{Name: "a load is shared with other snapshots", Edits: []mutant.Edit{
		{File: "loader.go", Old: "key := flightKey{snap, uid}", New: "key := flightKey{uid: uid}"},
		{File: "loader.go", Old: "key := (flightKey{snap, uid}); l", New: "key := (flightKey{uid: uid}); l"}}},
	{Name: "any snapshot is fresh enough", Edits: []mutant.Edit{
		{File: "follower.go", Old: "func(s *Snapshot) bool { return s.Position.Number >= number }", New: "func(*Snapshot) bool { return true }"}}},
	{Name: "hints leave ancestors out", Edits: []mutant.Edit{
		{File: "../engine/slice.go", Old: "inline || sl.set.requestOnly(uid.Type)", New: "inline || sl.visited.list[i].depth == 0"}}},
	{Name: "hints leave out what is not stored", Edits: []mutant.Edit{
		{File: "../engine/slice.go", Old: "inline || sl.set.requestOnly(uid.Type)", New: "inline || sl.pool.known[uid] == nil"}}},
	{Name: "hints leave guardrails out", Edits: []mutant.Edit{
		{File: "tags.go", Old: ", BundleTag(database, engine.Guardrails))", New: ")"}}},
	{Name: "hints leave the bundle out", Edits: []mutant.Edit{
		{File: "tags.go", Old: "BundleTag(database, e.Question.Bundle()), ", New: ""}}},
	{Name: "watchers are not told of entities", Edits: []mutant.Edit{
		{File: "hub.go", Old: "c.Kind != store.KindKey", New: "c.Kind == store.KindBundle"}}},
	{Name: "watchers are not told of bundles", Edits: []mutant.Edit{
		{File: "hub.go", Old: "c.Kind != store.KindKey", New: "c.Kind == store.KindEntity"}}},
	{Name: "watchers hear before the server answers by it", Edits: []mutant.Edit{
		{File: "follower.go", Old: "next, event, err = f.next(ctx, v)\n", New: "if next, event, err = f.next(ctx, v); event != nil {\nf.hub.publish(event)\nevent = nil\n}\n"}}},
	{Name: "a new schema is no reset", Edits: []mutant.Edit{
		{File: "follower.go", Old: "a.Name == b.Name && a.Schema == b.Schema", New: "a.Name == b.Name"}}},
}

// The edits of all mutants match the code.
func TestMutantsFit(t *testing.T) { mutant.Check(t, mutants) }

// Without any one of the safeguards of followers, loader, cache and hints, a test of the oracle
// or of the cache fails.
func TestSoakSafeguards(t *testing.T) {
	if os.Getenv("CEDARPOST_SOAK") == "" {
		t.Skip("set CEDARPOST_SOAK=1 to run")
	}
	mutant.Test(t, "^(TestOracle|TestCacheNeverDiffersFromTheStore|TestHintsAreSound|TestOnlyPolicies)$", mutants,
		"-rapid.nofailfile", "-rapid.shrinktime", "0s")
}
