package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	jsonv2 "github.com/go-json-experiment/json"
)

// exportState is how far an export is on disk.
type exportState struct {
	// Leaf is the last batch that is safe, -1 for none yet, and Header the SHA-256 of
	// its header.
	Leaf   int64  `json:"leaf"`
	Header string `json:"header"`
	// File is where its rows are, and Size where the file ended behind them; "" for
	// stdout.
	File string `json:"file"`
	Size int64  `json:"size"`
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

// write replaces the file whole, or, in a crash, not at all.
func (s exportState) write(file string) error {
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}
	tmp, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file)+"-*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.Write(append(text, '\n'))
	if err == nil {
		err = tmp.Sync()
	}
	if err := errors.Join(err, tmp.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), file); err != nil {
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

// sink is where an export goes: a file that is appended to, or stdout.
type sink struct {
	file  *os.File // nil for stdout
	path  string
	w     *bufio.Writer
	size  int64 // of the file, with what is still in w
	empty bool  // nothing was there before
	// durable is a regular file, and not a pipe or a device.
	durable bool
}

// openSink opens a file, or takes stdout for "". What an export that was cut off
// wrote after its state is removed from the file that the state names.
func openSink(path string, stdout io.Writer, state *exportState) (_ *sink, err error) {
	if path == "" {
		return &sink{w: bufio.NewWriterSize(stdout, 1<<16), empty: !state.begun()}, nil
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	s := &sink{path: path, w: bufio.NewWriterSize(f, 1<<16)}
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		s.file, s.empty = f, !state.begun()
		return s, nil
	}
	s.size = info.Size()
	switch {
	case state == nil && s.size > 0:
		return nil, fmt.Errorf("%s is not empty; --resume goes on with an export", path)
	case state != nil && state.File == path && s.size > state.Size:
		if err := f.Truncate(state.Size); err != nil {
			return nil, err
		}
		s.size = state.Size
	}
	if _, err := f.Seek(s.size, io.SeekStart); err != nil {
		return nil, err
	}
	s.file, s.durable, s.empty = f, true, s.size == 0
	return s, syncDir(path)
}

func (s *sink) line(text string) error {
	n, err := s.w.WriteString(text)
	s.size += int64(n)
	return err
}

// sync flushes, and makes a file durable.
func (s *sink) sync() error {
	err := s.w.Flush()
	if err == nil && s.durable {
		err = s.file.Sync()
	}
	return err
}

// close flushes what is left, which no state names.
func (s *sink) close() error {
	err := s.w.Flush()
	if s.file != nil {
		err = errors.Join(err, s.file.Close())
	}
	return err
}
