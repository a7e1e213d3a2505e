package cedarpost

import (
	"encoding/json"
	"math"
	"net/netip"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/server/wire"
)

func drawUID(t *rapid.T, label string) EntityUID {
	return EntityUID{rapid.SampledFrom([]string{"", "A", "A::B", "s", "AB"}).Draw(t, label+" type"), drawText(t, label+" id")}
}

// drawText draws from few texts, so that two questions are often almost the same.
func drawText(t *rapid.T, label string) string {
	return rapid.OneOf(rapid.SampledFrom([]string{"", "a", "b", "ab", "\x01", "\x01a", "s", "1", "__entity"}), rapid.String()).Draw(t, label)
}

func drawValue(t *rapid.T, depth int) any {
	most := 14
	if depth > 2 {
		most = 10
	}
	switch rapid.IntRange(0, most).Draw(t, "kind") {
	case 0:
		return rapid.Bool().Draw(t, "bool")
	case 1:
		return drawText(t, "text")
	case 2:
		return rapid.OneOf(rapid.Int64Range(-2, 2), rapid.Int64()).Draw(t, "long")
	case 3:
		return rapid.IntRange(-2, 2).Draw(t, "int")
	case 4:
		return rapid.Float64().Draw(t, "float")
	case 5:
		return json.Number(rapid.SampledFrom([]string{"0", "1", "-1", "1.0", "1e0", "9007199254740993", "0.5"}).Draw(t, "number"))
	case 6:
		return drawUID(t, "value")
	case 7:
		return time.UnixMilli(rapid.Int64Range(-2, 1<<40).Draw(t, "time"))
	case 8:
		return time.Duration(rapid.Int64Range(-2e6, 2e6).Draw(t, "duration"))
	case 9:
		return netip.AddrFrom4([4]byte{10, 0, 0, rapid.Byte().Draw(t, "addr")})
	case 10:
		return []string{drawText(t, "one"), drawText(t, "two")}[:rapid.IntRange(0, 2).Draw(t, "texts")]
	case 11:
		return []EntityUID{drawUID(t, "one")}
	case 12:
		if rapid.Bool().Draw(t, "named") {
			return []any{status(drawText(t, "status")), level(rapid.Byte().Draw(t, "level")), labels{status(drawText(t, "label")): 1}, [1]status{"x"}}
		}
		return map[string]string{drawText(t, "name"): drawText(t, "value")}
	case 13:
		list := make([]any, rapid.IntRange(0, 3).Draw(t, "length"))
		for i := range list {
			list[i] = drawValue(t, depth+1)
		}
		return list
	}
	return drawMap(t, depth+1)
}

type (
	status string
	level  uint8
	labels map[status]level
)

func drawMap(t *rapid.T, depth int) map[string]any {
	m := map[string]any{}
	for range rapid.IntRange(0, 3).Draw(t, "members") {
		m[drawText(t, "name")] = drawValue(t, depth)
	}
	return m
}

func drawCheck(t *rapid.T) Check {
	c := Check{
		Principal: drawUID(t, "principal"), Action: drawUID(t, "action"), Resource: drawUID(t, "resource"),
		AllFields: rapid.Bool().Draw(t, "all"), RequireAllFields: rapid.Bool().Draw(t, "require"),
		RequestID: drawText(t, "request id"),
	}
	if text := rapid.SampledFrom([]string{"", "", "", "a.b.c", "a.b.d"}).Draw(t, "token"); text != "" {
		c.PrincipalToken = NewPrincipalToken(text)
		if rapid.Bool().Draw(t, "token alone") {
			c.Principal = EntityUID{}
		}
	}
	for range rapid.IntRange(0, 2).Draw(t, "fields") {
		c.Fields = append(c.Fields, drawText(t, "field"))
	}
	if rapid.Bool().Draw(t, "context") {
		c.Context = drawMap(t, 0)
	}
	for range rapid.IntRange(0, 2).Draw(t, "entities") {
		e := Entity{UID: drawUID(t, "entity"), Attrs: drawMap(t, 0)}
		if rapid.Bool().Draw(t, "tags") {
			e.Tags = drawMap(t, 0)
		}
		for range rapid.IntRange(0, 2).Draw(t, "parents") {
			e.Parents = append(e.Parents, drawUID(t, "parent"))
		}
		c.Entities = append(c.Entities, e)
	}
	return c
}

