package fields_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/cedarpost/cedarpost/sdk/go/fields"
)

// lists splits "a b.c -d" into permitted paths and, with a dash before, denied ones.
func lists(s string) (permitted, denied []string) {
	for _, p := range strings.Fields(s) {
		if rest, ok := strings.CutPrefix(p, "-"); ok {
			denied = append(denied, rest)
		} else {
			permitted = append(permitted, p)
		}
	}
	return permitted, denied
}

func filter(s string) *fields.Filter { return fields.New(lists(s)) }

func run(f *fields.Filter, doc string) (string, fields.Dropped, error) {
	var out bytes.Buffer
	dropped, err := f.JSON(&out, strings.NewReader(doc))
	return out.String(), dropped, err
}

// show writes counts and paths as "2 denied, 1 unknown x".
func show(d fields.Dropped) string {
	return fmt.Sprintf("%d denied, %d unknown %s", d.Denied, d.Unknown, strings.Join(d.UnknownPaths, " "))
}

func TestJSON(t *testing.T) {
	for _, c := range []struct{ says, paths, doc, want, dropped string }{
		{"an empty list permits nothing", "", `{"a":1,"b":{"c":2}}`, `{}`, "0 denied, 2 unknown a b"},
		{"a permitted leaf stays", "a", `{"a":1,"b":2}`, `{"a":1}`, "0 denied, 1 unknown b"},
		{"a refused leaf goes", "a -b", `{"a":1,"b":2}`, `{"a":1}`, "1 denied, 0 unknown "},
		{"order stays", "c a", `{"c":1,"b":2,"a":3}`, `{"c":1,"a":3}`, "0 denied, 1 unknown b"},
		{"digits stay", "a", `{"a":[1.0,-0,1E+400,12345678901234567890.10]}`, `{"a":[1.0,-0,1E+400,12345678901234567890.10]}`, ""},
		{"escapes stay", "a", `{"a":"\u00e9\/\ud83d\ude00 é😀"}`, `{"a":"\u00e9\/\ud83d\ude00 é😀"}`, ""},
		{"white space goes", "a", " {\n\t\"a\" : [ 1 , true ] }\r\n", `{"a":[1,true]}`, ""},
		{"an object at a leaf stays whole", "a", `{"a":{"x.y":{"":[]}},"b":0}`, `{"a":{"x.y":{"":[]}}}`, "0 denied, 1 unknown b"},
		{"a nested leaf", "customer.email -customer.name", `{"customer":{"name":"n","email":"e","x":1}}`, `{"customer":{"email":"e"}}`, "1 denied, 1 unknown customer.x"},
		{"list elements share a path", "items.price", `{"items":[{"price":1,"cost":2},{"cost":3}]}`, `{"items":[{"price":1},{}]}`, "0 denied, 2 unknown items.cost"},
		{"lists in lists", "m.x", `{"m":[[{"x":1},{"y":2}],[],[[]]]}`, `{"m":[[{"x":1},{}],[],[[]]]}`, "0 denied, 1 unknown m.y"},
		{"a document that is a list", "a", `[{"a":1,"b":2},{"b":3},null,[{"a":4}]]`, `[{"a":1},{},null,[{"a":4}]]`, "0 denied, 2 unknown b"},
		{"a list in which nothing is permitted", "-a", `[{"a":1},{}]`, `[{},{}]`, "1 denied, 0 unknown "},
		{"no document", "a", `null`, `null`, ""},
		{"a plain value in a document that is a list", "a", `[1,{"a":2}]`, `[{"a":2}]`, "0 denied, 1 unknown ."},
		{"an object that loses all", "a.b", `{"a":{"c":1}}`, `{"a":{}}`, "0 denied, 1 unknown a.c"},
		{"an object with refused fields only goes with its key", "-a.b", `{"a":{"b":1,"c":2}}`, `{}`, "1 denied, 1 unknown a.c"},
		{"an empty object with refused fields only", "-a.b", `{"a":{}}`, `{}`, "1 denied, 0 unknown "},
		{"an empty list with refused fields only", "-a.b", `{"a":[[]]}`, `{}`, "1 denied, 0 unknown "},
		{"empty ones above a permitted leaf", "a.b", `{"a":{}}`, `{"a":{}}`, ""},
		{"an empty list above a permitted leaf", "a.b", `{"a":[]}`, `{"a":[]}`, ""},
		{"null above a permitted leaf", "a.b", `{"a":null}`, `{"a":null}`, ""},
		{"null above refused leaves", "-a.b", `{"a":null}`, `{}`, "1 denied, 0 unknown "},
		{"a plain value above a permitted leaf", "a.b", `{"a":7}`, `{}`, "0 denied, 1 unknown a"},
		{"a plain value above a refused leaf", "-a.b", `{"a":"x"}`, `{}`, "0 denied, 1 unknown a"},
		{"plain values in a list above a leaf", "a.b", `{"a":[1,{"b":2},"x",null]}`, `{"a":[{"b":2},null]}`, "0 denied, 2 unknown a"},
		{"a key with a dot is no path", "customer.email", `{"customer.email":1,"customer":{"email":2}}`, `{"customer":{"email":2}}`, `0 denied, 1 unknown "customer.email"`},
		{"a key is spelled with escapes", "a", `{"\u0061":1,"\u0062":2}`, `{"\u0061":1}`, "0 denied, 1 unknown b"},
		{"case counts", "email", `{"Email":1,"EMAIL":2,"email":3}`, `{"email":3}`, "0 denied, 2 unknown EMAIL Email"},
		{"each of equal keys is judged", "a -b", `{"a":1,"b":2,"a":3,"b":4}`, `{"a":1,"a":3}`, "2 denied, 0 unknown "},
		{"a path in both lists is denied", "a -a", `{"a":1}`, `{}`, "1 denied, 0 unknown "},
		{"a path in both lists keeps nothing above it", "a.b -a.b", `{"a":{"b":1}}`, `{}`, "1 denied, 0 unknown "},
		{"a denied path below a permitted one", "a -a.b", `{"a":{"b":1,"c":[2]}}`, `{"a":{"c":[2]}}`, "1 denied, 0 unknown "},
		{"a denied path in a list at a permitted one", "a -a.b", `{"a":[1,{"b":1},[{"b":2,"c":3}]]}`, `{"a":[1,{},[{"c":3}]]}`, "2 denied, 0 unknown "},
		{"a permitted path below a denied one", "a.b -a", `{"a":{"b":1}}`, `{}`, "1 denied, 0 unknown "},
		{"an empty segment permits nothing", "a..b .a a.", `{"a":{"":{"b":1}},"":{"a":2}}`, `{}`, `0 denied, 2 unknown "" a`},
		{"a name that could be misread is quoted", "", "{\"a\\\"b\":1,\"\\n\":2,\"ü\":3}", `{}`, `0 denied, 3 unknown "\n" "a\"b" ü`},
	} {
		got, dropped, err := run(filter(c.paths), c.doc)
		if c.dropped == "" {
			c.dropped = "0 denied, 0 unknown "
		}
		if err != nil || got != c.want || show(dropped) != c.dropped {
			t.Errorf("%s: %s of %s is\n%s, dropping %s, %v; want\n%s, dropping %s", c.says, c.paths, c.doc, got, show(dropped), err, c.want, c.dropped)
		}
	}
}

