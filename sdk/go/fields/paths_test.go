package fields_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"google.golang.org/protobuf/types/known/fieldmaskpb"

	"github.com/cedarpost/cedarpost/sdk/go/fields"
)

// many is an object of n members.
func many(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, `,"k%d":1`, i)
	}
	return "{" + strings.TrimPrefix(b.String(), ",") + "}"
}

func deep(n int) string { return strings.Repeat(`{"a":`, n) + "1" + strings.Repeat("}", n) }

// verdict returns the paths with blanks between, or the error.
func verdict(paths []string, err error) string {
	if err != nil {
		return err.Error()
	}
	return strings.Join(paths, " ")
}

func TestMergePatch(t *testing.T) {
	for _, c := range []struct{ says, doc, want string }{
		{"a leaf", `{"status":"paid"}`, "status"},
		{"leaves are sorted", `{"b":1,"a":{"d":2,"c":3}}`, "a.c a.d b"},
		{"null removes", `{"customer":{"email":null},"items":null}`, "customer.email items"},
		{"an empty object is put there", `{"customer":{}}`, "customer"},
		{"a list is put there whole", `{"items":["a",1]}`, "items"},
		{"what is in a list is named", `{"items":[{"a":{"b":1}},[{"c":{}}]]}`, "items items.a items.a.b items.c"},
		{"an empty patch", `{}`, ""},
		{"equal keys both count", `{"a":{"b":1},"a":{"c":2}}`, "a.b a.c"},
		{"a path once", `{"a":1,"a":2}`, "a"},
		{"a key spelled with escapes", `{"\u0061":1}`, "a"},
		{"digits are names", `{"items":{"0":{"-":1}}}`, "items.0.-"},
	} {
		if got := verdict(fields.MergePatch([]byte(c.doc))); got != c.want {
			t.Errorf("%s: %s changes %q, want %q", c.says, c.doc, got, c.want)
		}
	}
	for _, c := range []struct{ says, doc, want string }{
		{"a key with a dot", `{"customer":{"x.y":1}}`, `"x.y" below "customer"`},
		{"a key with a dot in an escape", `{"a\u002eb":1}`, `"a.b"`},
		{"an empty key", `{"a":{"":1}}`, `"" below "a"`},
		{"a list", `[{"a":1}]`, "replaces everything"},
		{"null", `null`, "replaces everything"},
		{"nothing", ``, "unexpected EOF"},
		{"two documents", `{"a":1}{"b":1}`, "after the document"},
		{"bad UTF-8", "{\"a\":\"\xff\"}", "byte 6: not JSON"},
		{"too deep", deep(101), "deeper than 100"},
		{"too deep in a list", `{"a":` + nested(100) + `}`, "deeper than 100"},
		{"too many", many(1001), "more than 1000 paths"},
		{"a long path", `{"` + strings.Repeat("k", 257) + `":1}`, "more than 256 bytes"},
		{"a large patch", `{"a":"` + strings.Repeat("x", 1<<20) + `"}`, "more than 1048576 bytes"},
	} {
		if got, err := fields.MergePatch([]byte(c.doc)); err == nil || got != nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %q, %v; want an error with %q", c.says, got, err, c.want)
		}
	}
	for says, doc := range map[string]string{"100 deep": deep(100), "1000 paths": many(1000)} {
		if _, err := fields.MergePatch([]byte(doc)); err != nil {
			t.Errorf("%s: %v", says, err)
		}
	}
}

