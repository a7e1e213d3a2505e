package auditlog

import (
	"fmt"

	"golang.org/x/mod/sumdb/tlog"
)

// TileHeight is the height of tiles in C2SP tlog-tiles: a full tile has 256 hashes.
const TileHeight = 8

// TileID names a tile by its level and its index in the level.
type TileID struct {
	Level int
	Tile  int64
}

// Tiles returns the bytes of tiles, in the order of ids. A partial tile may be wider than its
// caller needs.
type Tiles func(ids []TileID) ([][]byte, error)

// ReadHashes implements tlog.HashReader.
func (read Tiles) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	tiles := make([]tlog.Tile, len(indexes))
	var ids []TileID
	place := map[TileID]int{}
	for i, index := range indexes {
		tiles[i] = tlog.TileForIndex(TileHeight, index)
		id := idOf(tiles[i])
		if _, ok := place[id]; !ok {
			place[id] = len(ids)
			ids = append(ids, id)
		}
	}
	data, err := read(ids)
	if err != nil {
		return nil, err
	}
	hashes := make([]tlog.Hash, len(indexes))
	for i, t := range tiles {
		bytes := data[place[idOf(t)]]
		if len(bytes) < t.W*tlog.HashSize {
			return nil, fmt.Errorf("tile %d of level %d is too short", t.N, t.L)
		}
		if hashes[i], err = tlog.HashFromTile(t, bytes[:t.W*tlog.HashSize], indexes[i]); err != nil {
			return nil, err
		}
	}
	return hashes, nil
}

func idOf(t tlog.Tile) TileID { return TileID{t.L, t.N} }

// TileData is a tile with its hashes.
type TileData struct {
	TileID
	Hashes []byte
}

// Grow adds leaves to a tree with size leaves. It returns the new root, and the tiles that are new
// or wider than before. read reads the tiles of the old tree.
func Grow(size int64, leaves []tlog.Hash, read Tiles) (root tlog.Hash, tiles []TileData, err error) {
	grown := map[int64]tlog.Hash{}
	both := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		hashes := make([]tlog.Hash, len(indexes))
		var old []int64
		for i, index := range indexes {
			if h, ok := grown[index]; ok {
				hashes[i] = h
			} else {
				old = append(old, index)
			}
		}
		if len(old) == 0 {
			return hashes, nil
		}
		stored, err := read.ReadHashes(old)
		if err != nil {
			return nil, err
		}
		for i, index := range indexes {
			if _, ok := grown[index]; !ok {
				hashes[i], stored = stored[0], stored[1:]
			}
		}
		return hashes, nil
	})
	next := tlog.StoredHashCount(size)
	for i, leaf := range leaves {
		more, err := tlog.StoredHashesForRecordHash(size+int64(i), leaf, both)
		if err != nil {
			return root, nil, err
		}
		for _, h := range more {
			grown[next] = h
			next++
		}
	}
	after := size + int64(len(leaves))
	if root, err = tlog.TreeHash(after, both); err != nil {
		return root, nil, err
	}
	for _, t := range tlog.NewTiles(TileHeight, size, after) {
		data, err := tlog.ReadTileData(t, both)
		if err != nil {
			return root, nil, err
		}
		tiles = append(tiles, TileData{idOf(t), data})
	}
	return root, tiles, nil
}