// nested is a list in lists.
func nested(depth int) string { return strings.Repeat("[", depth) + strings.Repeat("]", depth) }

func TestJSONRefuses(t *testing.T) {
	for _, c := range []struct{ says, doc, want string }{
		{"nothing", ``, "unexpected EOF"},
		{"white space", "  \n", "unexpected EOF"},
		{"half an object", `{"a":1`, "unexpected EOF"},
		{"half a string", `{"a":"x`, "unexpected EOF"},
		{"half a word", `{"a":tru`, "unexpected EOF"},
		{"half a character", "{\"a\":\"\xc3", "unexpected EOF"},
		{"two documents", `{"a":1}{"a":2}`, "after the document"},
		{"something after the document", `{"a":1} x`, "byte 8: not JSON"},
		{"a number", `7`, "neither an object nor a list"},
		{"a string", `"a"`, "neither an object nor a list"},
		{"no comma", `{"a":1 "b":2}`, "byte 7: not JSON"},
		{"no comma in a list", `{"a":[1 2]}`, "byte 8: not JSON"},
		{"a comma too many", `{"a":1,}`, "byte 6: not JSON"},
		{"a comma too many in a list", `{"a":[1,]}`, "byte 7: not JSON"},
		{"a comma first", `{"a":[,1]}`, "byte 6: not JSON"},
		{"no colon", `{"a" 1}`, "byte 5: not JSON"},
		{"a key without quotes", `{a:1}`, "byte 1: not JSON"},
		{"a key that is a number", `{1:1}`, "byte 1: not JSON"},
		{"the wrong bracket", `{"a":[1}`, "byte 7: not JSON"},
		{"NaN", `{"a":NaN}`, "byte 5: not JSON"},
		{"Infinity", `{"b":-Infinity}`, "byte 6: not JSON"},
		{"a leading zero", `{"a":01}`, "byte 6: not JSON"},
		{"a plus", `{"b":+1}`, "byte 5: not JSON"},
		{"half a fraction", `{"a":1.}`, "byte 7: not JSON"},
		{"half an exponent", `{"a":1e}`, "byte 7: not JSON"},
		{"two minuses", `{"a":--1}`, "byte 6: not JSON"},
		{"single quotes", `{"a":'x'}`, "byte 5: not JSON"},
		{"a word that goes on", `{"a":truest}`, "byte 9: not JSON"},
		{"another word", `{"a":nil!}`, "byte 6: not JSON"},
		{"bad UTF-8", "{\"a\":\"\xff\"}", "byte 6: not JSON"},
		{"bad UTF-8 in what is dropped", "{\"b\":\"\xc3(\"}", "byte 6: not JSON"},
		{"bad UTF-8 in a key", "{\"a\xff\":1}", "byte 3: not JSON"},
		{"a surrogate in UTF-8", "{\"a\":\"\xed\xa0\x80\"}", "byte 6: not JSON"},
		{"a byte order mark", "\ufeff{\"a\":1}", "byte 0: not JSON"},
		{"a high surrogate alone", `{"a":"\ud800 and more"}`, "byte 6: not JSON"},
		{"a low surrogate alone", `{"a":"\udc00\udc00"}`, "byte 6: not JSON"},
		{"two high surrogates", `{"a":"\ud800\ud800"}`, "byte 6: not JSON"},
		{"a high surrogate before another character", `{"a":"\ud800\ue000"}`, "byte 6: not JSON"},
		{"a surrogate in a key", `{"\ud800":"      "}`, "byte 2: not JSON"},
		{"an unknown escape", `{"a":"\x"}`, "byte 6: not JSON"},
		{"a short escape", `{"a":"\u12g4"}`, "byte 6: not JSON"},
		{"a line in a string", "{\"a\":\"\n\"}", "byte 6: not JSON"},
		{"nesting in what is kept", `{"a":` + nested(100) + `}`, "deeper than 100"},
		{"nesting in what is dropped", `{"b":` + nested(100) + `}`, "deeper than 100"},
		{"nesting above a leaf", `{"c":` + nested(100) + `}`, "deeper than 100"},
		{"a long key", `{"` + strings.Repeat("k", 64<<10) + `":1}`, "name of more than"},
	} {
		got, _, err := run(filter("a c.d"), c.doc)
		if err == nil || !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), "fields: JSON, byte ") {
			t.Errorf("%s: %q gives %q, %v; want an error with %q", c.says, c.doc, got, err, c.want)
		}
	}
	if _, _, err := run(filter("a"), `{"a":`+nested(99)+`}`); err != nil {
		t.Error("nested 100 deep is allowed: ", err)
	}
}

