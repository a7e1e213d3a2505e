package fields

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"

	"github.com/go-json-experiment/json/jsontext"
)

// JSON copies the document in src to dst without the fields that are not permitted. The
// document is an object, or a list of objects, which are filtered one by one.
//
// The text of kept values does not change, except white space between tokens: order,
// duplicate keys, digits and escapes stay. A permitted path whose value is an object or a
// list stays whole. Above permitted paths:
//
//   - An object or a list stays, even if it becomes empty: "{}", "[]". A null stays as well:
//     it reveals no more than that the fields below it have no value.
//   - A list keeps its objects, so its length is visible.
//   - Any other value is not what the catalogue describes. It is dropped as unknown, from a
//     list too.
//
// If nothing below a path is permitted, the key is dropped with the value. A key matches
// exactly one segment of a path: "customer.email" as one key is unknown.
//
// JSON never holds the whole document in memory: for any size, it needs a few times the
// longest text in it. It fails on anything but exactly one JSON document of valid Unicode, on
// nesting deeper than 100, on a key of more than 64 KiB, on a text, a number or a run of
// white space of more than 16 MiB, on a document that is one plain value, and if reading or
// writing fails. Then dst has the beginning of a document, which must not be used: it has
// only permitted fields, but a reader could take the part for the whole.
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

// Marshal is json.Marshal without the fields that are not permitted. Tags, embedding and
// methods of v's types have the same effect as in encoding/json. It fails if json.Marshal or
// JSON fails, and then returns no bytes.
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

// jsonWalk passes kept values on. It reads dropped values too, to count what is in them.
type jsonWalk struct {
	*tokens
	tally
	key []byte // the newest key, as it is written
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

// filter reads the next value and counts its dropped parts. keep says that the object or list
// around it stays. A key is passed on only when it is known that its value stays.
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
