package fields

import (
	"bytes"
	"fmt"
	"io"
	"strings"
)

// maxPatchBytes bounds a patch, which has to be in memory.
const maxPatchBytes = 1 << 20

// MergePatch returns the paths that a JSON merge patch (RFC 7396) changes, sorted, each once.
// It returns none if the patch changes nothing. A null removes its path. An empty object or a
// list replaces the value of its path as a whole. Such a path may be above others of the
// catalogue. Then the service denies the write, because it could remove members that are in no
// catalogue: use Changed.
//
// MergePatch does not know the document that the patch is applied to. If the document has a
// list or a plain value where the patch has an object, the patch replaces the whole value.
// Use Changed if that matters.
//
// It fails if doc is not one JSON object, has more than 1 MiB, is nested deeper than 100, or
// has a key that is empty or contains a dot, which could be mistaken for a path. It also
// fails on more than 1000 paths, or on a path of more than 256 bytes.
func MergePatch(doc []byte) ([]string, error) {
	p, err := newPatch(doc)
	if err != nil {
		return nil, err
	}
	if kind, err := p.peek(); err != nil {
		return nil, err
	} else if kind != '{' {
		return nil, p.fail("a merge patch that is not an object replaces everything")
	}
	if err := p.merge(""); err != nil {
		return nil, err
	}
	if err := p.end(); err != nil {
		return nil, err
	}
	return p.paths.sorted(), nil
}

type patch struct {
	*tokens
	paths pathSet
}

func newPatch(doc []byte) (*patch, error) {
	if len(doc) > maxPatchBytes {
		return nil, fmt.Errorf("fields: a patch of more than %d bytes", maxPatchBytes)
	}
	return &patch{newTokens(io.Discard, bytes.NewReader(doc)), pathSet{}}, nil
}

func (p *patch) merge(path string) error {
	empty := true
	err := p.list('{', false, func() error {
		empty = false
		_, key, err := p.text()
		if err != nil {
			return err
		}
		below, err := join(path, key)
		if err != nil {
			return err
		}
		kind, err := p.peek()
		if err != nil {
			return err
		}
		if kind == '{' {
			return p.merge(below)
		}
		if err := p.paths.add(below); err != nil {
			return err
		}
		return p.inside(below, p.paths)
	})
	if err == nil && empty && path != "" {
		err = p.paths.add(path)
	}
	return err
}

// inside reads a value that replaces a path as a whole, and adds the paths of all members in
// it: a member that is in no catalogue would be written with the rest.
func (p *patch) inside(path string, into pathSet) error {
	kind, err := p.peek()
	switch {
	case err != nil:
		return err
	case kind == '[':
		return p.list('[', false, func() error { return p.inside(path, into) })
	case kind != '{':
		return p.value(false)
	}
	return p.list('{', false, func() error {
		_, key, err := p.text()
		if err != nil {
			return err
		}
		below, err := join(path, key)
		if err != nil {
			return err
		}
		if err := into.add(below); err != nil {
			return err
		}
		return p.inside(below, into)
	})
}

// operations are the operations of RFC 6902, each with its members besides "op".
var operations = map[string][]string{
	"add":     {"path", "value"},
	"remove":  {"path"},
	"replace": {"path", "value"},
	"move":    {"path", "from"},
	"copy":    {"path", "from"},
	"test":    {"path", "value"},
}

// JSONPatch returns the paths that a JSON patch (RFC 6902) changes or reads, sorted, each
// once. Paths that "copy" and "test" read are included: a copy shows the value, and the
// success of a test reveals it. For a value that is an object or contains objects, the paths
// of all its members are included. Indices of lists and "-" are left out of paths
// ("/items/3/price" is "items.price"), and so are keys that look like an index.
//
// It fails if doc is not a JSON list of operations, or if an operation is unknown or has
// members that are unknown, missing, duplicate or of a wrong type, because another reader
// might accept them. It fails on a path that is the whole document or begins with an index,
// on a segment that is empty or contains a dot, and on the limits of MergePatch.
func JSONPatch(doc []byte) ([]string, error) {
	p, err := newPatch(doc)
	if err != nil {
		return nil, err
	}
	if err := p.list('[', false, p.operation); err != nil {
		return nil, err
	}
	if err := p.end(); err != nil {
		return nil, err
	}
	return p.paths.sorted(), nil
}

func (p *patch) operation() error {
	texts := map[string]string{} // the members; that of "value" is empty
	within := pathSet{}          // the paths in "value"
	err := p.list('{', false, func() error {
		_, member, err := p.text()
		if err != nil {
			return err
		}
		if _, twice := texts[member]; twice {
			return p.fail("%.60q twice in an operation", member)
		}
		texts[member] = ""
		if member == "value" {
			return p.inside("", within)
		}
		if kind, err := p.peek(); err != nil {
			return err
		} else if kind != '"' {
			return p.fail("%.60q in an operation is not a string", member)
		}
		_, texts[member], err = p.text()
		return err
	})
	if err != nil {
		return err
	}
	op := texts["op"]
	wanted, ok := operations[op]
	if !ok {
		return p.fail("unknown operation %.60q", op)
	}
	for _, member := range wanted {
		if _, ok := texts[member]; !ok {
			return p.fail("operation %q without %q", op, member)
		}
	}
	for member, text := range texts {
		switch member {
		case "op", "value":
		case "path", "from":
			path, err := pointed(text)
			if err != nil {
				return err
			}
			if err := p.paths.add(path); err != nil {
				return err
			}
			if member == "from" {
				continue
			}
			for below := range within {
				if err := p.paths.add(path + "." + below); err != nil {
					return err
				}
			}
		default:
			return p.fail("unknown member %.60q of an operation", member)
		}
	}
	if len(texts) != len(wanted)+1 {
		return p.fail("operation %q has a member too many", op)
	}
	return nil
}

// pointed turns a JSON pointer (RFC 6901) into a path.
func pointed(pointer string) (string, error) {
	if pointer != "" && pointer[0] != '/' {
		return "", fmt.Errorf("fields: %.60q is not a JSON pointer", pointer)
	}
	path := ""
	segments := strings.Split(pointer, "/")[1:]
	if len(segments) > maxDepth {
		return "", fmt.Errorf("fields: %.60q... is deeper than %d", pointer, maxDepth)
	}
	for i, s := range segments {
		if isIndex(s) && i > 0 {
			continue
		} else if isIndex(s) {
			return "", fmt.Errorf("fields: %.60q begins with an index: a patch is of one object", pointer)
		}
		if rest := strings.NewReplacer("~0", "", "~1", "").Replace(s); strings.Contains(rest, "~") {
			return "", fmt.Errorf("fields: %.60q is not a JSON pointer: %q is neither ~0 nor ~1", pointer, "~")
		}
		var err error
		if path, err = join(path, strings.NewReplacer("~0", "~", "~1", "/").Replace(s)); err != nil {
			return "", err
		}
	}
	if path == "" {
		return "", fmt.Errorf("fields: %.60q is the whole document: name the fields", pointer)
	}
	return path, nil
}

// isIndex says whether a segment can name an element of a list, or the end of a list.
func isIndex(s string) bool {
	return s == "-" || s == "0" || s != "" && s[0] != '0' && strings.Trim(s, "0123456789") == ""
}
