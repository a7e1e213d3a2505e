package fields_test

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"
	"time"
	"unsafe"

	"github.com/cedarpost/cedarpost/sdk/go/fields"
)

type customer struct {
	Name  string `json:"name"`
	Email string `json:"email"`
}

type base struct {
	ID     string `json:"id"`
	Hidden string `json:"-"`
}

type order struct {
	base
	*Extra
	Total    float64              `json:"total"`
	Customer *customer            `json:"customer"`
	Items    []item               `json:"items"`
	Pair     [2]item              `json:"pair"`
	ByName   map[string]*customer `json:"byName"`
	ByNumber map[int]customer     `json:"byNumber"`
	Any      any                  `json:"any"`
	At       time.Time            `json:"at"`
	Raw      json.RawMessage      `json:"raw"`
	Blob     []byte               `json:"blob"`
	Plain    string
	private  string
}

type Extra struct {
	Note string `json:"note"`
}

type item struct {
	Price int `json:"price"`
	Cost  int `json:"cost"`
}

func sample() *order {
	return &order{
		base: base{"42", "hidden"}, Extra: &Extra{"note"}, Total: 7, Customer: &customer{"n", "e"},
		Items: []item{{1, 2}, {3, 4}}, Pair: [2]item{{5, 6}, {7, 8}},
		ByName: map[string]*customer{"bob": {"b", "e"}}, ByNumber: map[int]customer{7: {"s", "e"}},
		Any: map[string]any{"x": []any{item{9, 10}}}, At: time.Unix(1, 0).UTC(), Raw: json.RawMessage(`{"x":1}`),
		Blob: []byte("blob"), Plain: "p", private: "private",
	}
}

func TestStruct(t *testing.T) {
	for _, c := range []struct {
		says, paths string
		want        func(o *order) // sets the expected rest in an empty order
	}{
		{"nothing", "", func(*order) {}},
		{"a promoted field", "id", func(o *order) { o.ID = "42" }},
		{"a field promoted by a pointer", "note", func(o *order) { o.Extra = &Extra{"note"} }},
		{"a field without a tag", "Plain", func(o *order) { o.Plain = "p" }},
		{"a name that is the field's, not the tag's", "Total", func(*order) {}},
		{"below a pointer", "customer.email", func(o *order) { o.Customer = &customer{Email: "e"} }},
		{"a leaf that is a pointer", "customer", func(o *order) { o.Customer = &customer{"n", "e"} }},
		{"in a slice", "items.price", func(o *order) { o.Items = []item{{Price: 1}, {Price: 3}} }},
		{"in an array", "pair.cost", func(o *order) { o.Pair = [2]item{{Cost: 6}, {Cost: 8}} }},
		{"in a map", "byName.bob.name", func(o *order) { o.ByName = map[string]*customer{"bob": {Name: "b"}} }},
		{"in a map by numbers", "byNumber.7.name", func(o *order) { o.ByNumber = map[int]customer{7: {Name: "s"}} }},
		{"in an interface", "any.x.price", func(o *order) { o.Any = map[string]any{"x": []any{item{Price: 9}}} }},
		{"a leaf that marshals itself", "at raw blob", func(o *order) {
			o.At, o.Raw, o.Blob = time.Unix(1, 0).UTC(), json.RawMessage(`{"x":1}`), []byte("blob")
		}},
		{"inside what marshals itself", "at.wall raw.x", func(*order) {}},
		{"a denied path inside what marshals itself", "raw -raw.x", func(*order) {}},
		{"a denied path below a permitted one", "customer -customer.name", func(o *order) { o.Customer = &customer{Email: "e"} }},
	} {
		got, want := sample(), &order{private: "private"}
		want.Extra = &Extra{}
		c.want(want)
		if _, err := filter(c.paths).Struct(got); err != nil {
			t.Errorf("%s: %v", c.says, err)
		}
		if c.paths == "" || !strings.Contains(c.paths, ".") {
			got.emptied()
			want.emptied()
		}
		if gotJSON, wantJSON := toJSON(t, got), toJSON(t, want); gotJSON != wantJSON || got.Hidden != "" || got.private != "private" {
			t.Errorf("%s: permitting %s leaves\n%s, want\n%s", c.says, c.paths, gotJSON, wantJSON)
		}
	}
}

// emptied removes empty objects and lists, which differ by path and have no values.
func (o *order) emptied() {
	if o.Customer != nil && *o.Customer == (customer{}) {
		o.Customer = nil
	}
}

