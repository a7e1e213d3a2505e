package store_test

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"testing"

	"golang.org/x/mod/sumdb/tlog"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// note is the text of a checkpoint with an invalid signature.
func checkpointNote(c auditlog.Checkpoint) []byte {
	return fmt.Appendf(nil, "%s\n%d\n%s\n\n— x AAAAAA==\n", c.Origin, c.Size, c.Root)
}

// The login of a server can store only tiles that follow from the batches.
func TestTreeIsThatOfTheBatches(t *testing.T) {
	url := storetest.New(t)
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(storetest.Login(t, url, serving...)), MaxConns: 4})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	w := db.NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(w.Close)
	// grow appends batches, and returns the tiles and the checkpoint that follow from
	// them.
	size := int64(0)
	grow := func(n int) ([]auditlog.TileData, store.Checkpoint) {
		t.Helper()
		for range n {
			if _, err := w.Append(t.Context(), nil, nil); err != nil {
				t.Fatal(err)
			}
		}
		batches, err := db.Batches(t.Context(), size, n)
		if err != nil || len(batches) != n {
			t.Fatalf("%d batches, %v", len(batches), err)
		}
		leaves := make([]tlog.Hash, n)
		for i, b := range batches {
			leaves[i] = auditlog.Hash(b.Header)
		}
		root, tiles, err := auditlog.Grow(size, leaves, db.Tiles(t.Context()))
		if err != nil {
			t.Fatal(err)
		}
		size += int64(n)
		c := auditlog.Checkpoint{Origin: "test", Size: size, Root: root}
		return tiles, store.Checkpoint{Origin: c.Origin, Size: c.Size, Note: checkpointNote(c)}
	}
	for _, n := range []int{1, 2, 250, 3, 1, 300, 256, 0} {
		if n == 0 {
			break
		}
		tiles, c := grow(n)
		if err := db.SaveTree(t.Context(), tiles, c); err != nil {
			t.Fatalf("at %d batches: %v", size, err)
		}
	}
	levels, err := db.TileLevels(t.Context())
	if want := []store.TileLevel{{Level: 0, Last: 3}, {Level: 1}}; err != nil || !slices.Equal(levels, want) {
		t.Errorf("%v, want %v, %v", levels, want, err)
	}
	// A second identical call, as after a lost reply, changes nothing.
	tiles, c := grow(300)
	for range 2 {
		if err := db.SaveTree(t.Context(), tiles, c); err != nil {
			t.Fatal(err)
		}
	}

	stored, err := db.ReadTiles(t.Context(), []auditlog.TileID{{Tile: 0}, {Level: 1}})
	if err != nil || len(stored) != 2 {
		t.Fatalf("%d tiles, %v", len(stored), err)
	}
	tiles, c = grow(200)
	refused := func(says string, tiles []auditlog.TileData, c store.Checkpoint) {
		t.Helper()
		if err := db.SaveTree(context.Background(), tiles, c); state(err) != "XX001" { // data_corrupted
			t.Errorf("%s: %v", says, err)
		}
	}
	tile := func(level int, number int64, hashes []byte) []auditlog.TileData {
		return []auditlog.TileData{{TileID: auditlog.TileID{Level: level, Tile: number}, Hashes: hashes}}
	}
	other := bytes.Repeat([]byte{7}, tlog.HashSize)
	refused("a hash of another header", tile(0, size>>8, append(bytes.Clone(tiles[0].Hashes[:len(tiles[0].Hashes)-32]), other...)), c)
	refused("a tile that is stored has other hashes", tile(0, 0, bytes.Repeat(other, 256)), c)
	refused("a tile changes", tile(1, 0, append(bytes.Clone(other), stored[auditlog.TileID{Level: 1}][32:]...)), c)
	refused("a hash that is not the root of the tile below", tile(1, 0, append(bytes.Clone(stored[auditlog.TileID{Level: 1}]), other...)), c)
	refused("a tile beyond the log", tile(0, 1000, other), c)
	refused("a tile of a level that is none", tile(-1, 0, other), c)
	refused("half a hash", tile(0, 1000, other[:16]), c)
	refused("no hash", tile(0, 1000, nil), c)
	refused("a tile too wide", tile(0, size>>8, bytes.Repeat(other, 257)), c)
	refused("a size beyond the log", nil, store.Checkpoint{Origin: "test", Size: size + 1, Note: checkpointNote(auditlog.Checkpoint{Origin: "test", Size: size + 1})})
	refused("a size of nothing", nil, store.Checkpoint{Origin: "test", Note: checkpointNote(auditlog.Checkpoint{Origin: "test"})})
	refused("a note of another size", nil, store.Checkpoint{Origin: "test", Size: 3, Note: c.Note})
	refused("a note of another origin", nil, store.Checkpoint{Origin: "other", Size: size, Note: c.Note})
	refused("no note", nil, store.Checkpoint{Origin: "test", Size: 3})
	refused("an origin of several lines", nil, store.Checkpoint{Origin: "test\n3", Size: 3, Note: []byte("test\n3\n3\n")})
	if err := db.SaveTree(t.Context(), tiles, c); err != nil {
		t.Error(err)
	}
}