func TestJSONPatch(t *testing.T) {
	for _, c := range []struct{ says, doc, want string }{
		{"each operation", `[{"op":"add","path":"/a","value":1},{"op":"remove","path":"/b"},{"op":"replace","path":"/c/d","value":2}]`, "a b c.d"},
		{"a value is named with what it holds", `[{"op":"replace","value":{"address":"x","more":[{"y":{}}]},"path":"/shipping"}]`, "shipping shipping.address shipping.more shipping.more.y"},
		{"what is moved and where to", `[{"op":"move","from":"/a","path":"/b"}]`, "a b"},
		{"a copy reads", `[{"op":"copy","from":"/secret","path":"/b"}]`, "b secret"},
		{"a test reads", `[{"op":"test","path":"/secret","value":7}]`, "secret"},
		{"indices are left out", `[{"op":"add","path":"/items/0/tags/-","value":1},{"op":"remove","path":"/items/12"}]`, "items items.tags"},
		{"a number that is no index", `[{"op":"remove","path":"/items/01"},{"op":"remove","path":"/a/-1"}]`, "a.-1 items.01"},
		{"slash and tilde", `[{"op":"remove","path":"/a~1b/c~0d/~01"}]`, "a/b.c~d.~1"},
		{"no operations", `[]`, ""},
	} {
		if got := verdict(fields.JSONPatch([]byte(c.doc))); got != c.want {
			t.Errorf("%s: %s touches %q, want %q", c.says, c.doc, got, c.want)
		}
	}
	for _, c := range []struct{ says, doc, want string }{
		{"the whole document", `[{"op":"replace","path":"","value":{}}]`, "whole document"},
		{"a copy of the whole document", `[{"op":"copy","from":"","path":"/a"}]`, "whole document"},
		{"an element of the document", `[{"op":"remove","path":"/0"}]`, "begins with an index"},
		{"a field of an element of the document", `[{"op":"remove","path":"/3/x"}]`, "begins with an index"},
		{"a key with a dot in a value", `[{"op":"add","path":"/a","value":{"x.y":2}}]`, `"x.y"`},
		{"an unknown operation", `[{"op":"merge","path":"/a"}]`, "unknown operation"},
		{"an operation in capitals", `[{"op":"Add","path":"/a","value":1}]`, "unknown operation"},
		{"no operation", `[{"path":"/a"}]`, "unknown operation"},
		{"an unknown member", `[{"op":"remove","path":"/a","Path":"/b"}]`, `unknown member "Path"`},
		{"an unknown member that is no string", `[{"op":"remove","path":"/a","x":1}]`, `"x"`},
		{"a member twice", `[{"op":"remove","path":"/a","path":"/b"}]`, `"path" twice`},
		{"a value twice", `[{"op":"add","path":"/a","value":1,"value":2}]`, `"value" twice`},
		{"a member of another operation", `[{"op":"add","path":"/a","value":1,"from":"/b"}]`, "a member too many"},
		{"a value too many", `[{"op":"remove","path":"/a","value":1}]`, "a member too many"},
		{"no path", `[{"op":"remove"}]`, `without "path"`},
		{"no from", `[{"op":"move","path":"/a"}]`, `without "from"`},
		{"no value", `[{"op":"add","path":"/a"}]`, `without "value"`},
		{"a path that is no string", `[{"op":"remove","path":["a"]}]`, "not a string"},
		{"a path that is no pointer", `[{"op":"remove","path":"a/b"}]`, "not a JSON pointer"},
		{"a lonely tilde", `[{"op":"remove","path":"/a~2"}]`, "neither ~0 nor ~1"},
		{"a tilde at the end", `[{"op":"remove","path":"/a~"}]`, "neither ~0 nor ~1"},
		{"an empty segment", `[{"op":"remove","path":"/a//b"}]`, `"" below "a"`},
		{"a slash at the end", `[{"op":"remove","path":"/a/"}]`, `"" below "a"`},
		{"a segment with a dot", `[{"op":"remove","path":"/a/b.c"}]`, `"b.c" below "a"`},
		{"an object", `{"op":"remove","path":"/a"}`, "in place of"},
		{"an element that is no object", `["remove"]`, "in place of"},
		{"two documents", `[][]`, "after the document"},
		{"too deep", `[{"op":"remove","path":"` + strings.Repeat("/a", 101) + `"}]`, "deeper than 100"},
		{"a value too deep", `[{"op":"add","path":"/a","value":` + nested(99) + `}]`, "deeper than 100"},
		{"a long path", `[{"op":"remove","path":"/` + strings.Repeat("k", 257) + `"}]`, "more than 256 bytes"},
		{"a large patch", `[` + strings.Repeat(" ", 1<<20) + `]`, "more than 1048576 bytes"},
	} {
		if got, err := fields.JSONPatch([]byte(c.doc)); err == nil || got != nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %q, %v; want an error with %q", c.says, got, err, c.want)
		}
	}
	var ops []string
	for i := range 1001 {
		ops = append(ops, fmt.Sprintf(`{"op":"remove","path":"/k%d"}`, i))
	}
	if _, err := fields.JSONPatch([]byte("[" + strings.Join(ops, ",") + "]")); err == nil {
		t.Error("1001 paths were taken")
	}
	if got, err := fields.JSONPatch([]byte("[" + strings.Join(ops[1:], ",") + "]")); err != nil || len(got) != 1000 {
		t.Errorf("1000 paths: %v", err)
	}
}

func TestMask(t *testing.T) {
	for _, c := range []struct {
		says, want string
		paths      []string
	}{
		{"paths are sorted, once each", "a.b_c d1", []string{"d1", "a.b_c", "d1"}},
		{"no paths", "means every field", nil},
		{"a star", `"*" is not a name`, []string{"a", "*"}},
		{"a star below", `"*" is not a name`, []string{"items.*.price"}},
		{"an empty path", `"" is not a name`, []string{""}},
		{"an empty segment", `"" is not a name`, []string{"a..b"}},
		{"a dot at the end", `"" is not a name`, []string{"a."}},
		{"a key of a map", "is not a name", []string{"labels.`a.b`"}},
		{"an index", `"0" is not a name`, []string{"items.0"}},
		{"a blank", `"a, b" is not a name`, []string{"a, b"}},
		{"a letter beyond ASCII", `"é" is not a name`, []string{"é"}},
		{"a long path", "more than 256 bytes", []string{strings.Repeat("k", 257)}},
	} {
		if got := verdict(fields.Mask(&fieldmaskpb.FieldMask{Paths: c.paths})); got != c.want && !strings.Contains(got, c.want) {
			t.Errorf("%s: %q is %q, want %q", c.says, c.paths, got, c.want)
		}
	}
	if got, err := fields.Mask(nil); err == nil || got != nil {
		t.Error("nil was taken")
	}
	var paths []string
	for i := range 1001 {
		paths = append(paths, fmt.Sprint("k", i))
	}
	if _, err := fields.Mask(&fieldmaskpb.FieldMask{Paths: paths}); err == nil {
		t.Error("1001 paths were taken")
	}
}

