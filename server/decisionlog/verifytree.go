package decisionlog

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/store"
)

// treeCheck is the tree as computed from the headers. Checkpoints and the stored tiles are
// compared with it.
type treeCheck struct {
	size   int64                      // leaves so far
	signed int64                      // size of the newest checkpoint: all tiles up to it must be stored
	tiles  map[auditlog.TileID][]byte // computed tiles; of level 0 only those of the last chunk
	stored auditlog.Tiles             // reads stored tiles, for leaves before the first one
	broken bool                       // a leaf is not known, so no root after it can be computed

	pages     []store.Checkpoint    // checkpoints of the database that are not compared yet, by size
	after     store.Checkpoint      // the last one that was read
	all       bool                  // all were read
	found     int64                 // how many the database has
	kept      []auditlog.Checkpoint // kept checkpoints that are not compared yet, by size
	keptNotes map[auditlog.Checkpoint][]byte
	gone      []goneCheckpoint
	faults    map[string]*checkpointFault // by place and text
}

// goneCheckpoint is a kept checkpoint that does not match the log. Whether a statement of
// truncation excuses it is known only when the whole log is read.
type goneCheckpoint struct {
	auditlog.Checkpoint
	what string
}

// checkpointFault is one fault of several checkpoints. One altered leaf changes all later
// roots, so checkpoints with the same fault are reported together.
type checkpointFault struct {
	first int64 // size
	what  string
	more  int
}

// read returns tiles: the computed ones, and stored ones for leaves before the first one.
func (t *treeCheck) read(ids []auditlog.TileID) ([][]byte, error) {
	out := make([][]byte, len(ids))
	for i, id := range ids {
		if out[i] = t.tiles[id]; out[i] != nil {
			continue
		}
		stored, err := t.stored([]auditlog.TileID{id})
		if err != nil {
			return nil, err
		}
		out[i] = stored[0]
	}
	return out, nil
}

// startTree starts the tree at a leaf. The stored tree before it is not verified by itself, but
// the roots of later checkpoints depend on it.
func (v *verification) startTree(start, signed int64) {
	v.tree = treeCheck{
		size: start, signed: signed, tiles: map[auditlog.TileID][]byte{}, keptNotes: map[auditlog.Checkpoint][]byte{},
		faults: map[string]*checkpointFault{}, after: store.Checkpoint{Size: math.MinInt64},
	}
	for _, file := range v.v.Against {
		for _, signed := range file {
			v.readKept(signed)
		}
	}
	slices.SortStableFunc(v.tree.kept, func(a, b auditlog.Checkpoint) int { return cmp.Compare(a.Size, b.Size) })
}

// readKept reads a note that was kept outside of the database. The order of notes and the file
// of a note do not matter.
func (v *verification) readKept(signed []byte) {
	if auditlog.IsTruncation(signed) {
		v.statement(signed, true, "a statement of truncation that was kept elsewhere does not count: %s")
		return
	}
	c, err := auditlog.PeekCheckpoint(signed)
	if err != nil {
		v.fault(-1, -1, "a checkpoint to compare with cannot be read")
		return
	}
	if _, err := auditlog.OpenCheckpoint(signed, v.v.Keys...); err == nil || len(v.v.Keys) == 0 {
		s := v.truncationsOf(c.Origin)
		s.kept = max(s.kept, c.Epoch)
	}
	if v.tree.keptNotes[c] == nil {
		v.tree.kept = append(v.tree.kept, c)
	}
	v.tree.keptNotes[c] = signed
}

