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

	"github.com/cedarpost/cedarpost/internal/keyfile"
)

// exportState is the progress of an export: what is safe on disk.
type exportState struct {
	// Leaf is the last batch that is safe, -1 for none yet. Header is the SHA-256 of its header.
	Leaf   int64  `json:"leaf"`
	Header string `json:"header"`
	// File has the rows, "" for stdout, and Size is its size after the last safe row. Tail is the
	// SHA-256 of the last 4096 bytes before Size. It shows whether the file was rotated; "" if it
	// is not known.
	File string `json:"file"`
	Size int64  `json:"size"`
	Tail string `json:"tail,omitempty"`
}

// begun reports whether a batch is safe.
func (s *exportState) begun() bool { return s != nil && s.Leaf >= 0 }

// readExportState returns nil if there is no file.
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
	// Unlike encoding/json, this refuses a duplicate member, and a name in another case.
	if err := jsonv2.Unmarshal(text, s, jsonv2.RejectUnknownMembers(true)); err != nil {
		return nil, fmt.Errorf("%s: not the state of an export: %w", file, err)
	}
	if s.begun() && s.Header == "" {
		return nil, fmt.Errorf("%s: not the state of an export", file)
	}
	return s, nil
}

// write replaces the file, and returns when that is durable.
func (s exportState) write(file string) error {
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	if err := keyfile.Write(file, append(text, '\n')); err != nil {
		return err
	}
	return syncDir(file)
}

// syncDir makes the entry of a file in its folder durable.
func syncDir(file string) error {
	dir, err := os.Open(filepath.Dir(file))
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// sink is the output of an export: a file to append to, or stdout. The file may be rotated
// meanwhile. If it is cut off (copytruncate of logrotate), the sink continues at its new end; if
// it is renamed or removed, reopen continues in a new file.
type sink struct {
	file  *os.File // nil for stdout
	path  string
	out   io.Writer // file, or stdout
	buf   []byte    // whole lines that are not in the file yet
	size  int64     // of the file, without buf
	empty bool      // the file is empty, so head comes first
	// durable: the output is a regular file, not a pipe or a device.
	durable bool

	// head is the first line of each file, "" for none.
	head string
	// moved is called, if it is not nil, before the first write into a new file, or into one that
	// was cut off.
	moved func() error
}

// flushSize is the size of the buffer. It can exceed that by one line.
const flushSize = 1 << 16

// tailSize is the number of bytes before the end that identify a file.
const tailSize = 4 << 10

// openSink opens a file, or uses stdout for "". If the state names the file, rows that an earlier
// export wrote after the state are removed from it.
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

// open opens the file at the path. It appends: after the file was cut off, a write at the old
// position would leave zeros before it.
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

// cut removes the rows that an export wrote after its state. If the file was rotated since, it has
// other rows than the state says, so cut removes only an unfinished line at its end. Some rows can
// then come twice.
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

// tailOf returns the hash of the bytes before a position in a file.
func tailOf(f io.ReaderAt, end int64) (string, error) {
	tail := make([]byte, min(end, tailSize))
	if _, err := f.ReadAt(tail, end-int64(len(tail))); err != nil {
		return "", err
	}
	sum := sha256.Sum256(tail)
	return hex.EncodeToString(sum[:]), nil
}

// wholeLines returns the size of a file without the unfinished line at its end.
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

// line adds a line. Writes never split a line.
func (s *sink) line(text string) error {
	s.buf = append(s.buf, text...)
	if len(s.buf) < flushSize {
		return nil
	}
	return s.flush()
}

// flush writes the buffer.
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

// look checks whether the file was cut off.
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

// rotated reports whether the path no longer names the open file.
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

// reopen continues in the file that the path names now. The buffer must be empty.
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

// mark returns the size of the file, and the hash of its end.
func (s *sink) mark() (size int64, tail string, err error) {
	if !s.durable {
		return s.size, "", nil
	}
	for {
		tail, err = tailOf(s.file, s.size)
		if !errors.Is(err, io.EOF) {
			return s.size, tail, err
		}
		// The file was cut off at this moment.
		info, err := s.file.Stat()
		if err != nil {
			return 0, "", err
		}
		s.size = info.Size()
	}
}

// sync flushes the buffer, and syncs a file to disk.
func (s *sink) sync() error {
	err := s.flush()
	if err == nil && s.durable {
		err = s.file.Sync()
	}
	return err
}

// close flushes the buffer. The state does not cover these rows.
func (s *sink) close() error {
	err := s.flush()
	if s.file != nil {
		err = errors.Join(err, s.file.Close())
	}
	return err
}
