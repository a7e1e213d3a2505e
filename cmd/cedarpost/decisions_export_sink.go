package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	jsonv2 "github.com/go-json-experiment/json"
	"github.com/google/renameio/v2"
)

// exportState is how far an export is on disk.
type exportState struct {
	// Leaf is the last batch that is safe, -1 for none yet, and Header the SHA-256 of
	// its header.
	Leaf   int64  `json:"leaf"`
	Header string `json:"header"`
	// File is where its rows are, and Size where the file ended behind them; "" for
	// stdout. Tail is the SHA-256 of the last 4096 bytes before that, by which a file
	// that was rotated is told apart; "" if that is not known.
	File string `json:"file"`
	Size int64  `json:"size"`
	Tail string `json:"tail,omitempty"`
}

// begun reports whether there is a batch to go on after.
func (s *exportState) begun() bool { return s != nil && s.Leaf >= 0 }

// readExportState returns nil if there is none.
func readExportState(file string) (*exportState, error) {
	if file == "" {
		return nil, nil
	}
	text, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	s := &exportState{}
	// Unlike encoding/json, it refuses a member that stands twice, or in other case.
	if err := jsonv2.Unmarshal(text, s, jsonv2.RejectUnknownMembers(true)); err != nil {
		return nil, fmt.Errorf("%s: not the state of an export: %w", file, err)
	}
	if s.begun() && s.Header == "" {
		return nil, fmt.Errorf("%s: not the state of an export", file)
	}
	return s, nil
}

// write replaces the file. A crash leaves the old file or the new one, never a part.
func (s exportState) write(file string) error {
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := renameio.WriteFile(file, append(text, '\n'), 0o600, renameio.WithStaticPermissions(0o600), renameio.WithTempDir(filepath.Dir(file))); err != nil {
		return err
	}
	return syncDir(file)
}

