package auditlog

import "golang.org/x/mod/sumdb/tlog"

// RootBuilder computes [Root] leaf by leaf, in memory that grows with the logarithm of their
// number. The zero value has no leaves.
type RootBuilder struct {
	size int64
	// whole are the roots of the complete subtrees, the largest first: one for each bit that
	// is set in size.
	whole []tlog.Hash
}

// NewRootBuilder returns a builder that has the first size leaves already. It reads their hashes
// from a stored tree.
func NewRootBuilder(size int64, tree tlog.HashReader) (*RootBuilder, error) {
	var indexes []int64
	for level, from := 62, int64(0); level >= 0; level-- {
		if size&(1<<level) != 0 {
			indexes = append(indexes, tlog.StoredHashIndex(level, from>>level))
			from += 1 << level
		}
	}
	if len(indexes) == 0 {
		return &RootBuilder{}, nil
	}
	whole, err := tree.ReadHashes(indexes)
	return &RootBuilder{size, whole}, err
}

// Add adds the hash of the next leaf.
func (b *RootBuilder) Add(leaf tlog.Hash) {
	for n := b.size; n&1 == 1; n >>= 1 {
		last := len(b.whole) - 1
		leaf, b.whole = tlog.NodeHash(b.whole[last], leaf), b.whole[:last]
	}
	b.whole = append(b.whole, leaf)
	b.size++
}

// Root returns the root of the tree over the leaves added so far.
func (b *RootBuilder) Root() tlog.Hash {
	if len(b.whole) == 0 {
		return emptyRoot
	}
	root := b.whole[len(b.whole)-1]
	for i := len(b.whole) - 2; i >= 0; i-- {
		root = tlog.NodeHash(b.whole[i], root)
	}
	return root
}
