package fields_test

import (
	"bytes"
	"encoding/json"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// generator makes a document from parts, and measures the memory in use after each MiB.
type generator struct {
	parts   []io.Reader
	made    int
	next    int
	inUse   uint64
	atStart uint64
}

func (g *generator) Read(p []byte) (int, error) {
	if g.made >= g.next {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		if g.next == 0 {
			g.atStart = m.HeapAlloc
		}
		g.inUse = max(g.inUse, m.HeapAlloc)
		g.next += 1 << 20
	}
	for len(g.parts) > 0 {
		n, err := g.parts[0].Read(p)
		if err == io.EOF {
			g.parts = g.parts[1:]
		}
		if n > 0 {
			g.made += n
			return n, nil
		}
	}
	return 0, io.EOF
}

// repeated is a text, many times.
type repeated struct {
	text string
	left int
	from int
}

func (r *repeated) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	n := copy(p, r.text[r.from:])
	if r.from += n; r.from == len(r.text) {
		r.from = 0
		r.left--
	}
	return n, nil
}

// A document of many MiB in a single object passes through in less than 1 MiB of
// memory, and so do smaller ones with other kept parts.
func TestStreamingTakesBoundedMemory(t *testing.T) { streamMany(t, 10_000) }

// TestSoakStreaming is the long version, with a document of 64 MiB.
func TestSoakStreaming(t *testing.T) {
	soak(t)
	streamMany(t, 30_000)
}

// soak skips a long test, unless CEDARPOST_SOAK is set.
func soak(t *testing.T) {
	t.Helper()
	if os.Getenv("CEDARPOST_SOAK") == "" {
		t.Skip("long: make soak")
	}
}

func streamMany(t *testing.T, orders int) {
	for _, c := range []struct {
		says, paths string
		orders      int
	}{
		{"some of it stays", "orders.id -orders.secret", 5 * orders},
		{"most of it stays", "orders texts -orders.secret", orders},
		{"all of it stays", "orders texts", orders},
		{"nothing stays", "", orders},
		{"what stays is deep", "orders.list.x", orders},
	} {
		g := &generator{parts: []io.Reader{
			strings.NewReader(`{"orders":[{"id":0}`),
			&repeated{text: `,{"id":123456789,"secret":"a secret that is to be dropped","list":[[1,2,{"x":1,"y":2}],[]],"unknown":{}}`, left: c.orders},
			strings.NewReader(`],"texts":{"":""`), &repeated{text: `,"":null,"":"` + strings.Repeat("long and é ", 1000) + `"`, left: c.orders / 100}, strings.NewReader(`}}`),
		}}
		pr, pw := io.Pipe()
		failed := make(chan error, 1)
		var written int64
		go func() {
			n, err := io.Copy(io.Discard, pr)
			written = n
			failed <- err
		}()
		dropped, err := filter(c.paths).JSON(pw, g)
		_ = pw.CloseWithError(err) // nil means the end of the document
		if readErr := <-failed; err != nil || readErr != nil {
			t.Fatal(err, readErr)
		}
		if g.made < c.orders*200 || g.inUse > g.atStart+1<<20 {
			t.Errorf("%s: of %d MiB in and %d MiB out, %d KiB were in use", c.says, g.made>>20, written>>20, (int64(g.inUse)-int64(g.atStart))>>10)
		}
		if c.says == "some of it stays" && (written < int64(c.orders*len(`,{"id":123456789}`)) || dropped.Denied != c.orders || dropped.Unknown != 2*c.orders+1) {
			t.Errorf("%s: %d bytes, %v", c.says, written, dropped)
		}
	}
}

// Everything that is held as a whole is bounded.
func TestLongTokensTakeBoundedMemory(t *testing.T) { longTokens(t, "a text", "white space") }

// TestSoakLongTokens is the long version: long tokens in every position.
func TestSoakLongTokens(t *testing.T) {
	soak(t)
	longTokens(t)
}

