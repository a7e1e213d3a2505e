// Package entityfile reads entities from files: Cedar's entity JSON, as one array or as
// one entity in each line, and CSV with a mapping. Memory is bounded for a file of any
// length.
package entityfile

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"unicode/utf8"

	"google.golang.org/protobuf/types/known/structpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// maxEntityText bounds one entity in a file: a larger one could not be sent.
const maxEntityText = 4 << 20

var errEntityText = fmt.Errorf("an entity of more than %d MiB", maxEntityText>>20)

// MaxCompared is the number of entities of a file whose names are stored, as 16 bytes and
// a line each, to find an entity that is twice in it. All later entities are compared with
// these.
const MaxCompared = 1_000_000

// Reader reads the entities of a file one by one, so that memory is bounded for a file of
// any length. It refuses an entity that is twice in it with [ErrTwice]. [ReadJSON],
// [ReadNDJSON] and [ReadCSV] make one.
type Reader struct {
	next func() (*cedarpostv1.Entity, int, error) // and the line where it begins
	err  error                                    // the error that ended it
	seen map[[16]byte]int                         // digest of a name → its line
	most int                                      // the largest number of them
}

func newReader(next func() (*cedarpostv1.Entity, int, error)) *Reader {
	return &Reader{next: next, seen: map[[16]byte]int{}, most: MaxCompared}
}

// Next returns the next entity, or [io.EOF] after the last one. Any other error has a
// place in the file, and ends the reading.
func (r *Reader) Next() (*cedarpostv1.Entity, error) {
	if r.err != nil {
		return nil, r.err
	}
	e, line, err := r.next()
	if err == nil {
		err = r.twice(e.GetUid(), line)
	}
	if r.err = err; err != nil {
		return nil, err
	}
	return e, nil
}

// twice refuses an entity that was read before.
func (r *Reader) twice(u *cedarpostv1.EntityUid, line int) error {
	all := sha256.Sum256(fmt.Appendf(nil, "%d:%s%s", len(u.GetType()), u.GetType(), u.GetId()))
	key := [16]byte(all[:])
	if first, ok := r.seen[key]; ok {
		return fmt.Errorf("line %d: entity %s::%.100q is in the file %w, first on line %d", line, u.GetType(), u.GetId(), ErrTwice, first)
	}
	if len(r.seen) < r.most {
		r.seen[key] = line
	}
	return nil
}

// ReadJSON reads Cedar's entity JSON format: an array of {"uid", "attrs", "parents",
// "tags"}. Numbers that JSON readers often round become strings of digits, as in the wire
// format.
func ReadJSON(r io.Reader) *Reader {
	src := &countedText{entityText: entityText{r: withoutMark(r)}}
	d := json.NewDecoder(src)
	number := 0
	return newReader(func() (*cedarpostv1.Entity, int, error) {
		src.left = maxEntityText
		if number == 0 {
			t, err := d.Token()
			if err != nil {
				return nil, 0, fmt.Errorf("not an array of entities in Cedar's JSON format: %w", unexpected(err))
			}
			if t != json.Delim('[') {
				return nil, 0, errors.New("not an array of entities in Cedar's JSON format")
			}
		}
		number++
		if !d.More() {
			return nil, 0, endArray(d, src)
		}
		var text json.RawMessage
		if err := d.Decode(&text); err != nil {
			return nil, 0, fmt.Errorf("entity %d, near line %d: %w", number, src.line(d.InputOffset()), unexpected(err))
		}
		line := src.line(d.InputOffset() - int64(len(text)))
		e, err := parseEntityText(text)
		if err != nil {
			return nil, 0, fmt.Errorf("entity %d, line %d: %w", number, line, err)
		}
		return e, line, nil
	})
}

// endArray reads what follows the last entity.
func endArray(d *json.Decoder, src *countedText) error {
	if _, err := d.Token(); err != nil {
		return fmt.Errorf("the array of entities has no end, near line %d: %w", src.line(d.InputOffset()), unexpected(err))
	}
	src.left = maxEntityText
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("something follows the array of entities, near line %d", src.line(d.InputOffset()))
	}
	return io.EOF
}

// ReadNDJSON reads entities in Cedar's JSON format, one in each line. It skips empty
// lines.
func ReadNDJSON(r io.Reader) *Reader {
	lines := bufio.NewScanner(withoutMark(r))
	lines.Buffer(nil, maxEntityText)
	line := 0
	return newReader(func() (*cedarpostv1.Entity, int, error) {
		for lines.Scan() {
			line++
			text := bytes.TrimSpace(lines.Bytes())
			if len(text) == 0 {
				continue
			}
			e, err := parseEntityText(text)
			if err != nil {
				return nil, 0, fmt.Errorf("line %d: %w", line, err)
			}
			return e, line, nil
		}
		err := lines.Err()
		if errors.Is(err, bufio.ErrTooLong) {
			err = errEntityText
		}
		if err != nil {
			return nil, 0, fmt.Errorf("line %d: %w", line+1, err)
		}
		return nil, 0, io.EOF
	})
}

