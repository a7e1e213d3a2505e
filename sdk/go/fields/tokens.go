package fields

import (
	"bufio"
	"errors"
	"fmt"
	"io"

	"github.com/go-json-experiment/json/jsontext"
)

const (
	maxTokenBytes = 16 << 20
	maxKeyBytes   = 64 << 10 // the decoder keeps one key for each level
)

// tokens reads one JSON document and passes tokens on as they are written. It reads with
// jsontext, because encoding/json silently replaces bad UTF-8 and lone surrogates: then the
// checked bytes would not be the bytes that are passed on. It does not write with
// jsontext.Encoder, because that holds back an object while its values are empty, and so it
// could hold a large document in memory.
type tokens struct {
	dec  *jsontext.Decoder
	src  io.Reader
	err  error // of src
	read int64 // bytes read from src
	out  *bufio.Writer
	last byte    // the last byte that was written
	mark [1]byte // a buffer for take
	said []byte  // a buffer for text
}

func newTokens(dst io.Writer, src io.Reader) *tokens {
	t := &tokens{src: src, out: bufio.NewWriterSize(dst, 8<<10)}
	t.dec = jsontext.NewDecoder(t, jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(false))
	return t
}

// Read is called by the decoder. The decoder asks for more only inside of a token or of white
// space, which it holds as a whole.
func (t *tokens) Read(p []byte) (n int, err error) {
	held := t.read - t.dec.InputOffset()
	switch {
	case t.err != nil:
	case held > maxTokenBytes:
		t.err = fmt.Errorf("a text, a number or white space of more than %d bytes", maxTokenBytes)
	default:
		n, t.err = t.src.Read(p[:min(int64(len(p)), maxTokenBytes+1-held)])
		t.read += int64(n)
	}
	return n, t.err
}

// fail makes an error with the position. Errors quote no value, because the reader of the
// error may not be allowed to see it.
func (t *tokens) fail(format string, args ...any) error {
	return failAt(t.dec.InputOffset(), fmt.Errorf(format, args...))
}

func failAt(offset int64, err error) error {
	return fmt.Errorf("fields: JSON, byte %d: %w", offset, err)
}

// failed replaces an error of the decoder, because syntax errors quote the document.
func (t *tokens) failed(err error) error {
	grammar, ok := err.(*jsontext.SyntacticError) //nolint:errorlint // a wrapped one would be an error of src
	switch {
	case ok && !errors.Is(grammar.Err, io.ErrUnexpectedEOF):
		return failAt(grammar.ByteOffset, errors.New("not JSON, or not Unicode"))
	case ok || err == io.EOF: //nolint:errorlint // the decoder does not wrap it
		return t.fail("%w", io.ErrUnexpectedEOF)
	}
	return t.fail("%w", t.err)
}

// peek returns the kind of the next token.
func (t *tokens) peek() (jsontext.Kind, error) {
	kind := t.dec.PeekKind()
	if kind == jsontext.KindInvalid {
		_, err := t.take(false)
		return kind, err
	}
	return kind, nil
}

// take reads the next token, and passes it on if keep is true. The returned text is valid
// until the next call.
func (t *tokens) take(keep bool) ([]byte, error) {
	var text []byte
	var err error
	switch kind := t.dec.PeekKind(); kind {
	case '{', '}', '[', ']':
		text = append(t.mark[:0], byte(kind))
		_, err = t.dec.ReadToken()
	default:
		text, err = t.dec.ReadValue()
	}
	switch {
	case err != nil:
		return nil, t.failed(err)
	case t.dec.StackDepth() > maxDepth:
		return nil, t.fail("nested deeper than %d", maxDepth)
	case t.atKey() && len(text) > maxKeyBytes:
		return nil, t.fail("a name of more than %d bytes", maxKeyBytes)
	case keep:
		err = t.put(text)
	}
	return text, err
}

// atKey says whether the last token was a key.
func (t *tokens) atKey() bool {
	in, n := t.dec.StackIndex(t.dec.StackDepth())
	return in == '{' && n%2 == 1
}

// put passes on the text that take returned last, with its comma or colon.
func (t *tokens) put(text []byte) error {
	b := t.out.AvailableBuffer()
	if t.last != 0 && t.last != '{' && t.last != '[' && t.last != ':' && text[0] != '}' && text[0] != ']' {
		b = append(b, ',')
	}
	b = append(b, text...)
	if t.atKey() {
		b = append(b, ':')
	}
	t.last = b[len(b)-1]
	if _, err := t.out.Write(b); err != nil {
		return fmt.Errorf("fields: write: %w", err)
	}
	return nil
}

// value takes the next value of any kind, token by token.
func (t *tokens) value(keep bool) error {
	for above := t.dec.StackDepth(); ; {
		if _, err := t.take(keep); err != nil || t.dec.StackDepth() <= above {
			return err
		}
	}
}

// list takes an object or a list, and calls item for each member or element.
func (t *tokens) list(begin jsontext.Kind, keep bool, item func() error) error {
	if kind, err := t.peek(); err != nil {
		return err
	} else if kind != begin {
		return t.fail("something else in place of %q", begin)
	}
	_, err := t.take(keep)
	for err == nil && t.dec.PeekKind() != begin+2 { // '}' or ']'
		err = item()
	}
	if err != nil {
		return err
	}
	_, err = t.take(keep)
	return err
}

// text takes a string or a key. It returns the text as it is written, valid until the next
// call, and its meaning.
func (t *tokens) text() (written []byte, says string, err error) {
	if written, err = t.take(false); err != nil {
		return nil, "", err
	}
	if t.said, err = jsontext.AppendUnquote(t.said[:0], written); err != nil {
		return nil, "", t.failed(err)
	}
	return written, string(t.said), nil
}

// end fails if anything but white space follows.
func (t *tokens) end() error {
	switch _, err := t.dec.ReadToken(); err {
	case nil:
		return t.fail("something after the document")
	case io.EOF: //nolint:errorlint // as in failed
		return nil
	default:
		return t.failed(err)
	}
}