func toJSON(t *testing.T, v any) string {
	text, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func TestStructCounts(t *testing.T) {
	dropped, err := filter("total -customer.name").Struct(sample())
	if err != nil || show(dropped) != "2 denied, 12 unknown Plain any at blob byName byNumber customer.email id items note pair raw" {
		t.Errorf("%v %s", err, show(dropped))
	}
	if dropped, _ := filter("").Struct(&order{private: "x"}); show(dropped) != "0 denied, 0 unknown " {
		t.Error("zero values were counted: ", show(dropped))
	}
}

func TestStructRefuses(t *testing.T) {
	number := 7
	for _, bad := range []any{nil, order{}, (*order)(nil), &number, new(string), &time.Time{}, map[string]any{}, new(any), new(json.RawMessage)} {
		if _, err := filter("id").Struct(bad); err == nil {
			t.Errorf("%T was taken", bad)
		}
	}
	list := []*customer{{"a", "b"}, nil}
	if _, err := filter("name").Struct(&list); err != nil || toJSON(t, list) != `[{"name":"a","email":""},null]` {
		t.Error(toJSON(t, list), err)
	}
}

type ring struct {
	Name, Secret string
	Next         *ring
	All          []any
	Self         any
}

// A value that contains itself has many paths, and keeps only what all of them permit.
func TestCyclesEnd(t *testing.T) {
	r := &ring{Name: "n", Secret: "s"}
	r.Next, r.Self = r, &r.Self
	r.All = []any{nil, r}
	r.All[0] = r.All
	if _, err := filter("Name Next -Next.Secret All -All.Secret Self -Self.x").Struct(r); err != nil {
		t.Fatal(err)
	}
	if r.Secret != "" || r.Name != "n" || r.Next != r || len(r.All) != 1 || r.All[0] != r || r.Self != any(&r.Self) {
		t.Errorf("%q, %q, %v", r.Secret, r.Name, r.All)
	}
	m := map[string]any{"a": 1, "secret": 2}
	m["me"] = m
	filter("a me -me.secret").Map(m)
	if _, still := m["secret"]; still || m["a"] != 1 || len(m) != 2 {
		t.Error("the map that holds itself")
	}
	filter("-me.me.me.me").Map(m)
	if len(m) != 0 {
		t.Error("nothing was permitted")
	}
}

// A value with two paths keeps only what both of them permit.
func TestSharedPointers(t *testing.T) {
	one := &customer{"n", "e"}
	v := struct{ Owner, Payer *customer }{one, one}
	if _, err := filter("Owner.name Payer.email").Struct(&v); err != nil || *one != (customer{}) {
		t.Error(*one, err)
	}
	shared := []any{1, map[string]any{"x": 1, "y": 2}}
	m := map[string]any{"a": shared, "b": shared, "list": []any{shared, shared}}
	filter("a b.x list.x").Map(m)
	if got := toJSON(t, m); got != `{"a":[1,{"x":1}],"b":[{"x":1}],"list":[[{"x":1}],[{"x":1}]]}` {
		t.Error(got)
	}
}

type unexported struct{ A, B string }
type named string
type mixed struct {
	unexported `json:"in"`
	named
	Loud named
}

type left struct{ Same, L string }
type right struct{ Same, R string }
type clash struct {
	left
	*right
	Deep
}
type Deep struct{ Under }
type Under struct {
	Same string
	L    string `json:"Up"`
	Deep *Deep
}
type tagged struct {
	Plain  string `json:"Name"`
	Name   string
	Dash   string `json:"-,"`   //nolint:staticcheck // odd on purpose
	Quote  string `json:"a\"b"` //nolint:staticcheck // odd on purpose
	Dotted string `json:"a.b"`
	Omit   string `json:",omitempty"`
}
type One struct {
	X string `json:"twice"`
}
type Two struct {
	Y string `json:"twice"`
}

// both embeds two structs with one tag. vet would report that in a type that is written
// down.
func both() any {
	one, two := reflect.TypeFor[One](), reflect.TypeFor[Two]()
	v := reflect.New(reflect.StructOf([]reflect.StructField{
		{Name: "One", Type: one, Anonymous: true}, {Name: "Two", Type: two, Anonymous: true}, {Name: "Z", Type: reflect.TypeFor[string]()},
	}))
	v.Elem().Field(0).Set(reflect.ValueOf(One{"x"}))
	v.Elem().Field(1).Set(reflect.ValueOf(Two{"y"}))
	v.Elem().Field(2).SetString("z")
	return v.Interface()
}

type loop struct {
	*loop
	Name string
}

// encoding/json writes the fields in the plan of a type, and Struct reaches them.
func TestNamesAreThoseOfEncodingJSON(t *testing.T) {
	for _, fresh := range []func() any{
		func() any { return &mixed{unexported{"a", "b"}, "n", "l"} },
		func() any { return &clash{left{"s", "l"}, &right{"s", "r"}, Deep{Under{"s", "l", &Deep{}}}} },
		func() any { return &tagged{"a", "b", "c", "d", "e", "f"} },
		both,
		func() any { return &loop{&loop{nil, "inner"}, "outer"} },
		func() any { return sample() },
	} {
		members := decode(t, toJSON(t, fresh())).(map[string]any)
		for name := range members {
			if strings.Contains(name, ".") {
				continue
			}
			v, f := fresh(), fields.New([]string{name}, nil)
			want, _, _ := f.Marshal(v)
			if kept := decode(t, string(want)).(map[string]any); !reflect.DeepEqual(kept, map[string]any{name: members[name]}) {
				t.Fatalf("%T: %s is not %s", v, want, name)
			}
			if _, err := f.Struct(v); err != nil {
				t.Fatal(err)
			}
			if got, _, _ := f.Marshal(v); string(got) != string(want) {
				t.Errorf("%T: permitting %s leaves %s, want %s", v, name, got, want)
			}
		}
		for _, paths := range []string{"", "Same L Deep.Same Deep.Deep twice X in.C Away hidden Hidden private named"} {
			for name := range strings.FieldsSeq(paths) {
				if members[name] != nil {
					paths = strings.ReplaceAll(paths, name, "")
				}
			}
			v := fresh()
			if _, err := filter(paths).Struct(v); err != nil {
				t.Fatal(err)
			}
			if left := exported(reflect.ValueOf(v).Elem()); left != "" {
				t.Errorf("%T: permitting %s leaves %s", v, paths, left)
			}
		}
	}
}

// exported finds a text in exported fields at any depth.
func exported(v reflect.Value) string {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			return exported(v.Elem())
		}
	case reflect.String:
		return v.String()
	case reflect.Struct:
		for i := range v.NumField() {
			if sf := v.Type().Field(i); sf.IsExported() || sf.Anonymous && sf.Type.Kind() != reflect.String {
				if s := exported(v.Field(i)); s != "" {
					return sf.Name + "." + s
				}
			}
		}
	}
	return ""
}