// longTokens tries the named positions, or all.
func longTokens(t *testing.T, names ...string) {
	const most = 16 << 20
	long := strings.Repeat("x", most-len(`""`))
	for doc, refused := range map[string]bool{`{"a":"` + long + `"}`: false, `{"a":"` + long + `x"}`: true, `{"b":"` + long + `x"}`: true} {
		if out, _, err := run(filter("a"), doc); (err != nil) != refused || err == nil && out != doc {
			t.Errorf("%.10s of %d bytes: %d bytes, %v", doc, len(doc), len(out), err)
		}
	}
	for _, c := range []struct{ says, before, endless, want string }{
		{"a text", `{"a":"`, "x", "more than 16777216 bytes"},
		{"one that is dropped", `{"b":"`, "x", "more than 16777216 bytes"},
		{"one in what is kept whole", `{"a":[{"b":"`, "x", "more than 16777216 bytes"},
		{"one below a leaf", `{"c":[{"d":"`, "é", "more than 16777216 bytes"},
		{"a key", `{"`, "x", "more than 16777216 bytes"},
		{"a key in what is kept whole", `{"a":{"`, "x", "more than 16777216 bytes"},
		{"a number", `{"a":1`, "0", "more than 16777216 bytes"},
		{"white space", `{"a":`, " ", "more than 16777216 bytes"},
		{"white space before", ``, " ", "more than 16777216 bytes"},
		{"white space after", `{"a":1}`, " ", "more than 16777216 bytes"},
		{"objects where a key belongs", `{`, `{"":`, "not JSON"},
	} {
		if len(names) > 0 && !slices.Contains(names, c.says) {
			continue
		}
		g := &generator{parts: []io.Reader{strings.NewReader(c.before), &repeated{text: strings.Repeat(c.endless, 1<<18), left: 3 * most >> 18}}}
		if _, err := filter("a c.d").JSON(io.Discard, g); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v; want %q", c.says, err, c.want)
		}
		if g.made > most+8<<10 || g.inUse > g.atStart+40<<20 {
			t.Errorf("%s: of %d KiB, %d KiB were in use", c.says, g.made>>10, (int64(g.inUse)-int64(g.atStart))>>10)
		}
	}
}

// No dropped value is written, even if the input after it cannot be read.
func TestNothingDeniedIsWrittenBeforeAnError(t *testing.T) {
	doc := `{"a":{"secret":"s3cret","b":1},"list":[{"secret":"s3cret"}],"long":"` + strings.Repeat("x", 1<<16) + `"}`
	for cut := range len(doc) - 1<<16 {
		var out bytes.Buffer
		if _, err := filter("a.b list.b long -a.secret").JSON(&out, strings.NewReader(doc[:cut])); err == nil || strings.Contains(out.String(), "s3c") {
			t.Fatalf("%q, %v", out.String(), err)
		}
	}
}

// orders is a document like the answer of a list endpoint.
func orders() []byte {
	one := `{"id":123456,"status":"paid","total":99.90,"customer":{"name":"Bob","email":"bob@example.com"},` +
		`"items":[{"sku":"a-1","price":9.90,"cost":4.10},{"sku":"b-2","price":90.00,"cost":40.00}],"internal":{"margin":0.3,"notes":"é"}}`
	return []byte("[" + strings.Repeat(one+",", 999) + one + "]")
}

// BenchmarkJSON and BenchmarkDecodeEncode do the same work on the same document: one
// filters it, the other decodes and encodes all of it. Run one right after the other
// and divide the times. The filter should take about half of the time, and a small part
// of the memory.
func BenchmarkJSON(b *testing.B) {
	doc := orders()
	f := filter("id status total customer.name items.sku items.price -customer.email -items.cost -internal.margin -internal.notes")
	b.SetBytes(int64(len(doc)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := f.JSON(io.Discard, bytes.NewReader(doc)); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkDecodeEncode(b *testing.B) {
	doc := orders()
	b.SetBytes(int64(len(doc)))
	b.ReportAllocs()
	for b.Loop() {
		d := json.NewDecoder(bytes.NewReader(doc))
		d.UseNumber()
		var v any
		if err := d.Decode(&v); err != nil {
			b.Fatal(err)
		}
		if err := json.NewEncoder(io.Discard).Encode(v); err != nil {
			b.Fatal(err)
		}
	}
}
