package entityfile_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/entityfile"
)

// readAll reads entities as lines like `A b {"n":1} [A c]`, up to the end or an error.
func readAll(r *entityfile.Reader) (string, error) {
	var lines []string
	for {
		e, err := r.Next()
		if err != nil {
			if _, again := r.Next(); again != err { //nolint:errorlint // the very same
				err = fmt.Errorf("after %w, %w", err, again)
			}
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return strings.Join(lines, "\n"), err
		}
		lines = append(lines, entityLine(e))
	}
}

func entityLine(e *cedarpostv1.Entity) string {
	attrs, err := json.Marshal(e.Attrs.AsMap())
	if err != nil {
		panic(err)
	}
	var parents []string
	for _, p := range e.Parents {
		parents = append(parents, p.Type+" "+p.Id)
	}
	return fmt.Sprintf("%s %s %s [%s]", e.Uid.Type, e.Uid.Id, attrs, strings.Join(parents, ", "))
}

const mapping = `
type: User
id: employee
parents:
  - {type: Role, column: roles, split: ";"}
  - {type: Group, column: team}
attrs:
  region: region
  level: {column: lvl, as: long}
  boss: {column: mgr, entity: User}
  active: {column: active, as: bool}
  since: {column: since, as: datetime}
  labels: {column: labels, split: ","}
  sizes: {column: sizes, as: long, split: " "}
`

const header = "employee,roles,team,region,lvl,mgr,active,since,labels,sizes,unused\n"

func csvReader(t testing.TB, mapping, text string) *entityfile.Reader {
	t.Helper()
	m, err := entityfile.ParseMapping([]byte(mapping))
	if err != nil {
		t.Fatal(err)
	}
	return entityfile.ReadCSV(strings.NewReader(text), m)
}

const a, b = `{"uid":{"type":"A","id":"a"}}`, `{"uid":{"type":"A","id":"b"}}`

