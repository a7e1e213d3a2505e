// Package auditlog defines the format of the decision log and of its proofs: which bytes are
// hashed, how, and what a checkpoint says. It uses no network and no database, so that writers,
// provers and verifiers of the log share the same functions. docs/audit.md describes the format.
//
// A row is the bytes of a record. The rows of one commit are the leaves of a small tree, whose
// root is in the header of the batch. The headers are the leaves of the tree of the whole log.
// Both trees are Merkle trees as in RFC 6962, section 2.1.
package auditlog

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
	"golang.org/x/mod/sumdb/tlog"
)

// headerFormats are the first lines of headers, by version. Version 1 does not have the times of
// the rows. Earlier builds wrote it; it is read, and no longer written.
var headerFormats = [...]string{1: "cedarpost-batch-v1", 2: "cedarpost-batch-v2"}

const newestHeader = 2

// Header describes one batch. Its bytes are a leaf of the log.
type Header struct {
	// Version is the version of the format. 0 writes the newest one. A header that was read
	// has 1 or 2.
	Version int
	// Batch is the id of the batch. Its rows have it too.
	Batch uuid.UUID
	// Writer is the process that wrote the batch, WriterSeq numbers its batches from 0, and
	// Server is the name of the server.
	Writer    uuid.UUID
	WriterSeq int64
	Server    string
	// Mode says when decisions of the batch were answered.
	Mode Mode
	// Made is the time when the batch was made, by the clock of the server, to the millisecond.
	Made time.Time
	// Rows is the number of rows, and Root is the root of their tree.
	Rows int
	Root tlog.Hash
	// First and Last are the earliest and the latest time of the rows, in UTC, to the
	// millisecond, as their ids have it. Both are zero in version 1, and in a batch without
	// rows.
	First, Last time.Time
	// Unclean are writers of the same server that crashed.
	Unclean []Unclean
}

// Mode says when a decision was answered.
type Mode string

// The modes.
const (
	// Strict answers after the commit.
	Strict Mode = "strict"
	// Buffered answers before the commit. A crash loses a bounded number of decisions.
	Buffered Mode = "buffered"
)

// Unclean is a writer that ended without closing its part of the log.
type Unclean struct {
	Writer uuid.UUID
	// Lost bounds the answered decisions that can be missing. It is 0 for a strict writer.
	Lost int
}

const timeFormat = "2006-01-02T15:04:05.000Z"

// Bytes returns the header in the form that is hashed: lines of a key, a space and a value, in a
// fixed order.
func (h Header) Bytes() []byte {
	version := h.Version
	if version == 0 {
		version = newestHeader
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s\nbatch %s\nwriter %s\nwriter-seq %d\nserver %s\nmode %s\nmade %s\nrows %d\nroot %s\n",
		headerFormats[version], h.Batch, h.Writer, h.WriterSeq, strconv.Quote(h.Server), h.Mode,
		h.Made.UTC().Format(timeFormat), h.Rows, base64.StdEncoding.EncodeToString(h.Root[:]))
	if version > 1 && h.Rows > 0 {
		fmt.Fprintf(&b, "first %s\nlast %s\n", h.First.UTC().Format(timeFormat), h.Last.UTC().Format(timeFormat))
	}
	for _, u := range h.Unclean {
		fmt.Fprintf(&b, "unclean %s %d\n", u.Writer, u.Lost)
	}
	return b.Bytes()
}

var errHeader = errors.New("not the header of a batch")