func TestChanged(t *testing.T) {
	for _, c := range []struct{ says, before, after, want string }{
		{"nothing", `{"a":[1,{"b":null}]}`, `{"a":[1,{"b":null}]}`, ""},
		{"a leaf", `{"a":1,"b":2}`, `{"a":1,"b":3}`, "b"},
		{"another type", `{"a":1,"b":"2"}`, `{"a":"1","b":null}`, "a b"},
		{"a leaf came, another went", `{"a":1}`, `{"b":1}`, "a b"},
		{"null came", `{}`, `{"a":null}`, "a"},
		{"an object went", `{"a":{"b":1,"c":{"d":2}}}`, `{}`, "a.b a.c.d"},
		{"an empty object came", `{}`, `{"a":{}}`, "a"},
		{"an object lost all", `{"a":{"b":1}}`, `{"a":{}}`, "a.b"},
		{"an object in place of a value", `{"a":1}`, `{"a":{"b":1}}`, "a a.b"},
		{"null in place of an object", `{"a":{"b":1,"c":{"d":null}}}`, `{"a":null}`, "a.b a.c.d"},
		{"an object in place of null", `{"a":null}`, `{"a":{"b":1}}`, "a.b"},
		{"an object in place of a list", `{"items":[{"price":1}]}`, `{"items":{"qty":1}}`, "items items.price items.qty"},
		{"an element of a list", `{"items":[{"price":1,"n":1},{"price":2}]}`, `{"items":[{"price":1,"n":1},{"price":3}]}`, "items.price"},
		{"a list that grew", `{"items":[{"price":1}]}`, `{"items":[{"price":1},{"price":1}]}`, "items.price"},
		{"a list that lost an element with more members", `{"items":[{"price":1,"cost":{"net":1}},{"price":1}]}`, `{"items":[{"price":1}]}`, "items.cost.net items.price"},
		{"a list of lists", `{"items":[[{"price":1}],[2]]}`, `{"items":[[{"price":1}]]}`, "items items.price"},
		{"a list of plain values", `{"items":[1]}`, `{"items":[1,null]}`, "items"},
		{"a list in place of null", `{"items":null}`, `{"items":[{"price":1}]}`, "items.price"},
		{"a list that came", `{}`, `{"items":[]}`, "items"},
		{"two documents that are lists", `[{"a":1}]`, `[{"a":2}]`, "a"},
		{"digits", `{"a":1}`, `{"a":1.0}`, "a"},
		{"documents of two lengths", `[{"a":1}]`, `[]`, "neither two objects nor two lists"},
		{"an object and null", `{}`, `null`, "neither two objects nor two lists"},
		{"a key with a dot", `{"a.b":1}`, `{"a.b":2}`, `"a.b"`},
		{"an empty key", `{"a":{"":1}}`, `{"a":{}}`, `"" below "a"`},
	} {
		if got := verdict(fields.Changed(decode(t, c.before), decode(t, c.after))); got != c.want && !(strings.Contains(got, "fields: ") && strings.Contains(got, c.want)) {
			t.Errorf("%s: %s to %s changes %q, want %q", c.says, c.before, c.after, got, c.want)
		}
	}
	for says, bad := range map[string]any{"a channel": make(chan int), "deep": decode(t, `{"a":`+nested(101)+`}`), "many": decode(t, many(1001))} {
		if _, err := fields.Changed(bad, map[string]any{}); err == nil && says != "deep" {
			t.Errorf("%s was taken", says)
		}
		if _, err := fields.Changed(map[string]any{}, bad); err == nil && says != "deep" {
			t.Errorf("%s was taken", says)
		}
	}
	// Two readers may use different ones of two members with one name.
	for _, c := range []struct{ before, after, err string }{
		{`{"total":1}`, `{"total":2,"total":1}`, `fields: "total" twice in an object`},
		{`{"a":[{"b":1,"c":2,"b":1}]}`, `{"a":[{"b":1,"c":2}]}`, `fields: "b" twice in an object`},
		{`{"a":"b"}`, `{"a":"\ud800"}`, `fields: not Unicode`},
	} {
		if got, err := fields.Changed(json.RawMessage(c.before), json.RawMessage(c.after)); err == nil || err.Error() != c.err {
			t.Errorf("%s to %s changes %q, %v, want %s", c.before, c.after, got, err, c.err)
		}
	}
	x := decode(t, `{"a":`+nested(101)+`}`)
	if _, err := fields.Changed(x, x); err == nil {
		t.Error("101 deep was taken")
	}
}
