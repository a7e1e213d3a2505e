package auditlog_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/auditlog"
)

func leaves(n int) (list []tlog.Hash) {
	for i := range n {
		list = append(list, auditlog.Hash([]byte(fmt.Sprint("leaf ", i))))
	}
	return list
}

// The root is that of the library. Each row is proven for this root, and for no other one.
func TestRows(t *testing.T) {
	for n := range 70 {
		list := leaves(n)
		root := auditlog.Root(list)
		if n == 0 {
			if want, err := tlog.TreeHash(0, nil); err != nil || root != want {
				t.Errorf("the root of nothing is %v, want %v, %v", root, want, err)
			}
			continue
		}
		for i := range n {
			proof, err := auditlog.ProveRow(list, i)
			if err != nil {
				t.Fatal(err)
			}
			if err := tlog.CheckRecord(proof, int64(n), root, int64(i), list[i]); err != nil {
				t.Fatalf("row %d of %d: %v", i, n, err)
			}
			if other := auditlog.Root(leaves(n + 1)); tlog.CheckRecord(proof, int64(n), other, int64(i), list[i]) == nil {
				t.Fatalf("row %d of %d is proven below another root", i, n)
			}
		}
	}
}

// memory stores tiles.
type memory map[auditlog.TileID][]byte

func (m memory) read(ids []auditlog.TileID) (data [][]byte, err error) {
	for _, id := range ids {
		if m[id] == nil {
			return nil, fmt.Errorf("no tile %v", id)
		}
		data = append(data, m[id])
	}
	return data, nil
}

// A tree is the same however it grew, and its tiles prove every leaf and every earlier size.
func TestGrow(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		all := leaves(rapid.IntRange(1, 700).Draw(t, "leaves"))
		tiles := memory{}
		roots := map[int64]tlog.Hash{}
		for size := 0; size < len(all); {
			n := rapid.IntRange(1, len(all)-size).Draw(t, "grown by")
			root, grown, err := auditlog.Grow(int64(size), all[size:size+n], tiles.read)
			if err != nil {
				t.Fatal(err)
			}
			for _, tile := range grown {
				if !bytes.HasPrefix(tile.Hashes, tiles[tile.TileID]) {
					t.Fatalf("tile %v changed", tile.TileID)
				}
				tiles[tile.TileID] = tile.Hashes
			}
			size += n
			roots[int64(size)] = root
			if want := auditlog.Root(all[:size]); root != want {
				t.Fatalf("the root at %d is %v, want %v", size, root, want)
			}
		}
		read := auditlog.Tiles(tiles.read)
		size := int64(len(all))
		i := rapid.Int64Range(0, size-1).Draw(t, "leaf")
		proof, err := tlog.ProveRecord(size, i, read)
		if err != nil || tlog.CheckRecord(proof, size, roots[size], i, all[i]) != nil {
			t.Fatalf("leaf %d: %v", i, err)
		}
		for earlier, root := range roots {
			proof, err := tlog.ProveTree(size, earlier, read)
			if err != nil || tlog.CheckTree(proof, size, roots[size], earlier, root) != nil {
				t.Fatalf("size %d: %v", earlier, err)
			}
		}
	})
}

func drawHeader(t *rapid.T) auditlog.Header {
	id := func(label string) uuid.UUID {
		return uuid.UUID(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, label))
	}
	h := auditlog.Header{
		Version: rapid.IntRange(1, 2).Draw(t, "version"),
		Batch:   id("batch"), Writer: id("writer"), WriterSeq: rapid.Int64().Draw(t, "seq"), Server: rapid.String().Draw(t, "server"),
		Mode: rapid.SampledFrom([]auditlog.Mode{auditlog.Strict, auditlog.Buffered}).Draw(t, "mode"),
		Made: time.UnixMilli(rapid.Int64Range(0, 4e12).Draw(t, "made")).UTC(), Rows: rapid.IntRange(0, 1e6).Draw(t, "rows"),
		Root: tlog.Hash(rapid.SliceOfN(rapid.Byte(), 32, 32).Draw(t, "root")),
	}
	if h.Version > 1 && h.Rows > 0 {
		h.First = time.UnixMilli(rapid.Int64Range(0, 4e12).Draw(t, "first")).UTC()
		h.Last = time.UnixMilli(rapid.Int64Range(0, 4e12).Draw(t, "last")).UTC()
	}
	for range rapid.IntRange(0, 3).Draw(t, "unclean") {
		h.Unclean = append(h.Unclean, auditlog.Unclean{Writer: id("unclean writer"), Lost: rapid.IntRange(0, 1e6).Draw(t, "lost")})
	}
	return h
}