// ParseHeader reads a header. It accepts only what [Header.Bytes] writes, so that two texts are
// never the same header.
func ParseHeader(text []byte) (Header, error) {
	first, rest, _ := strings.Cut(string(text), "\n")
	version := slices.Index(headerFormats[:], first)
	if version < 1 {
		return Header{}, errHeader
	}
	lines := strings.Split(rest, "\n") // the last one is empty
	keys := []string{"batch", "writer", "writer-seq", "server", "mode", "made", "rows", "root"}
	if len(lines) <= len(keys) {
		return Header{}, errHeader
	}
	value := func(key string) (value string, ok bool) {
		if len(lines) == 0 {
			return "", false
		}
		if value, ok = strings.CutPrefix(lines[0], key+" "); ok {
			lines = lines[1:]
		}
		return value, ok
	}
	values := make([]string, len(keys))
	for i, key := range keys {
		var ok bool
		if values[i], ok = value(key); !ok {
			return Header{}, errHeader
		}
	}
	h := Header{Version: version}
	var errs [9]error
	h.Batch, errs[0] = uuid.Parse(values[0])
	h.Writer, errs[1] = uuid.Parse(values[1])
	h.WriterSeq, errs[2] = strconv.ParseInt(values[2], 10, 64)
	h.Server, errs[3] = strconv.Unquote(values[3])
	h.Mode = Mode(values[4])
	h.Made, errs[4] = time.Parse(timeFormat, values[5])
	h.Rows, errs[5] = strconv.Atoi(values[6])
	h.Root, errs[6] = tlog.ParseHash(values[7])
	if version > 1 && h.Rows > 0 {
		first, _ := value("first")
		last, _ := value("last")
		h.First, errs[7] = time.Parse(timeFormat, first)
		h.Last, errs[8] = time.Parse(timeFormat, last)
	}
	if err := errors.Join(errs[:]...); err != nil || h.Rows < 0 || h.Rows > math.MaxInt32 {
		return Header{}, errHeader
	}
	for len(lines) > 1 {
		var u Unclean
		var writer string
		if _, err := fmt.Sscanf(lines[0], "unclean %s %d", &writer, &u.Lost); err != nil {
			return Header{}, errHeader
		}
		var err error
		if u.Writer, err = uuid.Parse(writer); err != nil {
			return Header{}, errHeader
		}
		h.Unclean = append(h.Unclean, u)
		lines = lines[1:]
	}
	if !bytes.Equal(h.Bytes(), text) {
		return Header{}, errHeader
	}
	return h, nil
}

// Hash returns the hash of a leaf: of a record in its batch, or of a header in the log.
func Hash(leaf []byte) tlog.Hash { return tlog.RecordHash(leaf) }

// emptyRoot is the root of an empty tree: the SHA-256 of no bytes.
var emptyRoot = tlog.Hash{
	0xe3, 0xb0, 0xc4, 0x42, 0x98, 0xfc, 0x1c, 0x14, 0x9a, 0xfb, 0xf4, 0xc8, 0x99, 0x6f, 0xb9, 0x24,
	0x27, 0xae, 0x41, 0xe4, 0x64, 0x9b, 0x93, 0x4c, 0xa4, 0x95, 0x99, 0x1b, 0x78, 0x52, 0xb8, 0x55,
}

// Root returns the root of the tree over the hashes of leaves.
func Root(leaves []tlog.Hash) tlog.Hash {
	switch len(leaves) {
	case 0:
		return emptyRoot
	case 1:
		return leaves[0]
	}
	k := 1
	for k*2 < len(leaves) {
		k *= 2
	}
	return tlog.NodeHash(Root(leaves[:k]), Root(leaves[k:]))
}

// ProveRow returns the inclusion proof of leaf i in the tree over leaves.
func ProveRow(leaves []tlog.Hash, i int) (tlog.RecordProof, error) {
	var stored []tlog.Hash
	read := tlog.HashReaderFunc(func(indexes []int64) ([]tlog.Hash, error) {
		out := make([]tlog.Hash, len(indexes))
		for n, index := range indexes {
			out[n] = stored[index]
		}
		return out, nil
	})
	for n, leaf := range leaves {
		more, err := tlog.StoredHashesForRecordHash(int64(n), leaf, read)
		if err != nil {
			return nil, err
		}
		stored = append(stored, more...)
	}
	return tlog.ProveRecord(int64(len(leaves)), int64(i), read)
}

// Inclusion is the proof that a record is in the log of a checkpoint.
type Inclusion struct {
	Record   []byte
	Row      int // index of the record in its batch, from 0
	RowProof tlog.RecordProof
	Header   []byte
	Leaf     int64 // index of the batch in the log, from 0
	Proof    tlog.RecordProof
}

// Check returns nil if the proof holds for the checkpoint.
func (p Inclusion) Check(c Checkpoint) error {
	h, err := ParseHeader(p.Header)
	if err != nil {
		return err
	}
	if p.Row < 0 || p.Row >= h.Rows {
		return fmt.Errorf("row %d of a batch of %d", p.Row, h.Rows)
	}
	if err := tlog.CheckRecord(p.RowProof, int64(h.Rows), h.Root, int64(p.Row), Hash(p.Record)); err != nil {
		return fmt.Errorf("row in batch: %w", err)
	}
	if p.Leaf < 0 || p.Leaf >= c.Size {
		return fmt.Errorf("leaf %d of a log of %d", p.Leaf, c.Size)
	}
	if err := tlog.CheckRecord(p.Proof, c.Size, c.Root, p.Leaf, Hash(p.Header)); err != nil {
		return fmt.Errorf("batch in log: %w", err)
	}
	return nil
}