func TestReader(t *testing.T) {
	for _, c := range []struct {
		name, format, text string
		want               string // the entities, a slash between them
		err                string
	}{
		{"an empty array", "json", `[]`, ``, ``},
		{"two entities", "json", "[" + a + ",\n" + b + "]\n", `A a {} []/A b {} []`, ``},
		{"a byte order mark", "json", "\ufeff[" + a + "]", `A a {} []`, ``},
		{"exact numbers", "json", `[{"uid":{"type":"A","id":"a"},"attrs":{"n":9007199254740993,"m":-1,"l":[1e2]}}]`, `A a {"l":[100],"m":-1,"n":"9007199254740993"} []`, ``},
		{"nothing", "json", ``, ``, `not an array of entities in Cedar's JSON format: unexpected EOF`},
		{"no array", "json", a, ``, `not an array of entities in Cedar's JSON format`},
		{"no end", "json", "[" + a + ",\n" + b, `A a {} []/A b {} []`, `the array of entities has no end, near line 2: unexpected EOF`},
		{"half an entity", "json", "[" + a + ",\n{\"uid\"", `A a {} []`, `entity 2, near line 1: unexpected EOF`},
		{"no comma", "json", "[" + a + "\n" + b + "]", `A a {} []`, `entity 2, near line 2: expected comma after array element`},
		{"more after the array", "json", "[" + a + "]\n[" + b + "]", `A a {} []`, `something follows the array of entities, near line 2`},
		{"a strange key", "json", "[\n" + a + ",\n\n  {\n\"uid\":{\"type\":\"A\",\"id\":\"b\"},\"atrs\":{}}]", `A a {} []`, `entity 2, line 4: unknown key "atrs"`},
		{"a number", "json", "[1]", ``, `entity 1, line 1: not an object`},
		{"null", "json", "[null]", ``, `entity 1, line 1: not an object`},
		{"Latin-1", "json", "[{\"uid\":{\"type\":\"A\",\"id\":\"M\xfcller\"}}]", ``, `entity 1, line 1: not valid UTF-8`},
		{"a large entity", "json", "[" + a + `,{"uid":"` + strings.Repeat("x", 5<<20) + `"}]`, `A a {} []`, `entity 2, near line 1: an entity of more than 4 MiB`},

		{"a member twice", "json", "[" + a + ",\n" + `{"uid":{"type":"A","id":"b"},"attrs":{"r":[{"s":true,"s":false}]}}]`, `A a {} []`, `entity 2, line 2: member "s" is twice in an object, at /attrs/r/0/s`},
		{"a member twice, once by its code", "json", `[{"uid":{"type":"A","id":"a"},"attrs":{"ab":1,"\u0061b":2}}]`, ``, `entity 1, line 1: member "ab" is twice in an object, at /attrs/ab`},
		{"attributes twice", "json", `[{"uid":{"type":"A","id":"a"},"attrs":{},"attrs":{}}]`, ``, `entity 1, line 1: member "attrs" is twice in an object, at /attrs`},
		{"an id twice", "json", `[{"uid":{"type":"A","id":"a","id":"b"}}]`, ``, `entity 1, line 1: member "id" is twice in an object, at /uid/id`},
		{"half a character", "json", `[{"uid":{"type":"A","id":"\ud800"}}]`, ``, `entity 1, line 1: not valid Unicode, at /uid/id`},
		{"an entity twice", "json", "[" + a + ",\n" + b + ",\n" + `{"parents":[],"uid":{"__entity":{"id":"a","type":"A"}}}]`, `A a {} []/A b {} []`, `line 3: entity A::"a" is in the file twice, first on line 1`},
		{"two that only look alike", "json", `[{"uid":{"type":"A","id":"ab"}},{"uid":{"type":"Aa","id":"b"}}]`, `A ab {} []/Aa b {} []`, ``},

		{"no lines", "ndjson", ``, ``, ``},
		{"two lines", "ndjson", a + "\n\n \r\n" + b, `A a {} []/A b {} []`, ``},
		{"a byte order mark", "ndjson", "\ufeff" + a + "\r\n", `A a {} []`, ``},
		{"an array", "ndjson", "[" + a + "]", ``, `line 1: not an object`},
		{"two on a line", "ndjson", a + "\n" + b + " " + a + "\n", `A a {} []`, `line 2: something follows the value`},
		{"half an entity", "ndjson", a + "\n\n" + `{"uid"`, `A a {} []`, `line 3: unexpected EOF`},
		{"a member twice", "ndjson", a + "\n" + `{"uid":{"type":"A","id":"b"},"tags":{"t":1,"t":1}}`, `A a {} []`, `line 2: member "t" is twice in an object, at /tags/t`},
		{"an entity twice", "ndjson", a + "\n\n" + b + "\n" + a, `A a {} []/A b {} []`, `line 4: entity A::"a" is in the file twice, first on line 1`},
		{"no name", "ndjson", a + "\n{}", `A a {} []`, `line 2: uid is missing`},
		{"a large entity", "ndjson", a + "\n" + strings.Repeat("x", 5<<20), `A a {} []`, `line 2: an entity of more than 4 MiB`},

		{"every kind of cell", "csv", header + `e1,admin; sales;,red,eu,7,e2,TRUE,2024-01-01,"a, b",1 22,x`, `User e1 {"active":true,"boss":{"id":"e2","type":"User"},"labels":["a","b"],"level":7,"region":"eu","since":"2024-01-01","sizes":[1,22]} [Role admin, Role sales, Group red]`, ``},
		{"empty cells", "csv", header + "e1,,,,,,,,,,\n", `User e1 {} []`, ``},
		{"spaces", "csv", header + "\" e1\",, red,,,,,,,,\n", `User  e1 {} [Group  red]`, ``},
		{"a large number", "csv", header + "e1,,,,9007199254740993,,,,,,\n", `User e1 {"level":"9007199254740993"} []`, ``},
		{"a byte order mark and CRLF", "csv", "\ufeff" + strings.ReplaceAll(header, "\n", "\r\n") + "e1,,,,,,,,,,\r\n", `User e1 {} []`, ``},
		{"only a header", "csv", header, ``, ``},
		{"nothing", "csv", ``, ``, `line 1: no header with the names of the columns`},
		{"a column that is not there", "csv", "employee,roles,team,region,lvl,mgr,active,since\n", ``, `line 1: no column "labels", "sizes"; there are ["employee" "roles" "team" "region" "lvl" "mgr" "active" "since"]`},
		{"a column twice", "csv", "employee," + header, ``, `line 1: two columns "employee"`},
		{"no id", "csv", header + "e1,,,,,,,,,,\n,,,,,,,,,,\n", `User e1 {} []`, `line 3: column "employee": the id is empty`},
		{"an entity twice", "csv", header + "\"e\n1\",admin,,,,,,,,,\n\"e\n1\",sales,,,,,,,,,\n", "User e\n1 {} [Role admin]", `line 4: entity User::"e\n1" is in the file twice, first on line 2`},
		{"a word for a number", "csv", header + "\"e\n1\",,,,,,,,,,\ne2,,,,high,,,,,,\n", "User e\n1 {} []", `line 4: column "lvl": "high" is not a whole number of 64 bits`},
		{"a fraction in a set", "csv", header + "e1,,,,,,,,,1 2.5,\n", ``, `line 2: column "sizes": "2.5" is not a whole number of 64 bits`},
		{"a strange bool", "csv", header + "e1,,,,,,yes,,,,\n", ``, `line 2: column "active": "yes" is neither true nor false`},
		{"a cell too few", "csv", header + "e1,,,,,,,,,,\ne2,\n", `User e1 {} []`, `line 3: 2 cells, the header has 11`},
		{"a stray quote", "csv", header + "e1,a\"b,,,,,,,,,\n", ``, `line 2: bare " in non-quoted-field`},
		{"a quote without end", "csv", header + "e1,,,,,,,,,,\n\"" + strings.Repeat("x\n", 3<<20), `User e1 {} []`, `after line 2: an entity of more than 4 MiB`},
		{"Latin-1", "csv", header + "M\xfcller,,,,,,,,,,\n", ``, `line 2: column "employee": not valid UTF-8`},
		{"Latin-1 that nobody reads", "csv", header + "e1,,,,,,,,,,M\xfcller\n", `User e1 {} []`, ``},
	} {
		var r *entityfile.Reader
		switch c.format {
		case "json":
			r = entityfile.ReadJSON(strings.NewReader(c.text))
		case "ndjson":
			r = entityfile.ReadNDJSON(strings.NewReader(c.text))
		case "csv":
			r = csvReader(t, mapping, c.text)
		}
		got, err := readAll(r)
		if want := strings.ReplaceAll(c.want, "/", "\n"); got != want {
			t.Errorf("%s: %s: got\n%s\nwant\n%s", c.format, c.name, got, want)
		}
		if (err == nil) != (c.err == "") || (err != nil && !strings.HasPrefix(err.Error(), c.err)) {
			t.Errorf("%s: %s: got %v, want %s", c.format, c.name, err, c.err)
		}
	}
}

