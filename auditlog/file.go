package auditlog

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"strings"
)

// A checkpoint file holds signed notes, each followed by an empty line. Only its
// last checkpoint counts; what was cut off while it was written does not.

// AppendCheckpoint adds a signed checkpoint to a file, and returns when it is on disk.
func AppendCheckpoint(file string, signed []byte) (err error) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if _, err := f.Write(append(bytes.Clone(signed), '\n')); err != nil {
		return err
	}
	return f.Sync()
}

// LastCheckpoint reads the newest checkpoint of a log in a file; the zero value if
// there is none.
func LastCheckpoint(file, origin string) (last Checkpoint, err error) {
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return last, nil
	}
	if err != nil {
		return last, err
	}
	defer func() { _ = f.Close() }()
	err = EachCheckpoint(f, func(signed []byte) error {
		if c, err := PeekCheckpoint(signed); err == nil && c.Origin == origin && c.Size >= last.Size {
			last = c
		}
		return nil
	})
	return last, err
}

// EachCheckpoint calls fn with each signed note of a checkpoint file. A note is a
// body, an empty line and its signatures.
func EachCheckpoint(r io.Reader, fn func(signed []byte) error) error {
	lines := bufio.NewReader(r)
	var text strings.Builder
	for empty := 0; ; {
		line, err := lines.ReadString('\n')
		if errors.Is(err, io.EOF) {
			return nil // a last note without its empty line is not whole
		}
		if err != nil {
			return err
		}
		if line == "\n" {
			empty++
		}
		if line == "\n" && empty == 2 {
			if err := fn([]byte(text.String())); err != nil {
				return err
			}
			text.Reset()
			empty = 0
			continue
		}
		text.WriteString(line)
	}
}
