package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"sync/atomic"

	"google.golang.org/protobuf/proto"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/entityfile"
)

// The formats of an input.
const (
	formatJSON   = "json"
	formatNDJSON = "ndjson"
	formatCSV    = "csv"
)

// A lot is one message. The server bounds the entities and the bytes of a message.
const (
	lotEntities = 1000
	lotBytes    = 3 << 20
)

// input is the file or stream with the entities.
type input struct {
	name    string
	format  string
	mapping *entityfile.Mapping // of a CSV file
	mapText []byte
	r       io.Reader
	again   bool         // r can be read again from its start
	size    int64        // of r; 0 if it is not known
	read    atomic.Int64 // of r so far
}

// inputError is an error in the content of the input.
type inputError struct{ err error }

func (e *inputError) Error() string { return e.err.Error() }
func (e *inputError) Unwrap() error { return e.err }

func formatOf(file string) string {
	switch strings.ToLower(filepath.Ext(file)) {
	case ".ndjson", ".jsonl":
		return formatNDJSON
	case ".csv":
		return formatCSV
	}
	return formatJSON
}

// fingerprint returns an id of the import: a hash of the content and of its mapping.
func (in *input) fingerprint() (string, error) {
	if err := in.rewind(); err != nil {
		return "", err
	}
	hash := sha256.New()
	if _, err := io.Copy(hash, in.r); err != nil {
		return "", err
	}
	_, _ = hash.Write(in.mapText) // never fails
	return "sha256:" + hex.EncodeToString(hash.Sum(nil)), nil
}

func (in *input) rewind() error {
	in.read.Store(0)
	if !in.again {
		return nil
	}
	_, err := in.r.(io.Seeker).Seek(0, io.SeekStart)
	return err
}

// entities returns a reader. It begins at the start, if the input can be read again.
func (in *input) entities() (*entityfile.Reader, error) {
	if err := in.rewind(); err != nil {
		return nil, err
	}
	switch in.format {
	case formatNDJSON:
		return entityfile.ReadNDJSON(in), nil
	case formatCSV:
		return entityfile.ReadCSV(in, in.mapping), nil
	}
	return entityfile.ReadJSON(in), nil
}

// Read implements io.Reader, and counts the bytes.
func (in *input) Read(p []byte) (int, error) {
	n, err := in.r.Read(p)
	in.read.Add(int64(n))
	return n, err
}

func (in *input) empty() error { return fmt.Errorf("%s holds no entities", in.name) }

// lot is the content of one message.
type lot struct {
	entities []*cedarpostv1.Entity
	size     int
	read     int64 // of the input, up to here
	err      error // of the last lot: io.EOF, or the error of the input
}

// lots skips some entities and reads the others, while earlier lots are sent. The last lot has an
// error and no entities.
func (in *input) lots(ctx context.Context, r *entityfile.Reader, skip int64) <-chan lot {
	lots := make(chan lot)
	put := func(l lot) bool {
		l.read = in.read.Load()
		select {
		case lots <- l:
			return true
		case <-ctx.Done():
			return false
		}
	}
	go func() {
		defer close(lots)
		for n := range skip {
			if ctx.Err() != nil {
				return
			}
			if _, err := r.Next(); errors.Is(err, io.EOF) {
				put(lot{err: &inputError{fmt.Errorf("holds %s, fewer than the %d that are stored of this import", entities(n), skip)}})
				return
			} else if err != nil {
				put(lot{err: &inputError{err}})
				return
			}
		}
		for l := (lot{}); ; {
			e, err := r.Next()
			size := proto.Size(e) + 8
			// A lot with an error is not sent at all, so that a small file is imported
			// whole or not at all.
			full := len(l.entities) == lotEntities || l.size+size > lotBytes || errors.Is(err, io.EOF)
			if len(l.entities) > 0 && full {
				if !put(l) {
					return
				}
				l = lot{}
			}
			if errors.Is(err, io.EOF) {
				put(lot{err: err})
				return
			} else if err != nil {
				put(lot{err: &inputError{err}})
				return
			}
			l.entities, l.size = append(l.entities, e), l.size+size
		}
	}()
	return lots
}
