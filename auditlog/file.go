package auditlog

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/mod/sumdb/note"
)

// A checkpoint file has signed notes, each followed by an empty line: checkpoints, and statements
// of truncation. A note is two paragraphs: its body, and its signatures, which begin with a dash.
// Readers skip a note that was cut off while it was written.

// AppendCheckpoint adds a signed note to a checkpoint file, and returns when it is on disk.
func AppendCheckpoint(file string, signed []byte) (err error) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	text := append(bytes.Clone(signed), '\n')
	tail := make([]byte, min(end, 2))
	if _, err := f.ReadAt(tail, end-int64(len(tail))); err != nil {
		return err
	}
	if end > 0 && string(tail) != "\n\n" {
		text = append([]byte("\n\n"), text...) // ends a note that was cut off
	}
	if _, err := f.Write(text); err != nil {
		return err
	}
	return f.Sync()
}

// CheckFile checks that checkpoints can be appended to a file and read back. It makes the file if
// there is none, and does not change an existing one.
func CheckFile(file string) (err error) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	return errors.Join(isRegular(file), f.Close())
}

// isRegular refuses devices and pipes: they do not return what was written to them, and some of
// them never end.
func isRegular(file string) error {
	info, err := os.Stat(file)
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", file)
	}
	return err
}

// ReadStatements reads the statements of truncation of a log in a file, and the epochs of its
// checkpoints. There are none if there is no file. It is an error if a statement that names a
// given key was altered, or if two different statements have the same number.
func ReadStatements(file, origin string, keys ...note.Verifier) (s Statements, err error) {
	return readStatements(NotesIn(file), origin, keys)
}

func readStatements(notes Notes, origin string, keys []note.Verifier) (s Statements, err error) {
	err = notes(func(signed []byte) error {
		if !IsTruncation(signed) {
			if c, err := PeekCheckpoint(signed); err == nil && c.Origin == origin {
				s.See(c, signed, keys...)
			}
			return nil
		}
		if t, err := PeekTruncation(signed); err == nil && t.Origin != origin {
			return nil
		}
		if err := s.Add(signed, keys...); err != nil {
			return fmt.Errorf("a statement of truncation does not count: %w", err)
		}
		return nil
	})
	return s, err
}

// EachKept calls fn with each checkpoint of a log in a file, and with its note. It does not verify
// the signatures. There are none if there is no file.
func EachKept(file, origin string, fn func(c Checkpoint, signed []byte) error) error {
	return eachOf(func(fn func([]byte) error) error { return eachNote(file, fn) }, origin, fn)
}

func eachOf(notes Notes, origin string, fn func(c Checkpoint, signed []byte) error) error {
	return notes(func(signed []byte) error {
		if c, err := PeekCheckpoint(signed); err == nil && c.Origin == origin {
			return fn(c, signed)
		}
		return nil
	})
}

// LastCheckpoint returns the largest checkpoint of a log in a file for which counts returns true;
// the zero value if there is none. It does not verify the signatures: a forged checkpoint in the
// file can cause a contradiction with the log, but cannot hide one.
func LastCheckpoint(file, origin string, counts func(Checkpoint) bool) (last Checkpoint, err error) {
	err = EachKept(file, origin, func(c Checkpoint, _ []byte) error {
		if c.Size >= last.Size && counts(c) {
			last = c
		}
		return nil
	})
	return last, err
}

// NotesIn reads the signed notes of a checkpoint file. There are none if there is no file. An
// error of fn is returned with the name of the file in front.
func NotesIn(file string) Notes {
	return func(fn func(signed []byte) error) error {
		return eachNote(file, func(signed []byte) error {
			if err := fn(signed); err != nil {
				return fmt.Errorf("%s: %w", file, err)
			}
			return nil
		})
	}
}

func eachNote(file string, fn func(signed []byte) error) error {
	if err := isRegular(file); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return err
	}
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	return EachCheckpoint(f, fn)
}

// EachCheckpoint calls fn with each signed note of a checkpoint file.
func EachCheckpoint(r io.Reader, fn func(signed []byte) error) error {
	lines := bufio.NewReader(r)
	var body, paragraph strings.Builder
	for {
		line, err := lines.ReadString('\n')
		if errors.Is(err, io.EOF) {
			return nil // a paragraph without its empty line is incomplete
		}
		if err != nil {
			return err
		}
		if line != "\n" {
			paragraph.WriteString(line)
			continue
		}
		text := paragraph.String()
		paragraph.Reset()
		if !strings.HasPrefix(text, "— ") {
			body.Reset()
			body.WriteString(text)
			continue
		}
		if body.Len() == 0 {
			continue
		}
		if err := fn([]byte(body.String() + "\n" + text)); err != nil {
			return err
		}
		body.Reset()
	}
}
