package entityfile

import (
	"bytes"
	"encoding/csv"
	"encoding/json"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/go-json-experiment/json/jsontext"
	"google.golang.org/protobuf/proto"
)

// FuzzParse fuzzes the reader of Cedar's entity JSON.
func FuzzParse(f *testing.F) {
	for _, seed := range []string{
		`[]`, `[{"uid":{"type":"A","id":"b"}}]`, `[{"uid":{"__entity":{"type":"A","id":"b"}},"attrs":{"n":9007199254740993,"l":[1,{"x":null}]},"parents":[{"type":"A","id":"c"}],"tags":{}}]`,
		`[{"uid":1}]`, `[{}]`, `{}`, `[{"uid":{"type":"A","id":"b"},"attrs":[]}]`, `[{"uid":{"type":"A","id":"\ud800"}}]`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		list, err := Parse(data)
		if err != nil {
			return
		}
		for _, e := range list {
			if e.Uid == nil {
				t.Error("an entity without a name was accepted")
			}
			if _, err := proto.Marshal(e); err != nil {
				t.Errorf("accepted, and cannot be sent: %v", err)
			}
		}
	})
}

// FuzzReader fuzzes the readers: entities that they accept have a name and can be sent,
// and after an error the error stays the same.
func FuzzReader(f *testing.F) {
	m, err := ParseMapping([]byte("type: A\nid: id\nparents: [{type: B, column: p, split: ;}]\nattrs: {t: t, n: {column: n, as: long}, s: {column: s, as: bool, split: ' '}}"))
	if err != nil {
		f.Fatal(err)
	}
	formats := []func(io.Reader) *Reader{ReadJSON, ReadNDJSON, func(r io.Reader) *Reader { return ReadCSV(r, m) }}
	for i, seed := range []string{
		"[{\"uid\":{\"type\":\"A\",\"id\":\"b\"}},\n{\"uid\":1}]", "[] []", "\ufeff[{}",
		"{\"uid\":{\"type\":\"A\",\"id\":\"b\"},\"attrs\":{\"n\":9007199254740993}}\n\n{}", "{}{}\r\n", "\x00",
		"id,p,t,n,s\na,x; y;,\"t\n\",-7,true FALSE\n", "\ufeffid,p,t,n,s,u\r\n,,,,,\n", "id,id\n\"",
	} {
		f.Add(byte(i/3), []byte(seed))
	}
	f.Fuzz(func(t *testing.T, format byte, data []byte) {
		r := formats[int(format)%len(formats)](bytes.NewReader(data))
		seen := map[[2]string]bool{}
		for range len(data) + 1 {
			e, err := r.Next()
			if err != nil {
				if _, again := r.Next(); !errors.Is(again, err) {
					t.Errorf("%v, and then %v", err, again)
				}
				return
			}
			if e.GetUid() == nil {
				t.Error("an entity without a name was accepted")
			}
			name := [2]string{e.GetUid().GetType(), e.GetUid().GetId()}
			if seen[name] {
				t.Errorf("%q was accepted twice", name)
			}
			seen[name] = true
			if _, err := proto.Marshal(e); err != nil {
				t.Errorf("accepted, and cannot be sent: %v", err)
			}
		}
		t.Error("more entities than bytes")
	})
}

// FuzzDecodeJSON fuzzes the reader of JSON: a second reader, which also refuses members
// that stand twice, accepts what it accepts and reads the same value.
func FuzzDecodeJSON(f *testing.F) {
	for _, seed := range []string{
		`{"a":1,"b":[{"a":1},{"a":2.50}]}`, `{"a":1,"a":2}`, `[{"a":{"b":0,"\u0062":0}}]`, `"\ud800"`, `"\ud83d\ude00"`, `{} {}`, `1e400`, ` null `, ``, "\"\xff\"", `{"":{"":""}}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		got, err := DecodeJSON(text)
		second := jsontext.Value(text)
		if (err == nil) != second.IsValid() {
			t.Fatalf("%q: %v, and to the second reader valid: %v", text, err, second.IsValid())
		}
		if err != nil {
			return
		}
		again, err := json.Marshal(got)
		if err != nil {
			t.Fatal(err)
		}
		rewritten := jsontext.Value(again)
		same := []jsontext.Options{jsontext.ReorderRawObjects(true), jsontext.CanonicalizeRawInts(false), jsontext.CanonicalizeRawFloats(false), jsontext.PreserveRawStrings(false)}
		if err := errors.Join(second.Format(same...), rewritten.Format(same...)); err != nil || string(second) != string(rewritten) {
			t.Errorf("%q is read as %q: %v", second, rewritten, err)
		}
	})
}

// FuzzMapping fuzzes the reader of mappings: a mapping that it accepts reads a file with
// its columns.
func FuzzMapping(f *testing.F) {
	for _, seed := range []string{
		"type: T\nid: i", "type: T\nid: i\nparents:\n- {type: R, column: r, split: ;}", "type: T\nid: i\nattrs:\n  a: b\n  c: {column: d, as: long}\n  e: {column: f, entity: U, split: ' '}",
		"type: T\nid: &i x\nattrs: {a: *i, <<: {}}", "- 1\n---\n", "type: !!str 1\nid: \"\\0\"", "",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		m, err := ParseMapping(text)
		if err != nil {
			return
		}
		var file bytes.Buffer
		w := csv.NewWriter(&file)
		if err := errors.Join(w.Write(m.columns), w.Write(slices.Repeat([]string{"1"}, len(m.columns)))); err != nil {
			t.Fatal(err)
		}
		w.Flush()
		switch e, err := ReadCSV(&file, m).Next(); {
		case err == nil && (e.GetUid().GetType() == "" || e.GetUid().GetId() != "1"):
			t.Errorf("%q reads %v", text, e)
		case err != nil && !strings.Contains(err.Error(), "neither true nor false"):
			t.Errorf("%q: %v", text, err)
		}
	})
}
