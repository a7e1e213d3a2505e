// Package fields keeps a service's answers down to the fields that an Authorize
// answer permits, and says which fields a write would change, so that the service
// can ask before it writes. Deciding is of no use if every handler then has to
// remember which columns to leave out: a handler builds the whole answer, and the
// filter removes the rest.
//
// Nothing passes that is not permitted. A field that nobody catalogued is dropped
// too, and counted, so that a new column shows in a metric before it shows to a
// customer.
package fields

import (
	"slices"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

const (
	maxDepth       = 100 // nesting of documents
	maxUnknown     = 20  // distinct paths that a Dropped lists
	maxPathBytes   = 256 // of one path, as the service has it
	maxPathsListed = 1000
)

// Filter keeps what one Authorize answer permits. It never changes, and may be used
// by several goroutines at once. The zero value permits nothing.
type Filter struct{ root node }

// node is one path of the answer, or a path above some. Its kids are by the next
// segment.
type node struct {
	kids   map[string]*node
	denied bool // nothing here or below is kept
	whole  bool // all is kept, but for denied paths among the kids
	some   bool // a path below is kept
}

// Nodes for paths that have none of their own. They are never changed.
var (
	wholeNode  = &node{whole: true}
	deniedNode = &node{denied: true}
)

// New makes the filter of an answer, from its lists of permitted and denied paths.
// What stands in neither is dropped; the denied list only tells what was refused
// from what nobody knows. A path in both is denied, and so is all below it. Paths
// below a permitted one are permitted, unless they are denied. A permitted path with
// an empty segment is ignored.
func New(permitted, denied []string) *Filter {
	f := &Filter{}
	for _, path := range permitted {
		if segments := strings.Split(path, "."); !slices.Contains(segments, "") {
			f.root.put(segments).whole = true
		}
	}
	for _, path := range denied {
		f.root.put(strings.Split(path, ".")).denied = true
	}
	f.root.settle(false)
	return f
}

// top is the node of the document. It has no path that could be denied, so it stays,
// if only as an empty object.
func (f *Filter) top() *node { return &node{kids: f.root.kids, some: true} }

func (n *node) put(segments []string) *node {
	for _, s := range segments {
		if n.kids == nil {
			n.kids = map[string]*node{}
		}
		if n.kids[s] == nil {
			n.kids[s] = &node{}
		}
		n = n.kids[s]
	}
	return n
}

// settle passes permits and denials down, so that a walk need not remember what it
// saw above.
func (n *node) settle(whole bool) {
	if n.denied {
		n.whole = false
		return
	}
	n.whole = n.whole || whole
	for name, kid := range n.kids {
		kid.settle(n.whole)
		n.some = n.some || kid.keeps()
		if n.whole && kid.all() {
			delete(n.kids, name) // says nothing that n does not
		}
	}
}

// child is the node of a member called name, nil if nobody knows it.
func (n *node) child(name string) *node {
	if kid := n.kids[name]; kid != nil {
		return kid
	}
	if n.whole {
		return wholeNode
	}
	return nil
}

// all says that the value here is kept as it is, whatever it is.
func (n *node) all() bool { return n.whole && len(n.kids) == 0 }

// keeps says that an object or a list here stays, though perhaps with less in it.
func (n *node) keeps() bool { return n.whole || n.some }

// Dropped says what a filter removed. Both counts are zero exactly if nothing was
// removed.
type Dropped struct {
	// Denied counts values at paths that were refused, or above such paths only.
	Denied int
	// Unknown counts values at paths that are in neither list: fields that nobody
	// catalogued, or a plain value where the catalogue has an object.
	Unknown int
	// UnknownPaths are the first 20 different paths of unknown values, sorted, each
	// cut to 256 bytes. A name that could be misread, such as one with a dot, is in
	// quotes; "." is the document itself. Names come from the data: where they are
	// keys of a map they may be personal themselves.
	UnknownPaths []string
}

// tally counts what is dropped during one walk, and knows where the walk is.
type tally struct {
	Dropped
	path []byte
}

func (t *tally) total() int { return t.Denied + t.Unknown }

// push goes down to a member; what it returns brings pop back up.
func (t *tally) push(name string, known bool) (mark int) {
	mark = len(t.path)
	if mark > 0 {
		t.path = append(t.path, '.')
	}
	if known || plain(name) {
		t.path = append(t.path, name...)
	} else {
		t.path = strconv.AppendQuote(t.path, cut(name))
	}
	return mark
}

func (t *tally) pop(mark int) { t.path = t.path[:mark] }

func (t *tally) deny() bool {
	t.Denied++
	return false
}

func (t *tally) unknown() bool {
	t.Unknown++
	path := t.path
	if len(path) == 0 {
		path = []byte{'.'}
	}
	path = path[:len(cut(path))]
	if len(t.UnknownPaths) < maxUnknown &&
		!slices.ContainsFunc(t.UnknownPaths, func(p string) bool { return p == string(path) }) {
		t.UnknownPaths = append(t.UnknownPaths, string(path))
	}
	return false
}

// scalar judges a value that has nothing below it. The catalogue has an object where
// n has kids; a plain value there is something that it does not know.
func (t *tally) scalar(n *node) bool { return n.whole || t.unknown() }

// null judges a null. In place of an object it says that there is none, which the
// permitted fields that are not there would say too.
func (t *tally) null(n *node) bool { return n.keeps() || t.deny() }

// settled judges what was walked through since the count was at before. An object or
// list that goes is counted by what is in it, and by itself if that is nothing.
func (t *tally) settled(n *node, before int) bool {
	if n.keeps() {
		return true
	}
	if t.total() == before {
		t.deny()
	}
	return false
}

// known judges by the node alone, if that is enough.
func (t *tally) known(n *node) (keep, ok bool) {
	switch {
	case n == nil:
		return t.unknown(), true
	case n.denied:
		return t.deny(), true
	}
	return true, n.all()
}

func (t *tally) result() Dropped {
	slices.Sort(t.UnknownPaths)
	return t.Dropped
}

// plain says that a name cannot be misread when it stands in a path.
func plain(name string) bool {
	if name == "" || len(name) > maxPathBytes || !utf8.ValidString(name) {
		return false
	}
	return !strings.ContainsFunc(name, func(r rune) bool {
		return r == '.' || r == '"' || r == '\\' || !unicode.IsPrint(r)
	})
}

// cut shortens to what a path may have, between characters.
func cut[T string | []byte](s T) T {
	if len(s) <= maxPathBytes {
		return s
	}
	end := maxPathBytes
	for end > 0 && !utf8.RuneStart(s[end]) {
		end--
	}
	return s[:end]
}