func TestMapping(t *testing.T) {
	for _, c := range []struct{ text, err string }{
		{mapping, ``},
		{"type: T\nid: i\n", ``},
		{``, `the file is empty`},
		{`[]`, `line 1: a mapping is not written as keys and values`},
		{"type: T\n---\nid: i", `more than one YAML document`},
		{"type: T\nid: [", `line 3: not valid YAML`},
		{`id: i`, `type is missing`},
		{`type: T`, `id is missing`},
		{"type: T\nid: i\nattributes: {}", `line 3: a mapping has no key "attributes"; there are attrs, id, parents, type`},
		{"type: T\nid: i\nid: j", `line 3: key "id" is given twice`},
		{"type: T\nid: 1", `line 2: "1" is not text to YAML: put it in quotes`},
		{"type: T\nid: ''", `line 2: an empty text`},
		{"type: T\nid: i\nparents: {}", `line 3: parents is not a list`},
		{"type: T\nid: i\nparents:\n- {type: R}", `line 4: a parent has a type and a column`},
		{"type: T\nid: i\nparents:\n- {type: R, column: r, sep: ';'}", `line 4: a parent has no key "sep"; there are column, split, type`},
		{"type: T\nid: i\nattrs:\n  a: c\n  b: [c]", `line 5: not a single text`},
		{"type: T\nid: i\nattrs:\n  a: {as: long}", `line 4: attribute "a" has no column`},
		{"type: T\nid: i\nattrs:\n  a: {column: c, as: int}", `line 4: attribute "a": as "int" is none of text, long, bool, decimal`},
		{"type: T\nid: i\nattrs:\n  a: {column: c, as: long, entity: U}", `line 4: attribute "a" has as and entity; give one`},
		{"type: T\nid: i\nattrs:\n  a: {column: c, split: ''}", `line 4: an empty text`},
		{"type: T\nid: i\nattrs:\n  yes: &x c\n  no: *x", `line 5: not a single text`},
	} {
		_, err := entityfile.ParseMapping([]byte(c.text))
		if (err == nil) != (c.err == "") || (err != nil && !strings.HasPrefix(err.Error(), c.err)) {
			t.Errorf("%q: got %v, want %q", c.text, err, c.err)
		}
	}
}