// An error may be shown to the user who asked, so it quotes no dropped value and no key
// above it, which may be data as well.
func TestErrorsHoldNoValues(t *testing.T) {
	for _, doc := range []string{
		`{"b":qqqq}`, `{"b":"\uqqqq"}`, `{"b":"\q"}`, `{"b":tqqq}`, `{"b":truqqq}`, "{\"b\":\"qqqq\x01\"}", "{\"b\":\"qqqq\xff\"}", `{"b":"\ud800qqqqqq"}`,
		`{"b":"qqqq" q}`, `{"b":"qqqq" "q"}`, `{"b":1q}`, `{"b":-q}`, `{"b":1.q}`, `{"b":["qqqq"}`, `{"b":["qqqq",q]}`, `{"b":["qqqq"`, `{"b":qqqq`,
		`{"qqqq":{"qq":[0,nul]}}`, `{"qqqq":{"qq":[0,`, `{"qqqq" 1}`, `{"qqqq":1,q}`, `{"qqqq":1,2:1}`, `{"b":1}q`, `q`, `{"qqqq":` + nested(101) + `}`,
		`{"` + strings.Repeat("q", 64<<10) + `":1}`, `{"b":"` + strings.Repeat("q", 16<<20) + `"}`,
	} {
		for _, paths := range []string{"a", "b", "b.c", "qqqq"} {
			if _, _, err := run(filter(paths), doc); err == nil || strings.Contains(err.Error(), "q") {
				t.Errorf("%.60q of %s: %v", doc, paths, err)
			}
		}
		if _, err := fields.MergePatch([]byte(doc)); err == nil || strings.Contains(err.Error(), "q") {
			t.Errorf("%.60q: %v", doc, err)
		}
	}
}