// sent has all parts of a question that affect its decision, as bytes.
func sent(c Check) ([]byte, error) {
	c.RequestID = ""
	req, err := request(&c)
	if err != nil {
		return nil, err
	}
	return proto.MarshalOptions{Deterministic: true}.Marshal(req)
}

// judge fails unless two questions share a key exactly if they are sent as the same.
func judge(t interface {
	Fatalf(string, ...any)
	Helper()
}, a, b Check) {
	t.Helper()
	keyA, errA := appendKey(nil, &a)
	keyB, errB := appendKey(nil, &b)
	sentA, sendErrA := sent(a)
	sentB, sendErrB := sent(b)
	if errA != nil || errB != nil {
		if (errA != nil) != (sendErrA != nil) && !invalidText(sendErrA) || (errB != nil) != (sendErrB != nil) && !invalidText(sendErrB) {
			t.Fatalf("key and request disagree on what is a question:\n%v, %v\n%v, %v", errA, sendErrA, errB, sendErrB)
		}
		return
	}
	if sendErrA != nil || sendErrB != nil {
		return
	}
	if string(keyA) == string(keyB) && string(sentA) != string(sentB) {
		t.Fatalf("two questions share a key:\n%+v\n%+v", a, b)
	}
}

func invalidText(err error) bool { return err != nil && strings.Contains(err.Error(), "UTF-8") }

func TestKeys(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		a := drawCheck(t)
		b := a
		// Another question, or the same one with one part changed.
		switch other := drawCheck(t); rapid.IntRange(0, 10).Draw(t, "changed") {
		case 0:
			b = other
		case 1:
			b.Principal = other.Principal
		case 2:
			b.Action = other.Action
		case 3:
			b.Resource = other.Resource
		case 4:
			b.Context = other.Context
		case 5:
			b.Fields = other.Fields
		case 6:
			b.AllFields, b.RequireAllFields = other.AllFields, other.RequireAllFields
		case 7:
			b.Entities = other.Entities
		case 8:
			b.Principal, b.Resource = a.Resource, a.Principal
		case 9:
			b.Fields, b.RequestID = append([]string{a.Principal.ID}, a.Fields...), other.RequestID
		case 10:
			b.PrincipalToken = other.PrincipalToken
		}
		judge(t, a, b)
	})
}

// The same question has one key, whatever else the caller asks for.
func TestKeyIsOfTheQuestion(t *testing.T) {
	a := Check{Principal: UID("U", "a"), Action: UID("A", "b"), Resource: UID("R", "c"), Context: map[string]any{"x": 1, "y": []any{true}}}
	b := a
	b.RequestID, b.FailOpen, b.AtLeastAsFresh = "r", "because", "token"
	b.Context = map[string]any{"y": []any{true}, "x": int64(1)}
	keyA, errA := appendKey(nil, &a)
	keyB, errB := appendKey(nil, &b)
	if errA != nil || errB != nil || string(keyA) != string(keyB) {
		t.Errorf("%q, %v\n%q, %v", keyA, errA, keyB, errB)
	}
	// A token is in the key by its hash only.
	a.Principal, a.PrincipalToken = EntityUID{}, NewPrincipalToken("header.payload.signature")
	if key, err := appendKey(nil, &a); err != nil || strings.Contains(string(key), "payload") || string(key) == string(keyA) {
		t.Errorf("%q, %v", key, err)
	}
}

func TestValuesThatCannotBeSent(t *testing.T) {
	deep := any("x")
	for range 200 {
		deep = []any{deep}
	}
	for name, v := range map[string]any{
		"nil": nil, "a NaN": math.NaN(), "an infinity": math.Inf(1), "a struct": struct{}{}, "a channel": make(chan int), "bytes": []byte("x"), "a map by number": map[int]string{1: "x"}, "a pointer": new(int),
		"no number": json.Number("x"), "a number beyond Long": uint64(math.MaxUint64), "deep nesting": deep, "a nil inside": []any{map[string]any{"a": nil}},
	} {
		c := Check{Context: map[string]any{"v": v}}
		_, err := appendKey(nil, &c)
		_, sendErr := request(&c)
		if err == nil || sendErr == nil || !strings.HasPrefix(err.Error(), "context.v") {
			t.Errorf("%s: %v, %v", name, err, sendErr)
		}
	}
}

