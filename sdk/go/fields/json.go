package fields

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"

	"github.com/go-json-experiment/json/jsontext"
)

// JSON copies the document in src to dst without what is not permitted. The document
// is an object, or a list of objects, each judged by itself.
//
// The text of what stays is not changed, but for white space between tokens: order,
// duplicate keys, digits and escapes are as they were. A permitted path whose value
// is an object or a list stays whole. Above permitted paths:
//
//   - An object or a list stays, even if nothing is left in it: "{}", "[]". A null
//     stays as well: it says no more than that the fields below it have no value.
//   - A list keeps its objects, so its length shows.
//   - Any other value is not what the catalogue describes. It is dropped as unknown,
//     from a list too.
//
// Where nothing below a path is permitted, the key goes with the value. A key matches
// one segment of a path, exactly: "customer.email" as one key is unknown.
//
// The document is never held as a whole; memory is bounded for any size, by a few times
// the longest text in it. It fails on what is not exactly one JSON document of valid
// Unicode, on nesting deeper than 100, on a key of more than 64 KiB, on a text, a number
// or a run of white space of more than 16 MiB, on a document that is one plain value,
// and when reading or writing fails. Then dst holds the beginning of a document, which
// must not be used: it holds nothing that is not permitted, but a reader could take a
// part for the whole.
func (f *Filter) JSON(dst io.Writer, src io.Reader) (Dropped, error) {
	j := jsonWalk{tokens: newTokens(dst, src)}
	if err := j.document(f.top()); err != nil {
		return j.result(), err
	}
	if err := j.out.Flush(); err != nil {
		return j.result(), fmt.Errorf("fields: write: %w", err)
	}
	return j.result(), nil
}

// Marshal is json.Marshal without what is not permitted. Tags, embedding and methods
// of v's types mean what they mean to encoding/json. It fails where json.Marshal or
// JSON do, and then returns no bytes.
func (f *Filter) Marshal(v any) ([]byte, Dropped, error) {
	all, err := json.Marshal(v)
	if err != nil {
		return nil, Dropped{}, fmt.Errorf("fields: %w", err)
	}
	var kept bytes.Buffer
	dropped, err := f.JSON(&kept, bytes.NewReader(all))
	if err != nil {
		return nil, dropped, err
	}
	return kept.Bytes(), dropped, nil
}

// jsonWalk passes on what is kept. What is not still has to be read, and what is in it
// counted.
type jsonWalk struct {
	*tokens
	tally
	key []byte // as it is written
}

func (j *jsonWalk) document(root *node) error {
	kind, err := j.peek()
	if err != nil {
		return err
	}
	if kind != '{' && kind != '[' && kind != 'n' {
		return j.fail("the document is neither an object nor a list")
	}
	if err := j.filter(root, true); err != nil {
		return err
	}
	return j.end()
}

// stays says whether a value of a kind is kept at n.
func stays(n *node, kind jsontext.Kind) bool {
	switch {
	case n == nil || n.denied:
		return false
	case kind == '{', kind == '[', kind == 'n':
		return n.keeps()
	}
	return n.whole
}

// filter reads the value that comes next, and counts what is dropped of it. keep says
// that what it is in stays. A key is passed on only once it is known that its value
// stays.
func (j *jsonWalk) filter(n *node, keep bool) error {
	kind, err := j.peek()
	if err != nil {
		return err
	}
	keep = keep && stays(n, kind)
	if keep && j.atKey() {
		if err := j.put(j.key); err != nil {
			return err
		}
	}
	if _, ok := j.known(n); ok {
		return j.value(keep)
	}
	before := j.total()
	switch kind {
	case '{':
		err = j.list('{', keep, func() error { return j.member(n, keep) })
	case '[':
		err = j.list('[', keep, func() error { return j.filter(n, keep) })
	case 'n':
		j.null(n)
		return j.value(keep)
	default:
		j.scalar(n)
		return j.value(keep)
	}
	j.settled(n, before)
	return err
}

func (j *jsonWalk) member(n *node, keep bool) error {
	written, name, err := j.text()
	if err != nil {
		return err
	}
	j.key = append(j.key[:0], written...)
	child := n.child(name)
	mark := j.push(name, child != nil)
	defer j.pop(mark)
	return j.filter(child, keep)
}
