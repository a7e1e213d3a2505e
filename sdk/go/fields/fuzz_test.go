package fields_test

import (
	"bytes"
	"encoding/json"
	"iter"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/cedarpost/cedarpost/sdk/go/fields"
)

// FuzzJSON: for any document, the output has only permitted values. If there is no
// error, input and output are JSON, and no permitted value is missing.
func FuzzJSON(f *testing.F) {
	for _, doc := range []string{
		`{"a":1,"b":{"c":[1.0,{"d":null}]},"a.b":2,"":3}`, `[{"a":"\ud83d\ude00"},[],{}]`, `null`, `{"a":{"b":[}`, "{\"a\":\"\xff\"}",
		`{"a":1}{"a":2}`, `{"\u0061":1e5,"a":-0}`, `{"a" 1}`, `{"a":1,}`, nested(101), `{"b":[[],[{"c":tru}]]}`,
	} {
		for _, paths := range []string{"", "a", "a.b b.c", "b -b.c", "b.c.d -a"} {
			f.Add(doc, paths)
		}
	}
	f.Fuzz(func(t *testing.T, doc, paths string) {
		var r rules
		r.permitted, r.denied = lists(paths)
		for _, p := range r.permitted {
			if slices.Contains(strings.Split(p, "."), "") {
				t.Skip() // permits nothing, which rules does not know
			}
		}
		out, dropped, err := run(fields.New(r.permitted, r.denied), doc)
		for _, p := range dropped.UnknownPaths {
			if !utf8.ValidString(p) || len(p) > 256 {
				t.Fatalf("%q", p)
			}
		}
		if err != nil {
			return
		}
		if !json.Valid([]byte(doc)) || !json.Valid([]byte(out)) || !utf8.ValidString(doc) {
			t.Fatalf("%q became %q", doc, out)
		}
		got, want := leaves(t, nil, out), r.expected(leaves(t, nil, doc))
		if !sameLeaves(got, want) {
			t.Fatalf("of %q is left %q: %v, want %v", doc, out, got, want)
		}
	})
}

// checkPaths checks rules that hold for every list of paths.
func checkPaths(t *testing.T, paths []string) {
	if !slices.IsSorted(paths) || len(slices.Compact(slices.Clone(paths))) != len(paths) || len(paths) > 1000 {
		t.Fatalf("%q", paths)
	}
	for _, p := range paths {
		if len(p) > 256 || slices.Contains(strings.Split(p, "."), "") {
			t.Fatalf("%q", p)
		}
	}
}

// FuzzMergePatch: applied to an empty document, a patch sets only nulls outside of the
// returned paths.
func FuzzMergePatch(f *testing.F) {
	for _, doc := range []string{`{"a":{"b":1,"c":null},"d":[{"e.f":1}],"g":{}}`, `{"a.b":1}`, `{"":1}`, `[]`, `{"a":1}x`, `{"a":{"a":1},"a":2}`} {
		f.Add([]byte(doc))
	}
	f.Fuzz(func(t *testing.T, doc []byte) {
		paths, err := fields.MergePatch(doc)
		if err != nil {
			if paths != nil {
				t.Fatalf("%q beside %v", paths, err)
			}
			return
		}
		checkPaths(t, paths)
		if !json.Valid(doc) {
			t.Fatalf("%q is not JSON", doc)
		}
		for _, l := range leaves(t, nil, string(doc)) {
			if !under(l.path, paths) {
				t.Fatalf("%q changes %q, which is not below %q", doc, l.path, paths)
			}
		}
		if _, dropped, err := run(fields.New(paths, nil), string(doc)); err != nil || dropped.Denied+dropped.Unknown > 0 {
			t.Fatalf("%q is more than %q: %v, %v", doc, paths, dropped, err)
		}
	})
}

// FuzzJSONPatch: encoding/json reads an accepted patch in the same way, and the members
// that name a place are among the returned paths.
func FuzzJSONPatch(f *testing.F) {
	for _, doc := range []string{
		`[{"op":"add","path":"/a/0/b","value":{"c":1}},{"op":"move","from":"/d~1e","path":"/f/-"}]`, `[]`, `[{}]`,
		`[{"op":"test","path":"","value":1}]`, `[{"op":"remove","path":"/a","Path":"/b"}]`, `[{"op":"remove","path":"/a~2"}]`,
	} {
		f.Add([]byte(doc))
	}
	f.Fuzz(func(t *testing.T, doc []byte) {
		paths, err := fields.JSONPatch(doc)
		if err != nil {
			if paths != nil {
				t.Fatalf("%q beside %v", paths, err)
			}
			return
		}
		checkPaths(t, paths)
		var ops []struct {
			Op, Path, From string
			Value          json.RawMessage
		}
		d := json.NewDecoder(bytes.NewReader(doc))
		d.DisallowUnknownFields()
		if err := d.Decode(&ops); err != nil {
			t.Fatalf("%q: %v", doc, err)
		}
		named := 0
		for _, op := range ops {
			for _, pointer := range []string{op.Path, op.From} {
				var path []string
				for s := range strings.SplitSeq(strings.TrimPrefix(pointer, "/"), "/") {
					if number := strings.Trim(s, "0123456789") == ""; s != "-" && (!number || len(s) > 1 && s[0] == '0') {
						path = append(path, strings.ReplaceAll(strings.ReplaceAll(s, "~1", "/"), "~0", "~"))
					}
				}
				if pointer != "" && !slices.Contains(paths, strings.Join(path, ".")) {
					t.Fatalf("%q touches %q, which is not in %q", doc, path, paths)
				}
				if pointer == "" {
					continue
				}
				named++
				if pointer == op.Path && len(op.Value) > 0 {
					var value any
					if err := json.Unmarshal(op.Value, &value); err != nil {
						t.Fatalf("%q: %v", doc, err)
					}
					for below := range heldBy(strings.Join(path, "."), value) {
						if named++; !slices.Contains(paths, below) {
							t.Fatalf("%q puts %q, which is not in %q", doc, below, paths)
						}
					}
				}
			}
		}
		if named < len(paths) || len(ops) > named {
			t.Fatalf("%q: %d operations, %d places, %q", doc, len(ops), named, paths)
		}
	})
}

// heldBy returns the paths of all members in a value.
func heldBy(path string, value any) iter.Seq[string] {
	return func(yield func(string) bool) {
		switch value := value.(type) {
		case []any:
			for _, v := range value {
				heldBy(path, v)(yield)
			}
		case map[string]any:
			for key, v := range value {
				yield(path + "." + key)
				heldBy(path+"."+key, v)(yield)
			}
		}
	}
}