// A header is read as it was written, with any name of a server.
func TestHeader(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		h := drawHeader(t)
		got, err := auditlog.ParseHeader(h.Bytes())
		if err != nil || fmt.Sprintf("%#v", got) != fmt.Sprintf("%#v", h) {
			t.Fatalf("%#v, want %#v, %v", got, h, err)
		}
	})
}

// Two texts are never the same header.
func FuzzParseHeader(f *testing.F) {
	h := auditlog.Header{Batch: uuid.New(), Writer: uuid.New(), Server: "a \"b\"\n", Mode: auditlog.Buffered, Made: time.Unix(1e9, 0)}
	f.Add(h.Bytes())
	h.Unclean = []auditlog.Unclean{{Writer: uuid.New(), Lost: 7}}
	f.Add(h.Bytes())
	h.Rows, h.First, h.Last = 2, time.Unix(1e9, 0), time.Unix(1e9, 1e6)
	f.Add(h.Bytes())
	h.Version = 1
	f.Add(h.Bytes())
	f.Fuzz(func(t *testing.T, text []byte) {
		h, err := auditlog.ParseHeader(text)
		if err == nil && h.Rows < 0 {
			t.Errorf("%q has %d rows", text, h.Rows)
		}
		if err == nil && !bytes.Equal(h.Bytes(), text) {
			t.Errorf("%q is read as %q", text, h.Bytes())
		}
	})
}

func FuzzPeekCheckpoint(f *testing.F) {
	f.Add([]byte("a\n7\n47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=\n\n— a AAAAAA==\n"))
	f.Add([]byte("a\n7\n47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=\ntruncations 3\n\n— a AAAAAA==\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		c, err := auditlog.PeekCheckpoint(text)
		if err == nil && (c.Origin == "" || c.Size < 0 || c.Epoch < 0 || c.Epoch > 0 && !bytes.Contains(text, fmt.Appendf(nil, "\ntruncations %d\n", c.Epoch))) {
			t.Errorf("%q is read as %+v", text, c)
		}
		_ = auditlog.EachCheckpoint(bytes.NewReader(text), func([]byte) error { return nil })
	})
}