// growTree adds the batches of a chunk to the tree. It compares the changed tiles with the
// stored ones, and the tree with all checkpoints up to its new size.
func (v *verification) growTree(ctx context.Context, from, to int64, batches []store.Batch) error {
	t := &v.tree
	if t.stored == nil {
		t.stored = v.db.Tiles(ctx)
	}
	leaves := make([]tlog.Hash, 0, to-from)
	for _, b := range batches {
		for int64(len(leaves)) < b.Leaf-from {
			if err := v.missing(ctx, from+int64(len(leaves)), &leaves); err != nil {
				return err
			}
		}
		leaves = append(leaves, auditlog.Hash(b.Header))
	}
	for int64(len(leaves)) < to-from {
		if err := v.missing(ctx, from+int64(len(leaves)), &leaves); err != nil {
			return err
		}
	}
	if t.broken {
		return nil
	}
	_, tiles, err := auditlog.Grow(t.size, leaves, t.read)
	if errors.Is(err, store.ErrNotFound) {
		v.fault(from, -1, "the tree of the batches before is not whole: %v", err)
		t.broken = true
		return nil
	}
	if err != nil {
		return err
	}
	for _, tile := range tiles {
		t.tiles[tile.TileID] = tile.Hashes
	}
	t.size = to
	if err := v.compareTiles(ctx, tiles); err != nil {
		return err
	}
	if err := v.checkpoints(ctx, to); err != nil {
		return err
	}
	maps.DeleteFunc(t.tiles, func(id auditlog.TileID, _ []byte) bool {
		return id.Level == 0 && (id.Tile+1)<<auditlog.TileHeight <= t.size
	})
	return nil
}

// missing adds the fault that a batch is missing, and takes its leaf from the stored tree, so
// that later batches can be verified.
func (v *verification) missing(ctx context.Context, leaf int64, leaves *[]tlog.Hash) error {
	v.fault(leaf, -1, "is missing")
	id := auditlog.TileID{Tile: leaf >> auditlog.TileHeight}
	stored, err := v.db.ReadTiles(ctx, []auditlog.TileID{id})
	if err != nil {
		return err
	}
	var hash tlog.Hash
	at := int(leaf%(1<<auditlog.TileHeight)) * tlog.HashSize
	if tile := stored[id]; len(tile) >= at+tlog.HashSize {
		hash = tlog.Hash(tile[at : at+tlog.HashSize])
	} else {
		v.tree.broken = true
	}
	*leaves = append(*leaves, hash)
	return nil
}

// compareTiles compares computed tiles with stored ones. Hashes that a checkpoint covers must
// be stored. Later ones are compared if they are stored.
func (v *verification) compareTiles(ctx context.Context, tiles []auditlog.TileData) error {
	ids := make([]auditlog.TileID, len(tiles))
	for i, tile := range tiles {
		ids[i] = tile.TileID
	}
	stored, err := v.db.ReadTiles(ctx, ids)
	if err != nil {
		return err
	}
	for _, tile := range tiles {
		got := stored[tile.TileID]
		shift := auditlog.TileHeight * tile.Level
		need := min(max((v.tree.signed>>shift)-tile.Tile<<auditlog.TileHeight, 0)*tlog.HashSize, int64(len(tile.Hashes)))
		n := min(len(got), len(tile.Hashes)) // the log may have grown
		for at := 0; at < n; at += tlog.HashSize {
			if end := min(at+tlog.HashSize, n); !bytes.Equal(got[at:end], tile.Hashes[at:end]) {
				leaf := (tile.Tile<<auditlog.TileHeight + int64(at/tlog.HashSize)) << shift
				v.fault(leaf, -1, "the stored tree does not match the batches: tile %d of level %d has a wrong hash for the subtree that begins here", tile.Tile, tile.Level)
				break
			}
		}
		if full := len(tile.Hashes) == tlog.HashSize<<auditlog.TileHeight; len(got)%tlog.HashSize != 0 || full && len(got) > len(tile.Hashes) {
			v.fault(-1, -1, "the stored tree has more in tile %d of level %d than hashes of batches", tile.Tile, tile.Level)
		}
		if int64(n) < need {
			leaf := (tile.Tile<<auditlog.TileHeight + int64(n/tlog.HashSize)) << shift
			v.fault(leaf, -1, "the stored tree is incomplete: tile %d of level %d lacks the hash of the subtree that begins here", tile.Tile, tile.Level)
		}
	}
	return nil
}