// FuzzKeys reads two questions from JSON, and judges them.
func FuzzKeys(f *testing.F) {
	f.Add("U", "a", `{"x":1}`, "x", "U", "a", `{"x":"1"}`, "x")
	f.Add("U", "", `{"a":["b","c"]}`, "", "U", "", `{"a":["b"],"c":[]}`, "")
	f.Add("U\x01", "a", `{"__entity":{"type":"T","id":"i"}}`, "f", "U", "\x01a", `{}`, "g")
	f.Add("U", "a", `{"x":9007199254740993}`, "x", "U", "a", `{"x":"9007199254740993"}`, "x")
	f.Fuzz(func(t *testing.T, type1, id1, context1, field1, type2, id2, context2, field2 string) {
		read := func(typ, id, context, field string) (c Check, ok bool) {
			d := json.NewDecoder(strings.NewReader(context))
			d.UseNumber()
			c = Check{Principal: UID(typ, id), Action: UID(id, typ), Resource: UID(typ, typ)}
			if field != "" {
				c.Fields = strings.Split(field, ",")
			}
			return c, d.Decode(&c.Context) == nil
		}
		a, okA := read(type1, id1, context1, field1)
		b, okB := read(type2, id2, context2, field2)
		if okA && okB {
			judge(t, a, b)
		}
	})
}

func TestUIDText(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		u := EntityUID{"Shop::User", rapid.String().Draw(t, "id")}
		got, err := ParseUID(u.String())
		if err != nil || got != u {
			t.Fatalf("%q reads as %v, %v", u.String(), got, err)
		}
	})
	for _, bad := range []string{"", "User", `User::"`, `::"a"`, `User::"a`, `User::"a"b"`, `User::"\q"`, `User::"\u{110000}"`, `User::"\u{d800}"`, `User::"a\"`, `User::'a'`} {
		if u, err := ParseUID(bad); err == nil {
			t.Errorf("%s reads as %v", bad, u)
		}
	}
}

// FuzzToken: the client and the service read the same from a token. Two tokens have one
// history exactly if both name the same database and timeline.
func FuzzToken(f *testing.F) {
	f.Add(modelToken(1, 7), modelToken(2, 7))
	f.Add(modelToken(1, -1), modelToken(1, 1)+"=")
	f.Add("", "AgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAEAAAAAAAAAAQAAAAAAAAAAAAAAAAAAAAE")
	f.Fuzz(func(t *testing.T, a, b string) {
		readA, okA := readToken(a)
		readB, okB := readToken(b)
		tokenA, errA := wire.ParseToken(a)
		tokenB, errB := wire.ParseToken(b)
		if okA != (errA == nil) || okB != (errB == nil) {
			t.Fatalf("%q: %v, %v; %q: %v, %v", a, okA, errA, b, okB, errB)
		}
		if okA && (readA.number != tokenA.Number || readA.anchor != tokenA.Anchor || readA.mark != tokenA.Mark) {
			t.Fatalf("%q: %v, %v", a, readA, tokenA)
		}
		if okA && okB && readA.contradicts(readB) != (tokenA.Anchor == tokenB.Anchor && tokenA.Mark != tokenB.Mark) {
			t.Fatalf("%q and %q: %v, %v", a, b, tokenA, tokenB)
		}
		if okA && okB && (readA.history == readB.history) != (tokenA.Database == tokenB.Database && tokenA.Timeline == tokenB.Timeline) {
			t.Fatalf("%q and %q: %v, %v", a, b, tokenA, tokenB)
		}
	})
}

// A mapped address makes the same question as the IPv4 address. All other addresses
// differ.
func TestKeysOfAddresses(t *testing.T) {
	key := func(ip any) string {
		b, err := appendKey(nil, &Check{Context: map[string]any{"ip": ip}})
		if err != nil {
			t.Fatalf("%v: %v", ip, err)
		}
		return string(b)
	}
	four, mapped := netip.MustParseAddr("10.1.2.3"), netip.MustParseAddr("::ffff:10.1.2.3")
	if key(four) != key(mapped) || key(netip.PrefixFrom(four, 8)) != key(netip.PrefixFrom(mapped, 104)) {
		t.Error("a mapped address is another question")
	}
	if key(four) == key(netip.MustParseAddr("::10.1.2.3")) || key(four) == key("10.1.2.3") || key(netip.PrefixFrom(four, 8)) == key(netip.PrefixFrom(four, 9)) {
		t.Error("two questions have one key")
	}
}
