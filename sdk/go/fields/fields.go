// Package fields reduces the answers of a program to the fields that an Authorize answer
// permits, and returns the fields that a write would change, so that the program can ask
// before it writes. Handlers need not remember which fields to leave out: a handler builds
// the whole answer, and the filter removes the rest.
//
// Only permitted fields pass. A field that is in no catalogue is removed and counted, so that
// a new column is visible in a metric before it is visible to a customer.
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
	maxUnknown     = 20  // different paths in a Dropped
	maxPathBytes   = 256 // of one path, the limit of the service
	maxPathsListed = 1000
)

// Filter keeps the fields that one Authorize answer permits. It never changes, and may be
// used by several goroutines at once. The zero value permits nothing.
type Filter struct{ root node }

// node is one path of the answer, or a path above others.
type node struct {
	kids   map[string]*node // by the next segment of the path
	denied bool             // nothing here or below is kept
	whole  bool             // everything is kept, except denied paths among the kids
	some   bool             // a path below is kept
}

// Nodes for paths without a node of their own. They are never changed.
var (
	wholeNode  = &node{whole: true}
	deniedNode = &node{denied: true}
)

// New makes the filter of an answer from its lists of permitted and denied paths. A path in
// neither list is dropped as unknown; the denied list serves to count dropped values as
// denied or unknown. A path in both lists is denied, and so is everything below it. Paths
// below a permitted path are permitted, unless they are denied. A permitted path with an
// empty segment is ignored.
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

// top returns the node of the document. The document has no path that could be denied, so it
// stays, perhaps as an empty object.
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

// settle passes permits and denials down to the nodes below, so that a walk need not know the
// nodes above.
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
			delete(n.kids, name) // it has the same meaning as n
		}
	}
}

// child returns the node of a member, nil if the member is in neither list.
func (n *node) child(name string) *node {
	if kid := n.kids[name]; kid != nil {
		return kid
	}
	if n.whole {
		return wholeNode
	}
	return nil
}

// all says that any value here is kept unchanged.
func (n *node) all() bool { return n.whole && len(n.kids) == 0 }

// keeps says that an object or a list here stays, perhaps reduced.
func (n *node) keeps() bool { return n.whole || n.some }

// Dropped says what a filter removed. Both counts are zero exactly if nothing was removed.
type Dropped struct {
	// Denied counts values at denied paths, and values with nothing but denied paths below.
	Denied int
	// Unknown counts values at paths that are in neither list: fields that are in no
	// catalogue, or a plain value where the catalogue has an object.
	Unknown int
	// UnknownPaths are the first 20 different paths of unknown values, sorted, each cut to
	// 256 bytes. A name that could be misread, such as one with a dot, is in quotes; "." is
	// the document itself. Names are from the data: keys of a map may be personal data.
	UnknownPaths []string
}

// tally counts the values that one walk drops, and has the path of the walk.
type tally struct {
	Dropped
	path []byte
}

func (t *tally) total() int { return t.Denied + t.Unknown }

// push appends a member to the path. pop with the returned mark removes it again.
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

// scalar says whether a plain value is kept. If n has kids, the catalogue has an object here,
// so a plain value is unknown.
func (t *tally) scalar(n *node) bool { return n.whole || t.unknown() }

// null says whether a null is kept. Instead of an object it reveals no more than that the
// object is missing, as the missing permitted fields would.
func (t *tally) null(n *node) bool { return n.keeps() || t.deny() }

// settled says whether an object or a list is kept after its walk. A dropped one is counted by
// the values in it. If none of them was counted since before, it counts itself.
func (t *tally) settled(n *node, before int) bool {
	if n.keeps() {
		return true
	}
	if t.total() == before {
		t.deny()
	}
	return false
}

// known says whether a value is kept, if the node alone shows that. Otherwise ok is false.
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

// plain says that a name cannot be misread as a part of a path.
func plain(name string) bool {
	if name == "" || len(name) > maxPathBytes || !utf8.ValidString(name) {
		return false
	}
	return !strings.ContainsFunc(name, func(r rune) bool {
		return r == '.' || r == '"' || r == '\\' || !unicode.IsPrint(r)
	})
}

// cut shortens a text to maxPathBytes, between two characters.
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