// syncDir makes durable that the file is in its folder.
func syncDir(file string) error {
	dir, err := os.Open(filepath.Dir(file))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// sink is where an export goes: a file that is appended to, or stdout. The file may
// be rotated while it is written: cut off (logrotate's copytruncate), or renamed or
// removed, and then reopen goes on with a new one.
type sink struct {
	file  *os.File // nil for stdout
	path  string
	out   io.Writer // file, or stdout
	buf   []byte    // whole lines that are not in the file yet
	size  int64     // of the file, without buf
	empty bool      // nothing is in the file, so head comes first
	// durable is a regular file, and not a pipe or a device.
	durable bool

	// head is the first line of each file, "" for none.
	head string
	// moved is called, if it is not nil, before anything is written into a file that
	// is a new one, or was cut off.
	moved func() error
}

// flushSize is what is kept back at most, but for one line.
const flushSize = 1 << 16

// tailSize is how much before its end identifies a file.
const tailSize = 4 << 10

// openSink opens a file, or takes stdout for "". What an export that was cut off
// wrote after its state is removed from the file that the state names.
func openSink(path string, stdout io.Writer, state *exportState) (_ *sink, err error) {
	if path == "" {
		return &sink{out: stdout, empty: !state.begun()}, nil
	}
	s := &sink{path: path}
	if err := s.open(); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			s.file.Close()
		}
	}()
	if !s.durable {
		s.empty = !state.begun()
		return s, nil
	}
	switch {
	case state == nil && s.size > 0:
		return nil, fmt.Errorf("%s is not empty; --resume goes on with an export", path)
	case state != nil && state.File == path:
		if err := s.cut(state); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// open opens the file at the path. All writes go to its end, wherever that is by
// then: after a file was cut off, a write to the old place would leave zeros before it.
func (s *sink) open() error {
	f, err := os.OpenFile(s.path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err == nil && info.Mode().IsRegular() {
		err = syncDir(s.path)
	}
	if err != nil {
		f.Close()
		return err
	}
	s.file, s.out, s.durable, s.size = f, f, info.Mode().IsRegular(), 0
	if s.durable {
		s.size = info.Size()
	}
	s.empty = s.size == 0
	return nil
}

// cut removes what an export wrote after its state. If the file was rotated since, it
// does not have what the state is of: only the end of a line that is not whole goes
// then, and some rows can come twice.
func (s *sink) cut(state *exportState) error {
	end := state.Size
	same := s.size >= end
	if same && state.Tail != "" {
		tail, err := tailOf(s.file, end)
		if err != nil {
			return err
		}
		same = tail == state.Tail
	}
	if !same {
		var err error
		if end, err = wholeLines(s.file, s.size); err != nil {
			return err
		}
	}
	if end < s.size {
		if err := s.file.Truncate(end); err != nil {
			return err
		}
		s.size = end
	}
	s.empty = s.size == 0
	return nil
}

// tailOf is the hash of what comes right before a place in a file.
func tailOf(f io.ReaderAt, end int64) (string, error) {
	tail := make([]byte, min(end, tailSize))
	if _, err := f.ReadAt(tail, end-int64(len(tail))); err != nil {
		return "", err
	}
	sum := sha256.Sum256(tail)
	return hex.EncodeToString(sum[:]), nil
}

// wholeLines is how much of a file of that size is whole lines.
func wholeLines(f io.ReaderAt, size int64) (int64, error) {
	block := make([]byte, flushSize)
	for size > 0 {
		from := max(0, size-int64(len(block)))
		b := block[:size-from]
		if _, err := f.ReadAt(b, from); err != nil {
			return 0, err
		}
		if i := bytes.LastIndexByte(b, '\n'); i >= 0 {
			return from + int64(i) + 1, nil
		}
		size = from
	}
	return 0, nil
}

// line adds a line. Only whole lines go to the file, each in one piece.
func (s *sink) line(text string) error {
	s.buf = append(s.buf, text...)
	if len(s.buf) < flushSize {
		return nil
	}
	return s.flush()
}

// flush writes what was kept back.
func (s *sink) flush() error {
	if err := s.look(); err != nil {
		return err
	}
	if s.empty {
		s.buf = append([]byte(s.head), s.buf...)
	}
	if len(s.buf) == 0 {
		return nil
	}
	n, err := s.out.Write(s.buf)
	s.size += int64(n)
	s.buf, s.empty = s.buf[:0], false
	return err
}

// look finds out whether the file was cut off.
func (s *sink) look() error {
	if !s.durable {
		return nil
	}
	info, err := s.file.Stat()
	if err != nil {
		return err
	}
	was := s.size
	s.size, s.empty = info.Size(), info.Size() == 0
	if s.size < was && s.moved != nil {
		return s.moved()
	}
	return nil
}

// rotated reports whether the file is no longer at its path.
func (s *sink) rotated() (bool, error) {
	if !s.durable {
		return false, nil
	}
	open, err := s.file.Stat()
	if err != nil {
		return false, err
	}
	named, err := os.Stat(s.path)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	return err == nil && !os.SameFile(open, named), err
}

// reopen goes on with the file that is at the path now. Everything must be in the old
// one.
func (s *sink) reopen() error {
	if !s.durable {
		return nil
	}
	old := s.file
	if err := s.open(); err != nil {
		return err
	}
	err := old.Close()
	if err == nil && s.moved != nil {
		err = s.moved()
	}
	return err
}

// mark says where the file ends, and what it ends with.
func (s *sink) mark() (size int64, tail string, err error) {
	if !s.durable {
		return s.size, "", nil
	}
	for {
		tail, err = tailOf(s.file, s.size)
		if !errors.Is(err, io.EOF) {
			return s.size, tail, err
		}
		// It was cut off just now.
		info, err := s.file.Stat()
		if err != nil {
			return 0, "", err
		}
		s.size = info.Size()
	}
}

// sync flushes, and makes a file durable.
func (s *sink) sync() error {
	err := s.flush()
	if err == nil && s.durable {
		err = s.file.Sync()
	}
	return err
}

// close flushes what is left, which no state names.
func (s *sink) close() error {
	err := s.flush()
	if s.file != nil {
		err = errors.Join(err, s.file.Close())
	}
	return err
}
