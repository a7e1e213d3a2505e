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

// A checkpoint file holds signed notes, each followed by an empty line: checkpoints, and
// statements of truncation. A note is two paragraphs: its body, and its signatures, which
// begin with a dash. One that was cut off while it was written is passed over.

// AppendCheckpoint adds a signed checkpoint to a file, and returns when it is on
// disk.
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
		text = append([]byte("\n\n"), text...) // what was cut off ends here
	}
	if _, err := f.Write(text); err != nil {
		return err
	}
	return f.Sync()
}

// CheckFile makes sure that checkpoints can be appended to a file and read back. It
// makes the file if there is none, and changes nothing in one that is there.
func CheckFile(file string) (err error) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	return errors.Join(isRegular(file), f.Close())
}

// isRegular refuses devices and pipes: they do not give back what was written, and
// some of them can be read without end.
func isRegular(file string) error {
	info, err := os.Stat(file)
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", file)
	}
	return err
}

// ReadKept reads what a file has of a log; nothing if there is no file. Signatures of
// checkpoints are not verified: whoever can add a note to the file can also remove one. A
// statement that the newest batches are lost is an error unless one of the keys signed it
// and it fits the notes before it.
func ReadKept(file, origin string, keys ...note.Verifier) (k Kept, err error) {
	err = readKept(file, origin, keys, func(c Checkpoint) { k.Add(c) }, func(t Truncation, signed []byte) error { return k.Truncate(t, signed) })
	return k, err
}

func readKept(file, origin string, keys []note.Verifier, add func(Checkpoint), truncate func(Truncation, []byte) error) error {
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
	return EachCheckpoint(f, func(signed []byte) error {
		if IsTruncation(signed) {
			if t, err := PeekTruncation(signed); err == nil && t.Origin != origin {
				return nil
			}
			t, err := OpenTruncation(signed, keys...)
			if err == nil {
				err = truncate(t, signed)
			}
			if err != nil {
				return fmt.Errorf("%s: a statement of truncation does not count: %w", file, err)
			}
			return nil
		}
		if c, err := PeekCheckpoint(signed); err == nil && c.Origin == origin {
			add(c)
		}
		return nil
	})
}

// LastCheckpoint returns the Last of [ReadKept] without keeping the others in memory. It
// does not compare a statement with older checkpoints than the newest one.
func LastCheckpoint(file, origin string, keys ...note.Verifier) (last Checkpoint, err error) {
	last, _, err = readLast(file, origin, keys)
	return last, err
}

// Truncations returns the signed statements of truncation in a file; see [ReadKept].
func Truncations(file, origin string, keys ...note.Verifier) (statements [][]byte, err error) {
	_, statements, err = readLast(file, origin, keys)
	return statements, err
}

func readLast(file, origin string, keys []note.Verifier) (last Checkpoint, statements [][]byte, err error) {
	err = readKept(file, origin, keys, func(c Checkpoint) {
		if c.Size >= last.Size {
			last = c
		}
	}, func(t Truncation, signed []byte) error {
		if err := t.follows(last); err != nil {
			return err
		}
		last, statements = t.To, append(statements, signed)
		return nil
	})
	return last, statements, err
}

// EachCheckpoint calls fn with each signed note of a checkpoint file.
func EachCheckpoint(r io.Reader, fn func(signed []byte) error) error {
	lines := bufio.NewReader(r)
	var body, paragraph strings.Builder
	for {
		line, err := lines.ReadString('\n')
		if errors.Is(err, io.EOF) {
			return nil // a paragraph without its empty line is not whole
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