// Parse reads all entities of a text like [ReadJSON].
func Parse(data []byte) ([]*cedarpostv1.Entity, error) {
	r := ReadJSON(bytes.NewReader(data))
	list := []*cedarpostv1.Entity{}
	for {
		e, err := r.Next()
		if errors.Is(err, io.EOF) {
			return list, nil
		}
		if err != nil {
			return nil, err
		}
		list = append(list, e)
	}
}

// withoutMark skips the byte order mark that some programs put before UTF-8.
func withoutMark(r io.Reader) io.Reader {
	b := bufio.NewReaderSize(r, 64<<10)
	if mark, _ := b.Peek(3); string(mark) == "\ufeff" {
		_, _ = b.Discard(3) // they were just read
	}
	return b
}

// entityText bounds what is read for one entity, so that a quote or a bracket that is
// never closed does not make the reader read a whole file into memory.
type entityText struct {
	r    io.Reader
	left int // bytes that may be read before the next entity
}

// Read implements io.Reader.
func (t *entityText) Read(p []byte) (int, error) {
	if t.left == 0 {
		return 0, errEntityText
	}
	n, err := t.r.Read(p[:min(len(p), t.left)])
	t.left -= n
	return n, err
}

// countedText counts the lines of what it reads.
type countedText struct {
	entityText
	read  int64   // so far
	ends  []int64 // ends of lines that were read and not passed yet
	lines int     // lines that were passed
}

// Read implements io.Reader.
func (t *countedText) Read(p []byte) (int, error) {
	n, err := t.entityText.Read(p)
	for i, c := range p[:n] {
		if c == '\n' {
			t.ends = append(t.ends, t.read+int64(i))
		}
	}
	t.read += int64(n)
	return n, err
}

// line returns the line of an offset, which must not be before that of the last call.
func (t *countedText) line(offset int64) int {
	passed := 0
	for passed < len(t.ends) && t.ends[passed] < offset {
		passed++
	}
	t.ends = t.ends[passed:]
	t.lines += passed
	return t.lines + 1
}

// unexpected returns the error for a failed read in the middle of an entity, where the
// end of the file is an error too.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// parseEntityText reads one entity in Cedar's JSON format.
func parseEntityText(text []byte) (*cedarpostv1.Entity, error) {
	if !utf8.Valid(text) {
		return nil, errors.New("not valid UTF-8")
	}
	if text[0] != '{' {
		return nil, errors.New(`not an object {"uid", "attrs", "parents", "tags"}`)
	}
	v, err := DecodeJSON(text)
	if err != nil {
		return nil, err
	}
	return FromMap(v.(map[string]any))
}

// FromMap reads one entity from decoded JSON in Cedar's format.
func FromMap(m map[string]any) (*cedarpostv1.Entity, error) {
	e := &cedarpostv1.Entity{}
	for key, v := range m {
		var err error
		switch key {
		case "uid":
			e.Uid, err = parseUID(v)
		case "attrs":
			e.Attrs, err = parseStruct(v)
		case "tags":
			e.Tags, err = parseStruct(v)
		case "parents":
			list, ok := v.([]any)
			if !ok {
				return nil, errors.New("parents: not an array")
			}
			for _, p := range list {
				uid, err := parseUID(p)
				if err != nil {
					return nil, fmt.Errorf("parents: %w", err)
				}
				e.Parents = append(e.Parents, uid)
			}
		default:
			return nil, fmt.Errorf("unknown key %q", key)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", key, err)
		}
	}
	if e.Uid == nil {
		return nil, errors.New("uid is missing")
	}
	return e, nil
}

func parseUID(v any) (*cedarpostv1.EntityUid, error) {
	m, ok := v.(map[string]any)
	if inner, explicit := m["__entity"].(map[string]any); explicit && len(m) == 1 {
		m = inner
	}
	typ, okType := m["type"].(string)
	id, okID := m["id"].(string)
	if !ok || !okType || !okID || len(m) != 2 {
		return nil, errors.New(`not {"type": "…", "id": "…"}`)
	}
	return &cedarpostv1.EntityUid{Type: typ, Id: id}, nil
}

func parseStruct(v any) (*structpb.Struct, error) {
	m, ok := v.(map[string]any)
	if !ok {
		return nil, errors.New("not an object")
	}
	plain, err := Exact(m)
	if err != nil {
		return nil, err
	}
	return structpb.NewStruct(plain.(map[string]any))
}

// Exact replaces a json.Number by a float64 if that is exact, and otherwise by its
// digits.
func Exact(v any) (any, error) {
	switch v := v.(type) {
	case json.Number:
		if i, err := v.Int64(); err == nil {
			return exactLong(i), nil
		}
		return v.Float64()
	case []any:
		for i := range v {
			var err error
			if v[i], err = Exact(v[i]); err != nil {
				return nil, err
			}
		}
	case map[string]any:
		for k := range v {
			var err error
			if v[k], err = Exact(v[k]); err != nil {
				return nil, err
			}
		}
	}
	return v, nil
}

func exactLong(i int64) any {
	if i > 1<<53-1 || i < -(1<<53-1) {
		return strconv.FormatInt(i, 10)
	}
	return float64(i)
}