func keyFile(t *testing.T, name string) (file string, verifier note.Verifier) {
	t.Helper()
	secret, public, err := note.GenerateKey(rand.Reader, name)
	if err != nil {
		t.Fatal(err)
	}
	file = filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(file, []byte(secret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if verifier, err = note.NewVerifier(public); err != nil {
		t.Fatal(err)
	}
	return file, verifier
}

func TestCheckpoints(t *testing.T) {
	oldFile, oldVerifier := keyFile(t, "example.org/log")
	newFile, newVerifier := keyFile(t, "example.org/log")
	_, stranger := keyFile(t, "example.org/log")
	older, err := auditlog.ReadKey(oldFile)
	if err != nil {
		t.Fatal(err)
	}
	newer, err := auditlog.ReadKey(newFile)
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range []auditlog.Key{older, newer} {
		if v, err := note.NewVerifier(k.Verifier); err != nil || v.KeyHash() != k.KeyHash() {
			t.Errorf("%s does not verify its key: %v", k.Verifier, err)
		}
	}
	c := auditlog.Checkpoint{Origin: "example.org/log", Size: 42, Root: auditlog.Root(leaves(42))}
	// While keys rotate, both sign, and either verifier key is enough.
	signed, err := c.Sign(newer, older)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range []note.Verifier{oldVerifier, newVerifier} {
		if got, err := auditlog.OpenCheckpoint(signed, v); err != nil || got != c {
			t.Errorf("%+v, %v", got, err)
		}
	}
	if _, err := auditlog.OpenCheckpoint(signed, stranger); !errors.Is(err, auditlog.ErrUnsigned) {
		t.Errorf("got %v", err)
	}
	if _, err := auditlog.OpenCheckpoint(bytes.Replace(signed, []byte("\n42\n"), []byte("\n43\n"), 1), oldVerifier); err == nil {
		t.Error("an altered checkpoint is accepted")
	}

	// A file keeps checkpoints. Readers skip one that was cut off while it was written.
	file := filepath.Join(t.TempDir(), "checkpoints")
	if last, err := auditlog.LastCheckpoint(file, c.Origin, all); err != nil || last.Size != 0 {
		t.Errorf("%+v, %v of a file that is not there", last, err)
	}
	bigger := c
	bigger.Size = 50
	for _, c := range []auditlog.Checkpoint{c, bigger, {Origin: "another", Size: 99}} {
		signed, err := c.Sign(newer)
		if c.Origin == "another" {
			signed, err = []byte("another\n99\n"+c.Root.String()+"\n\n— x AAAA\n"), nil
		}
		if err == nil {
			err = auditlog.AppendCheckpoint(file, signed)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.OpenFile(file, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString("example.org/log\n60\n" + c.Root.String() + "\n\n— exam"); err != nil {
		t.Fatal(err)
	}
	f.Close()
	if last, err := auditlog.LastCheckpoint(file, c.Origin, all); err != nil || last.Size != 50 {
		t.Errorf("%+v, %v", last, err)
	}
	bigger.Size = 70
	if signed, err = bigger.Sign(older); err != nil {
		t.Fatal(err)
	}
	if err := auditlog.AppendCheckpoint(file, signed); err != nil {
		t.Fatal(err)
	}
	if last, err := auditlog.LastCheckpoint(file, c.Origin, all); err != nil || last != bigger {
		t.Errorf("%+v, %v after one that was cut off", last, err)
	}
}

func all(auditlog.Checkpoint) bool { return true }

// The epoch is a line after the root, if there was a truncation. Other lines there are ignored. A
// malformed epoch makes the note unreadable.
func TestCheckpointEpoch(t *testing.T) {
	name, verifier := keyFile(t, "example.org/log")
	key, err := auditlog.ReadKey(name)
	if err != nil {
		t.Fatal(err)
	}
	c := auditlog.Checkpoint{Origin: "example.org/log", Size: 42, Root: auditlog.Root(leaves(42))}
	three := "example.org/log\n42\n" + c.Root.String() + "\n"
	for epoch, want := range map[int64]string{0: three, 1: three + "truncations 1\n", 17: three + "truncations 17\n"} {
		c.Epoch = epoch
		signed, err := c.Sign(key)
		if err != nil {
			t.Fatal(err)
		}
		if text, _, _ := strings.Cut(string(signed), "\n\n"); text+"\n" != want {
			t.Errorf("epoch %d is signed as %q", epoch, text)
		}
		if got, err := auditlog.OpenCheckpoint(signed, verifier); err != nil || got != c {
			t.Errorf("epoch %d: %+v, %v", epoch, got, err)
		}
	}
	c.Epoch = -1
	if _, err := c.Sign(key); err == nil {
		t.Error("a negative epoch is signed")
	}
	for lines, want := range map[string]int64{
		"other 7\n": 0, "other\ntruncations 2\nmore\n": 2, "truncationsx 1\n": 0, "x truncations 1\n": 0,
		"truncations\n": -1, "truncations \n": -1, "truncations 0\n": -1, "truncations 01\n": -1, "truncations +1\n": -1, "truncations -1\n": -1,
		"truncations 1 \n": -1, "truncations 1 2\n": -1, "truncations 9223372036854775808\n": -1, "truncations 1\ntruncations 1\n": -1,
	} {
		signed, err := note.Sign(&note.Note{Text: three + lines}, key.Signer)
		if err != nil {
			t.Fatal(err)
		}
		c, err := auditlog.OpenCheckpoint(signed, verifier)
		if (err != nil) != (want < 0) || err == nil && c.Epoch != want {
			t.Errorf("%q: %+v, %v", lines, c, err)
		}
	}
}

func TestReadKeyDoesNotShowIt(t *testing.T) {
	file := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(file, []byte("PRIVATE+KEY+a+00000000+secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := auditlog.ReadKey(file); err == nil || bytes.Contains([]byte(err.Error()), []byte("secret")) {
		t.Errorf("got %v", err)
	}
}

// A full disk is an error. Only regular files are read, because a device can be endless.
func TestCheckpointFileIsFull(t *testing.T) {
	if err := auditlog.AppendCheckpoint("/dev/full", []byte("a\n")); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("a full disk: %v", err)
	}
	if _, err := auditlog.LastCheckpoint("/dev/zero", "a", all); err == nil || !strings.Contains(err.Error(), "not a regular file") {
		t.Errorf("a device: %v", err)
	}
}