func TestJSONPassesFailuresOn(t *testing.T) {
	broken := errors.New("broken")
	src := io.MultiReader(strings.NewReader(`{"a":1,"b":`), iotest.ErrReader(broken))
	if _, err := filter("a").JSON(io.Discard, src); !errors.Is(err, broken) {
		t.Error("reading:", err)
	}
	src = io.MultiReader(strings.NewReader(`{"a":1}`), iotest.ErrReader(io.ErrUnexpectedEOF))
	if _, err := filter("a").JSON(io.Discard, src); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Error("a body that breaks off after the document:", err)
	}
	if _, err := filter("a").JSON(io.Discard, &failsOnce{`{"a":1}`, broken}); !errors.Is(err, broken) {
		t.Error("reading fails beside the last bytes, and is at the end then:", err)
	}
	long := `{"a":"` + strings.Repeat("x", 1<<20) + `"}`
	for _, doc := range []string{`{"a":1}`, long} {
		if _, err := filter("a").JSON(failingWriter{broken}, strings.NewReader(doc)); !errors.Is(err, broken) {
			t.Error("writing:", err)
		}
	}
}

type failsOnce struct {
	text string
	err  error
}

func (r *failsOnce) Read(p []byte) (int, error) {
	n, err := copy(p, r.text), r.err
	if r.text = r.text[n:]; r.text == "" {
		r.err = io.EOF
		return n, err
	}
	return n, nil
}

type failingWriter struct{ err error }

func (w failingWriter) Write([]byte) (int, error) { return 0, w.err }