const checkpointPage = 1000

const (
	keptElsewhere = "kept elsewhere"
	anotherRoot   = "it is not of the same log: the tree has another root"
)

// checkpoints compares the tree with the checkpoints up to a size, those in the database and
// those that were kept elsewhere.
func (v *verification) checkpoints(ctx context.Context, to int64) error {
	t := &v.tree
	if t.stored == nil {
		t.stored = v.db.Tiles(ctx)
	}
	for len(t.kept) > 0 && t.kept[0].Size <= to {
		c := t.kept[0]
		t.kept = t.kept[1:]
		if err := v.checkpoint(store.Checkpoint{Origin: c.Origin, Size: c.Size, Note: t.keptNotes[c]}, keptElsewhere); err != nil {
			return err
		}
	}
	for {
		if len(t.pages) == 0 && !t.all {
			page, err := v.db.Checkpoints(ctx, t.after, checkpointPage)
			if err != nil {
				return err
			}
			t.all = len(page) < checkpointPage
			if len(page) > 0 {
				t.after = page[len(page)-1]
			}
			t.pages = page
		}
		if len(t.pages) == 0 || t.pages[0].Size > to {
			return nil
		}
		c := t.pages[0]
		t.pages = t.pages[1:]
		t.found++
		if err := v.checkpoint(c, "in the database"); err != nil {
			return err
		}
	}
}

// checkpoint compares one checkpoint with the tree.
func (v *verification) checkpoint(stored store.Checkpoint, where string) error {
	c, err := auditlog.PeekCheckpoint(stored.Note)
	if err == nil && len(v.v.Keys) > 0 {
		c, err = auditlog.OpenCheckpoint(stored.Note, v.v.Keys...)
	}
	switch {
	case errors.Is(err, auditlog.ErrUnsigned):
		v.badCheckpoint(stored, where, fmt.Sprintf("none of the given verifier keys signed it: it is signed with %s; if that is an earlier key of this log, its verifier key is missing",
			strings.Join(auditlog.Signers(stored.Note), " and ")))
		return nil
	case err != nil:
		v.badCheckpoint(stored, where, err.Error())
		return nil
	case c.Origin != stored.Origin:
		v.badCheckpoint(stored, where, "column origin is not what its text says")
		return nil
	case c.Size != stored.Size:
		v.badCheckpoint(stored, where, "column size is not what its text says")
		return nil
	case v.tree.broken:
		return nil
	}
	if where != keptElsewhere {
		v.sawEpoch(c)
	}
	root, err := tlog.TreeHash(c.Size, auditlog.Tiles(v.tree.read))
	switch {
	case errors.Is(err, store.ErrNotFound):
		v.badCheckpoint(stored, where, "the tree is not whole: "+err.Error())
	case err != nil:
		return err
	case root != c.Root && where == keptElsewhere:
		v.tree.gone = append(v.tree.gone, goneCheckpoint{c, anotherRoot})
	case root != c.Root:
		v.badCheckpoint(stored, where, anotherRoot)
	default:
		v.done.Checkpoints++
	}
	return nil
}

// promise compares the tree with the checkpoint that a statement of truncation goes back to.
func (v *verification) promise(c auditlog.Checkpoint) error {
	if v.tree.broken {
		return nil
	}
	root, err := tlog.TreeHash(c.Size, auditlog.Tiles(v.tree.read))
	if errors.Is(err, store.ErrNotFound) || err == nil && root != c.Root {
		v.badCheckpoint(store.Checkpoint{Size: c.Size}, "in a statement of truncation", anotherRoot)
		return nil
	}
	return err
}

