package server

import (
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// mutation takes one safeguard away.
type mutation struct {
	name  string
	edits []patch
}

// patch replaces text that stands in a file of this package, or of one below it,
// exactly once.
type patch struct{ file, old, replacement string }

// smallPages is no mutation: the follower begins anew so often that a mistake in
// it shows.
var smallPages = patch{"follower.go", "= 50_000", "= 4"}

var mutations = []mutation{
	{"a load that raced with a change is kept", []patch{
		{"cache.go", "if *c.slot(l.uid) > at {", "if false {"}}},
	{"a load by an old schema is kept", []patch{
		{"cache.go", "if at < c.floor || snap.schema != c.schema {", "if at < c.floor {"}}},
	{"an entry serves older snapshots", []patch{
		{"cache.go", "if !ok || v.from > snap.position.Number || v.schema != snap.schema {", "if !ok || v.schema != snap.schema {"}}},
	{"an entry serves other schemas", []patch{
		{"cache.go", "if !ok || v.from > snap.position.Number || v.schema != snap.schema {", "if !ok || v.from > snap.position.Number {"}}},
	{"an absence is good from the beginning", []patch{
		{"cache.go", "from: at, schema: snap.schema", "schema: snap.schema"}}},
	{"a row is good from the beginning", []patch{
		{"cache.go", "v.from = l.since", "v.from = 0"}}},
	{"a change does not drop the entry", []patch{
		{"cache.go", "c.entries.Invalidate(uid)", "_ = uid"}}},
	{"a new schema does not empty the cache", []patch{
		{"follower.go", "if anew || len(next.set.ChangedTypes(old.set)) > 0 {", "if anew {"}}},
	{"the snapshot is given out before its changes reach the cache", []patch{
		{"follower.go", "\t\tf.cache.apply(changes)\n", "\t\tf.snap.Store(next)\n\t\tf.cache.apply(changes)\n"}}},
	{"changes after the first page are left out", []patch{
		smallPages,
		{"follower.go", "anew = len(changes) == 0 || changes[len(changes)-1].Revision < v.Position.Number", ""}}},
	{"a load is shared with other snapshots", []patch{
		{"loader.go", "key := flightKey{snap, uid}", "key := flightKey{uid: uid}"},
		{"loader.go", "delete(l.flights, flightKey{snap, uid})", "delete(l.flights, flightKey{uid: uid})"}}},
	{"any snapshot is fresh enough", []patch{
		{"follower.go", "func(has store.Position) bool { return has.Number >= number }", "func(store.Position) bool { return true }"}}},
	{"hints leave ancestors out", []patch{
		{"engine/slice.go", "inline || sl.set.requestOnly(uid.Type)", "inline || sl.visited[uid] == 0"}}},
	{"hints leave out what is not stored", []patch{
		{"engine/slice.go", "inline || sl.set.requestOnly(uid.Type)", "inline || sl.pool.known[uid] == nil"}}},
	{"hints leave guardrails out", []patch{
		{"hint.go", ", bundleTag(database, engine.Guardrails))", ")"}}},
	{"hints leave the bundle out", []patch{
		{"hint.go", "bundleTag(database, q.Bundle()), ", ""}}},
	{"watchers are not told of entities", []patch{
		{"hub.go", "c.Kind != store.KindKey", "c.Kind == store.KindBundle"}}},
	{"watchers are not told of bundles", []patch{
		{"hub.go", "c.Kind != store.KindKey", "c.Kind == store.KindEntity"}}},
	{"watchers hear before the server answers by it", []patch{
		{"follower.go", "next, told, err = f.next(ctx, v)\n", "if next, told, err = f.next(ctx, v); told != nil {\nf.hub.publish(told)\ntold = nil\n}\n"}}},
	{"a new schema is no reset", []patch{
		{"follower.go", "a.Name == b.Name && a.Schema == b.Schema", "a.Name == b.Name"}}},
}

// Each safeguard of followers, loader, cache and hints matters: without it, an oracle's
// test or the cache's own fails.
func TestSoakSafeguards(t *testing.T) {
	if os.Getenv("CEDARPOST_SOAK") == "" {
		t.Skip("set CEDARPOST_SOAK=1 to run")
	}
	for _, whole := range []mutation{{name: "as it is"}, {"small pages", []patch{smallPages}}} {
		t.Run(whole.name, func(t *testing.T) {
			if out, err := whole.run(t); err != nil {
				t.Errorf("%v\n%s", err, out)
			}
		})
	}
	for _, m := range mutations {
		t.Run(m.name, func(t *testing.T) {
			out, err := m.run(t)
			var exit *exec.ExitError
			switch {
			case err == nil:
				t.Error("nothing failed")
			case !errors.As(err, &exit) || !strings.Contains(out, "--- FAIL: Test"):
				t.Errorf("no test failed, but the run did: %v\n%s", err, out)
			}
			for line := range strings.Lines(out) {
				if strings.HasPrefix(line, "--- ") {
					t.Log(strings.TrimSpace(line))
				}
			}
		})
	}
}

// run tests this package with the edits laid over it.
func (m mutation) run(t *testing.T) (output string, err error) {
	texts := map[string]string{}
	for _, e := range m.edits {
		if texts[e.file] == "" {
			source, err := os.ReadFile(e.file)
			if err != nil {
				t.Fatal(err)
			}
			texts[e.file] = string(source)
		}
		if n := strings.Count(texts[e.file], e.old); n != 1 {
			t.Fatalf("this table is stale: %q stands in %s %d times", e.old, e.file, n)
		}
		texts[e.file] = strings.Replace(texts[e.file], e.old, e.replacement, 1)
	}
	dir := t.TempDir()
	overlay := struct{ Replace map[string]string }{map[string]string{}}
	for file, text := range texts {
		source, err := filepath.Abs(file)
		if err != nil {
			t.Fatal(err)
		}
		overlay.Replace[source] = filepath.Join(dir, filepath.Base(file))
		if err := os.WriteFile(overlay.Replace[source], []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	list, err := json.Marshal(overlay)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "overlay.json")
	if err := os.WriteFile(file, list, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), "go", "test", "-overlay", file, "-count", "1", "-v",
		"-run", "^(TestOracle|TestCacheNeverDiffersFromTheStore|TestHintsAreSound|TestOnlyPolicies)$", ".", "-rapid.nofailfile", "-rapid.shrinktime", "0s").CombinedOutput()
	return string(out), err
}