func TestMap(t *testing.T) {
	price := 1
	m := map[string]any{
		"a": 1, "b": map[string]string{"x": "1", "y": "2"}, "c": []map[string]any{{"x": 1, "y": 2}},
		"d": []customer{{"n", "e"}}, "e": customer{"n", "e"}, "f": &customer{"n", "e"}, "g": map[int]any{7: 1, 8: 2},
		"h": []*int{&price}, "i": []string{"x"}, "j": map[unsafe.Pointer]int{nil: 1}, "k": (*customer)(nil),
		"l": map[text]int{{"x"}: 1}, "m": json.Number("1.0"), "n": time.Unix(1, 0), "o": [1]customer{{"n", "e"}}, "p": []byte("p"), "q": byPointer{"q"}, "r": &byPointer{"r"},
	}
	dropped := filter("b.x c.x d.name e.name f.name g.7 h.x i.x j.x k.name l.x m n.x o.name p.x q.x r.x").Map(m)
	want := `{"b":{"x":"1"},"c":[{"x":1}],"d":[{"email":"","name":"n"}],"e":{"email":"","name":"n"},` +
		`"f":{"email":"","name":"n"},"g":{"7":1},"h":[],"i":[],"k":null,"l":{"x":1},"m":1.0,"o":[{"email":"","name":"n"}]}`
	if got := toJSON(t, m); !sameJSON(t, got, want) {
		t.Errorf("%s\nwant %s", got, want)
	}
	if show(dropped) != "0 denied, 15 unknown a b.y c.y d.email e.email f.email g.8 h i j n o.email p q r" {
		t.Error(show(dropped))
	}
	filter("a").Map(nil)
}

// A value that is removed as a whole does not change for its other holders.
func TestWhatGoesIsNotChanged(t *testing.T) {
	inner := map[string]any{"b": 1, "c": []any{map[string]any{"b": 1}}}
	person := &customer{"n", "e"}
	m := map[string]any{"a": inner, "p": person, "l": []*customer{person}}
	filter("-a.b -a.c.b -p.name -l.email").Map(m)
	if len(m) != 0 || toJSON(t, inner) != `{"b":1,"c":[{"b":1}]}` || *person != (customer{"n", "e"}) {
		t.Error(m, inner, *person)
	}
}

type text struct{ s string }

type byPointer struct{ X string }

func (b *byPointer) MarshalJSON() ([]byte, error) { return json.Marshal(b.X) }

func (t text) MarshalText() ([]byte, error) { return []byte(t.s), nil }