// lost handles the kept checkpoints that do not match the log. Those that no statement of
// truncation excuses are faults. It also checks the checkpoints that the statements go back to.
func (v *verification) lost(end int64) error {
	t := &v.tree
	var cut auditlog.Checkpoint // the largest one after the end of the log
	for _, c := range t.kept {
		if s := v.truncationsOf(c.Origin); s.Excuses(c) {
			v.done.Truncated++
		} else if missing := s.Missing(c); missing != "" {
			v.badCheckpoint(store.Checkpoint{Size: c.Size}, keptElsewhere, "the log was cut off. But "+missing)
		} else {
			cut = c
		}
	}
	if cut.Size > 0 {
		v.fault(end, -1, "is missing, and all later ones: the log was cut off. A checkpoint that was kept elsewhere covers %d batches, the database has %d", cut.Size, end)
	}
	for _, c := range t.gone {
		s := v.truncationsOf(c.Origin)
		if s.Excuses(c.Checkpoint) {
			v.done.Truncated++
			continue
		}
		if missing := s.Missing(c.Checkpoint); missing != "" {
			c.what += ". But " + missing
		}
		v.badCheckpoint(store.Checkpoint{Size: c.Size}, keptElsewhere, c.what)
	}
	for _, origin := range slices.Sorted(maps.Keys(v.stated)) {
		s := v.stated[origin]
		if s.kept > s.inLog {
			v.fault(-1, -1, "the log has gone back: a checkpoint that was kept elsewhere was signed after %d statements of truncation, and the log has nothing that was signed after more than %d", s.kept, s.inLog)
		}
		for _, c := range s.Live() {
			if c.Size > end {
				v.fault(end, -1, "is missing, and all later ones: statement of truncation %d says that %d batches are left, the database has %d", c.Epoch, c.Size, end)
			} else if err := v.promise(c); err != nil {
				return err
			}
		}
	}
	return nil
}

// badCheckpoint adds a fault of a checkpoint.
func (v *verification) badCheckpoint(c store.Checkpoint, where, what string) {
	f := v.tree.faults[where+what]
	if f == nil {
		v.tree.faults[where+what] = &checkpointFault{first: c.Size, what: fmt.Sprintf("the checkpoint of size %d %s: %s", c.Size, where, what)}
		return
	}
	f.more++
}

// endTree runs the checks that need the whole log: that no kept or stored checkpoint is after
// its end, and that no tile is. It then adds the faults of checkpoints.
func (v *verification) endTree(ctx context.Context, end int64) error {
	t := &v.tree
	last, lastErr := v.db.LatestCheckpoint(ctx, "")
	if lastErr != nil && !errors.Is(lastErr, store.ErrNotFound) {
		return lastErr
	}
	levels, err := v.db.TileLevels(ctx)
	if err != nil {
		return err
	}
	now, err := v.db.NextLeaf(ctx) // after the checkpoint and the tiles were read, because the log grows
	if err != nil {
		return err
	}
	if err := v.lost(end); err != nil {
		return err
	}
	switch {
	case lastErr != nil:
		if end > 0 && (t.found > 0 || v.announced || len(v.v.Keys) > 0) {
			v.fault(-1, -1, "the database has no checkpoint: none of the %d batches is signed", end)
		}
	case last.Size > now:
		v.fault(now, -1, "is missing, and all later ones: a checkpoint in the database covers %d batches, the database has %d", last.Size, now)
	}
	for _, f := range slices.SortedFunc(maps.Values(t.faults), func(a, b *checkpointFault) int { return int(a.first - b.first) }) {
		if f.more > 0 {
			f.what += fmt.Sprintf("; %d larger checkpoints have the same fault", f.more)
		}
		v.fault(-1, -1, "%s", f.what)
	}
	for _, l := range levels {
		hashes := now >> min(auditlog.TileHeight*max(l.Level, 0), 62)
		if most := (hashes + 1<<auditlog.TileHeight - 1) >> auditlog.TileHeight; l.Level < 0 || l.First < 0 || l.Last >= most {
			v.fault(-1, -1, "the tree has tiles %d to %d of level %d, and not all of them are above batches of the log", l.First, l.Last, l.Level)
		}
	}
	return nil
}
