package fields

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
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
// The document is never held as a whole; memory is bounded for any size. It fails on
// what is not exactly one JSON document of valid Unicode, on nesting deeper than 100,
// on a key of more than 64 KiB or a number of more than 1 KiB, on a document that is
// one plain value, and when reading or writing fails. Then dst holds the beginning of
// a document, which must not be used: it holds nothing that is not permitted, but a
// reader could take a part for the whole.
func (f *Filter) JSON(dst io.Writer, src io.Reader) (Dropped, error) {
	out := bufio.NewWriterSize(dst, 8<<10)
	j := jsonWalk{scanner: newScanner(src)}
	if err := j.document(f.top(), out); err != nil {
		return j.result(), err
	}
	if err := out.Flush(); err != nil {
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

// jsonWalk passes on what is kept. What is not kept goes to io.Discard: it still has
// to be read, and what is in it counted.
type jsonWalk struct {
	*scanner
	tally
}

func (j *jsonWalk) document(root *node, to io.Writer) error {
	c, err := j.next()
	if err != nil {
		return err
	}
	if c != '{' && c != '[' && c != 'n' {
		return j.fail("the document is neither an object nor a list")
	}
	if err := j.filter(root, to); err != nil {
		return err
	}
	return j.end()
}

// stays says whether the value that begins with c is kept at n.
func stays(n *node, c byte) bool {
	switch {
	case n == nil || n.denied:
		return false
	case c == '{', c == '[', c == 'n':
		return n.keeps()
	}
	return n.whole
}

// filter reads the value that comes next, and counts what is dropped of it. The caller
// has asked whether it stays, and written what goes before it; if not, to is
// io.Discard.
func (j *jsonWalk) filter(n *node, to io.Writer) error {
	if _, ok := j.known(n); ok {
		return j.value(to)
	}
	c, err := j.next()
	if err != nil {
		return err
	}
	switch c {
	case '{', '[':
		before := j.total()
		if c == '{' {
			err = j.members(n, to)
		} else {
			err = j.elements(n, to)
		}
		j.settled(n, before)
		return err
	case 'n':
		j.null(n)
	default:
		j.scalar(n)
	}
	return j.value(to)
}

func (j *jsonWalk) members(n *node, to io.Writer) error {
	out := brackets{to: to, pair: "{}"}
	return out.close(j.object(func(key []byte) error {
		said, err := name(key)
		if err != nil {
			return j.fail("%w", err)
		}
		child := n.child(said)
		mark := j.push(said, child != nil)
		defer j.pop(mark)
		// A key may lie in the scanner's buffer only until the value is read, so it is
		// written now, and what begins the value decides.
		c, err := j.next()
		if err != nil {
			return err
		}
		if !stays(child, c) {
			return j.filter(child, io.Discard)
		}
		if err := out.member(key); err != nil {
			return err
		}
		return j.filter(child, to)
	}))
}

func (j *jsonWalk) elements(n *node, to io.Writer) error {
	out := brackets{to: to, pair: "[]"}
	return out.close(j.array(func() error {
		c, err := j.next()
		if err != nil {
			return err
		}
		if !stays(n, c) {
			return j.filter(n, io.Discard)
		}
		if err := out.element(); err != nil {
			return err
		}
		return j.filter(n, to)
	}))
}
