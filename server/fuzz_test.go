package server

import (
	"bytes"
	"encoding/csv"
	"errors"
	"io"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/policies"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/engine"
)

// FuzzRevisionToken: a token either is refused or is exactly one this service
// writes, so two different tokens never name the same revision.
func FuzzRevisionToken(f *testing.F) {
	f.Add("")
	f.Add("AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAE")
	f.Add("AQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAF")
	f.Fuzz(func(t *testing.T, token string) {
		p, err := parseToken(token)
		if err != nil {
			return
		}
		if again := encodeRevision(p, p.Number).Token; again != token {
			t.Errorf("%q reads as %v, which is written %q", token, p, again)
		}
	})
}

// FuzzEntities feeds files to the reader of Cedar's entity JSON.
func FuzzEntities(f *testing.F) {
	for _, seed := range []string{
		`[]`, `[{"uid":{"type":"A","id":"b"}}]`, `[{"uid":{"__entity":{"type":"A","id":"b"}},"attrs":{"n":9007199254740993,"l":[1,{"x":null}]},"parents":[{"type":"A","id":"c"}],"tags":{}}]`,
		`[{"uid":1}]`, `[{}]`, `{}`, `[{"uid":{"type":"A","id":"b"},"attrs":[]}]`, `[{"uid":{"type":"A","id":"\ud800"}}]`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		list, err := ParseEntities(data)
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

// FuzzEntityReader feeds files to the readers: what they accept has a name and can
// be sent, and an error stays.
func FuzzEntityReader(f *testing.F) {
	m, err := ParseImportMapping([]byte("type: A\nid: id\nparents: [{type: B, column: p, split: ;}]\nattrs: {t: t, n: {column: n, as: long}, s: {column: s, as: bool, split: ' '}}"))
	if err != nil {
		f.Fatal(err)
	}
	formats := []func(io.Reader) *EntityReader{ReadJSON, ReadNDJSON, func(r io.Reader) *EntityReader { return ReadCSV(r, m) }}
	for i, seed := range []string{
		"[{\"uid\":{\"type\":\"A\",\"id\":\"b\"}},\n{\"uid\":1}]", "[] []", "\ufeff[{}",
		"{\"uid\":{\"type\":\"A\",\"id\":\"b\"},\"attrs\":{\"n\":9007199254740993}}\n\n{}", "{}{}\r\n", "\x00",
		"id,p,t,n,s\na,x; y;,\"t\n\",-7,true FALSE\n", "\ufeffid,p,t,n,s,u\r\n,,,,,\n", "id,id\n\"",
	} {
		f.Add(byte(i/3), []byte(seed))
	}
	f.Fuzz(func(t *testing.T, format byte, data []byte) {
		r := formats[int(format)%len(formats)](bytes.NewReader(data))
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
			if _, err := proto.Marshal(e); err != nil {
				t.Errorf("accepted, and cannot be sent: %v", err)
			}
		}
		t.Error("more entities than bytes")
	})
}

// FuzzImportMapping feeds mappings to their reader: what it accepts reads a file
// that has its columns.
func FuzzImportMapping(f *testing.F) {
	for _, seed := range []string{
		"type: T\nid: i", "type: T\nid: i\nparents:\n- {type: R, column: r, split: ;}", "type: T\nid: i\nattrs:\n  a: b\n  c: {column: d, as: long}\n  e: {column: f, entity: U, split: ' '}",
		"type: T\nid: &i x\nattrs: {a: *i, <<: {}}", "- 1\n---\n", "type: !!str 1\nid: \"\\0\"", "",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		m, err := ParseImportMapping(text)
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

// FuzzAuthorizeJSON feeds bodies to the codec and the question reader: no panic,
// and whatever is read is a question of a known action.
func FuzzAuthorizeJSON(f *testing.F) {
	b, err := bundle.Read(policies.Shop(), "shop")
	if err != nil {
		f.Fatal(err)
	}
	set, findings := engine.Compile([]engine.Source{SourceOf(b)}, nil)
	if set == nil {
		f.Fatal(findings)
	}
	const good = `{"principal":{"type":"Shop::User","id":"bob"},"action":{"type":"Shop::Action","id":"ViewOrder"},"resource":{"type":"Shop::Order","id":"42"},"context":{"mfa":true}`
	for _, seed := range []string{good + `}`, good + `,"fields":{"all":true}}`, good + `,"fields":{"paths":["customer","nope"],"requireAll":true}}`,
		good + `,"entities":[{"uid":{"type":"Shop::Order","id":"1"}}]}`, good + `,"consistency":{"fullyConsistent":true},"explain":true}`, `{`, `null`, `{"context":{"mfa":{"a":[[[]]]}}}`} {
		f.Add([]byte(seed))
	}
	codec := newStrictJSON()
	f.Fuzz(func(t *testing.T, body []byte) {
		req := &cedarpostv1.AuthorizeRequest{}
		if codec.UnmarshalRead(t.Context(), bytes.NewReader(body), req) != nil {
			return
		}
		q, err := set.Read(askFrom(req, 0))
		if err != nil {
			return
		}
		pool := engine.NewPool()
		sl := set.NewSlice(q, pool)
		for m := sl.Missing(); len(m) > 0; m = sl.Missing() {
			pool.Add(m, nil)
		}
		if _, err := set.Decide(q, sl); err != nil {
			var bad *engine.RequestError
			if !errors.As(err, &bad) {
				t.Fatal(err)
			}
		}
	})
}