// endless is a file without end that counts what was read of it. Each # in its text is a
// new number.
type endless struct {
	text string // repeated without end
	n    int
	rest string
	read int
}

func (e *endless) Read(p []byte) (int, error) {
	if e.rest == "" {
		e.n++
		e.rest = strings.ReplaceAll(e.text, "#", fmt.Sprintf("%09d", e.n))
	}
	n := copy(p, e.rest)
	e.rest = e.rest[n:]
	e.read += n
	return n, nil
}

// openers open files of entities without end. Each repeats the text of one entity.
func openers(t *testing.T) map[string]func(io.Reader) *entityfile.Reader {
	const entity = `{"uid":{"type":"A","id":"#"}}`
	return map[string]func(io.Reader) *entityfile.Reader{
		entity + ",\n": func(r io.Reader) *entityfile.Reader {
			return entityfile.ReadJSON(io.MultiReader(strings.NewReader("["), r))
		},
		entity + "\n": entityfile.ReadNDJSON,
		"e#,admin,,,,,,,,,\n": func(r io.Reader) *entityfile.Reader {
			m, err := entityfile.ParseMapping([]byte(mapping))
			if err != nil {
				t.Fatal(err)
			}
			return entityfile.ReadCSV(io.MultiReader(strings.NewReader(header), r), m)
		},
	}
}

// Reading an entity reads little beyond it, so the length of the file does not matter.
func TestReadersDoNotReadAhead(t *testing.T) {
	const entities, ahead = 20_000, 256 << 10
	for text, open := range openers(t) {
		file := &endless{text: text}
		r := open(file)
		for i := range entities {
			if _, err := r.Next(); err != nil {
				t.Fatal(err)
			}
			if file.read > (i+1)*(len(text)+8)+ahead {
				t.Fatalf("%q: %d bytes read for %d entities", text, file.read, i+1)
			}
		}
	}
}

// The number of stored names is bounded, and a second entity with a stored name is found.
func TestMemoryOfNamesIsBounded(t *testing.T) {
	for text, open := range openers(t) {
		r := open(io.MultiReader(&fixed{endless: endless{text: text}, rows: 2_000}, &endless{text: text}))
		entityfile.Compare(r, 1_000)
		for range 2_000 {
			if _, err := r.Next(); err != nil {
				t.Fatal(err)
			}
		}
		if n := entityfile.Compared(r); n != 1_000 {
			t.Errorf("%q: %d names are remembered", text, n)
		}
		if _, err := r.Next(); !errors.Is(err, entityfile.ErrTwice) {
			t.Errorf("%q: the first again, after 2,000 others: %v", text, err)
		}
	}
}

// fixed returns so many rows of an endless file.
type fixed struct {
	endless
	rows int
}

func (f *fixed) Read(p []byte) (int, error) {
	if f.n == f.rows && f.rest == "" {
		return 0, io.EOF
	}
	return f.endless.Read(p)
}

// A context is a record.
func TestParseRecord(t *testing.T) {
	for _, c := range []struct{ text, err string }{
		{`{}`, ``},
		{` {"n": 9007199254740993, "s": [{"a": 1}, {"a": 1}]} `, ``},
		{`null`, `not an object`},
		{`{"mfa": true} {}`, `something follows the value`},
		{`{"mfa": `, `unexpected EOF`},
		{`{"mfa": true, "mfa": false}`, `member "mfa" is twice in an object, at /mfa`},
		{`{"a": {"b/c": [{"d": 1, "d": 1}]}}`, `member "d" is twice in an object, at /a/b~1c/0/d`},
		{"{\"a\": \"\xff\"}", `not valid Unicode, at /a`},
	} {
		_, err := entityfile.ParseRecord([]byte(c.text))
		if (err == nil) != (c.err == "") || err != nil && err.Error() != c.err {
			t.Errorf("%s: got %v, want %s", c.text, err, c.err)
		}
	}
}