// A buffer can end anywhere: in a key, an escape, a character.
func TestJSONInPieces(t *testing.T) {
	doc := `{"aé😀":"x\u00e9\ud83d\ude00y","b":[true,null,-1.5e3,{"é":"é😀"}],"c":"x"}`
	want, wantDropped, err := run(filter("aé😀 b"), doc)
	if err != nil {
		t.Fatal(err)
	}
	for name, src := range map[string]io.Reader{
		"bytes": iotest.OneByteReader(strings.NewReader(doc)),
		"half":  iotest.HalfReader(strings.NewReader(doc)),
		"eof":   iotest.DataErrReader(strings.NewReader(doc)),
	} {
		var out bytes.Buffer
		if dropped, err := filter("aé😀 b").JSON(&out, src); err != nil || out.String() != want || show(dropped) != show(wantDropped) {
			t.Errorf("%s: %s, %v", name, out.String(), err)
		}
	}
	for i := range doc {
		var out bytes.Buffer
		src := io.MultiReader(strings.NewReader(doc[:i]), strings.NewReader(doc[i:]))
		if _, err := filter("aé😀 b").JSON(&out, src); err != nil || out.String() != want {
			t.Errorf("in two at %d: %s, %v", i, out.String(), err)
		}
	}
}

func TestUnknownPathsAreBounded(t *testing.T) {
	long := "A" + strings.Repeat("ü", 120) // sorted to the front
	doc := map[string]any{"A" + strings.Repeat("ü", 5000): 1, long: map[string]any{long: 2, long + long: 3}, "twice": []any{map[string]any{"x": 1}, map[string]any{"x": 2}}}
	for i := range 100 {
		doc[fmt.Sprintf("~%d", i)] = i
	}
	_, dropped, err := filter("twice.y " + long + ".x").Marshal(doc)
	if err != nil || dropped.Unknown != 105 || len(dropped.UnknownPaths) != 20 {
		t.Errorf("%v, %v", dropped, err)
	}
	for _, p := range dropped.UnknownPaths {
		if len(p) > 256 {
			t.Errorf("%d bytes in %q", len(p), p)
		}
	}
	_, dropped, _ = filter("twice.y").Marshal(map[string]any{"twice": doc["twice"]})
	if show(dropped) != "0 denied, 2 unknown twice.x" {
		t.Error(show(dropped))
	}
}

func TestMarshalSeesWhatJSONSees(t *testing.T) {
	type Base struct {
		ID     int    `json:"id"`
		Secret string `json:"secret,omitempty"`
	}
	v := struct {
		*Base
		Raw  json.RawMessage `json:"raw"`
		Skip string          `json:"-"`
		Note string          `json:",omitempty"`
	}{&Base{1, "s"}, json.RawMessage(`{"x": 1.50, "y": 2}`), "skip", "n"}
	got, dropped, err := filter("id raw.x").Marshal(v)
	if string(got) != `{"id":1,"raw":{"x":1.50}}` || err != nil || show(dropped) != "0 denied, 3 unknown Note raw.y secret" {
		t.Errorf("%s %s %v", got, show(dropped), err)
	}
	for _, bad := range []any{7, "x", make(chan int), func() {}} {
		if got, _, err := filter("id").Marshal(bad); err == nil || got != nil {
			t.Errorf("%T: %s, %v", bad, got, err)
		}
	}
}

func TestFilterZeroValueAndConcurrency(t *testing.T) {
	var zero fields.Filter
	if got, dropped, err := run(&zero, `{"a":{"b":1}}`); got != `{}` || err != nil || dropped.Unknown != 1 {
		t.Error(got, dropped, err)
	}
	permitted := []string{"a.b"}
	f := fields.New(permitted, nil)
	permitted[0] = "c"
	done := make(chan string)
	for range 8 {
		go func() {
			m := map[string]any{"a": map[string]any{"b": 1, "x": 2}, "c": 3}
			f.Map(m)
			got, _, _ := run(f, `{"a":{"b":1,"x":2},"c":3}`)
			done <- fmt.Sprint(m, got)
		}()
	}
	for range 8 {
		if got := <-done; got != `map[a:map[b:1]]{"a":{"b":1}}` {
			t.Error(got)
		}
	}
}

func decode(t interface{ Fatalf(string, ...any) }, text string) any {
	d := json.NewDecoder(strings.NewReader(text))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		t.Fatalf("%q: %v", text, err)
	}
	return v
}

func sameJSON(t interface{ Fatalf(string, ...any) }, a, b string) bool {
	return reflect.DeepEqual(decode(t, a), decode(t, b))
}
