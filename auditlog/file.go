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
)

// A checkpoint file holds signed notes, each followed by an empty line. So a note
// is two paragraphs: its body, and its signatures, which begin with a dash. One that
// was cut off while it was written is passed over.

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

// LastCheckpoint reads the largest checkpoint of a log in a file; the zero value if
// there is none. Signatures are not looked at.
func LastCheckpoint(file, origin string) (last Checkpoint, err error) {
	if err := isRegular(file); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		return last, err
	}
	f, err := os.Open(file)
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
