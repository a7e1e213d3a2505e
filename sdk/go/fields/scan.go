package fields

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"unicode/utf8"
)

const (
	maxKeyBytes    = 64 << 10
	maxNumberBytes = 1 << 10
)

// scanner reads one JSON document (RFC 8259) and passes its text on, unchanged but
// for white space between tokens. It is not json.Decoder because that replaces bad
// UTF-8 and lone surrogates without a word, holds each string as a whole, and writes
// strings anew; here what was judged is, byte for byte, what is passed on.
type scanner struct {
	src    io.Reader
	err    error  // of src
	buf    []byte // the next bytes are buf[at:]
	at     int
	before int64 // bytes that have left buf
	depth  int
	text   text // the last key or number
}

func newScanner(src io.Reader) *scanner {
	return &scanner{src: src, buf: make([]byte, 0, 8<<10)}
}

// fail makes an error that says where, and quotes no value: that may be one that the
// reader of the error must not see.
func (s *scanner) fail(format string, args ...any) error {
	return fmt.Errorf("fields: JSON, byte %d: %w", s.before+int64(s.at), fmt.Errorf(format, args...))
}

// fill reads until n bytes are there, or there are no more. n is small.
func (s *scanner) fill(n int) {
	s.before += int64(s.at)
	s.buf, s.at = s.buf[:copy(s.buf, s.buf[s.at:])], 0
	for empty := 0; len(s.buf) < n && s.err == nil; {
		var got int
		got, s.err = s.src.Read(s.buf[len(s.buf):cap(s.buf)])
		s.buf = s.buf[:len(s.buf)+got]
		if empty++; got > 0 {
			empty = 0
		} else if empty == 100 {
			s.err = io.ErrNoProgress
		}
	}
}

// peek looks at the next n bytes, or fails.
func (s *scanner) peek(n int) ([]byte, error) {
	if len(s.buf)-s.at < n {
		if s.fill(n); len(s.buf) < n {
			return nil, s.ended()
		}
	}
	return s.buf[s.at : s.at+n], nil
}

// ended says why there are no more bytes.
func (s *scanner) ended() error {
	if s.err == io.EOF { //nolint:errorlint // as io.Reader has it; one that is wrapped is a failure
		return s.fail("%w", io.ErrUnexpectedEOF)
	}
	return s.fail("%w", s.err)
}

// take passes the next bytes on, which were looked at.
func (s *scanner) take(p []byte, to io.Writer) error {
	if t, ok := to.(*text); ok && len(*t)+len(p) > maxKeyBytes {
		return s.fail("a name of more than %d bytes", maxKeyBytes)
	}
	if _, err := to.Write(p); err != nil {
		return fmt.Errorf("fields: write: %w", err)
	}
	s.at += len(p)
	return nil
}

// next is the next byte that is not white space. It is not taken.
func (s *scanner) next() (byte, error) {
	for {
		for ; s.at < len(s.buf); s.at++ {
			switch c := s.buf[s.at]; c {
			case ' ', '\t', '\r', '\n':
			default:
				return c, nil
			}
		}
		if _, err := s.peek(1); err != nil {
			return 0, err
		}
	}
}

// end fails unless nothing but white space follows.
func (s *scanner) end() error {
	c, err := s.next()
	switch {
	case err == nil:
		return s.fail("%q after the document", c)
	case s.err == io.EOF: //nolint:errorlint // as in ended
		return nil
	}
	return err
}

// value passes on the value that comes next, whatever it is.
func (s *scanner) value(to io.Writer) error {
	c, err := s.next()
	if err != nil {
		return err
	}
	switch c {
	case '{':
		out := brackets{to: to, pair: "{}"}
		return out.close(s.object(func(key []byte) error {
			if err := out.member(key); err != nil {
				return err
			}
			return s.value(to)
		}))
	case '[':
		out := brackets{to: to, pair: "[]"}
		return out.close(s.array(func() error {
			if err := out.element(); err != nil {
				return err
			}
			return s.value(to)
		}))
	case '"':
		return s.str(to)
	case 't':
		return s.word("true", to)
	case 'f':
		return s.word("false", to)
	case 'n':
		return s.word("null", to)
	}
	return s.number(to)
}

// object reads an object. It calls member with each key, as it is written and good
// until the next one is read; member reads the value.
func (s *scanner) object(member func(key []byte) error) error {
	return s.list('{', '}', func() error {
		if c, err := s.next(); err != nil {
			return err
		} else if c != '"' {
			return s.fail("%q where a key begins", c)
		}
		s.text = s.text[:0]
		if err := s.str(&s.text); err != nil {
			return err
		}
		if c, err := s.next(); err != nil {
			return err
		} else if c != ':' {
			return s.fail("%q after a key", c)
		}
		s.at++
		return member(s.text)
	})
}

// array reads an array; element reads each element.
func (s *scanner) array(element func() error) error { return s.list('[', ']', element) }

func (s *scanner) list(open, end byte, item func() error) error {
	if s.depth++; s.depth > maxDepth {
		return s.fail("nested deeper than %d", maxDepth)
	}
	if c, err := s.next(); err != nil {
		return err
	} else if c != open {
		return s.fail("%q in place of %q", c, open)
	}
	s.at++
	for first := true; ; first = false {
		c, err := s.next()
		if err != nil {
			return err
		}
		if c == end {
			break
		}
		if !first {
			if c != ',' {
				return s.fail("%q in place of %q or %q", c, ',', end)
			}
			s.at++
		}
		if err := item(); err != nil {
			return err
		}
	}
	s.at++
	s.depth--
	return nil
}

// str passes a string on, quotes included, in pieces. What it decodes to is Unicode,
// so that no two readers can make different names or values of it.
func (s *scanner) str(to io.Writer) error {
	quote, err := s.peek(1)
	if err != nil {
		return err
	}
	if err := s.take(quote, to); err != nil {
		return err
	}
	for {
		if _, err := s.peek(1); err != nil {
			return err
		}
		ahead := s.buf[s.at:]
		n := 0
		for n < len(ahead) && ahead[n] >= ' ' && ahead[n] < utf8.RuneSelf && ahead[n] != '"' && ahead[n] != '\\' {
			n++
		}
		if n > 0 {
			if err := s.take(ahead[:n], to); err != nil {
				return err
			}
			continue
		}
		switch c := ahead[0]; {
		case c == '"':
			return s.take(ahead[:1], to)
		case c == '\\':
			err = s.escape(to)
		case c < ' ':
			return s.fail("control character %q in a string", c)
		default:
			err = s.char(to)
		}
		if err != nil {
			return err
		}
	}
}

// char passes on one character beyond ASCII.
func (s *scanner) char(to io.Writer) error {
	if !utf8.FullRune(s.buf[s.at:]) {
		s.fill(utf8.UTFMax)
	}
	p := s.buf[s.at:]
	r, n := utf8.DecodeRune(p)
	switch {
	case r != utf8.RuneError || n > 1:
		return s.take(p[:n], to)
	case !utf8.FullRune(p):
		return s.ended()
	}
	return s.fail("bad UTF-8")
}

func (s *scanner) escape(to io.Writer) error {
	p, err := s.peek(2)
	if err != nil {
		return err
	}
	if p[1] != 'u' {
		if bytes.IndexByte([]byte(`"\/bfnrt`), p[1]) < 0 {
			return s.fail("bad escape")
		}
		return s.take(p, to)
	}
	if p, err = s.peek(6); err != nil {
		return err
	}
	r, ok := hex4(p[2:])
	if !ok {
		return s.fail("bad escape")
	}
	if r >= 0xd800 && r < 0xe000 { // half of a pair
		if p, err = s.peek(12); err != nil {
			return err
		}
		low, ok := hex4(p[8:])
		if r >= 0xdc00 || p[6] != '\\' || p[7] != 'u' || !ok || low < 0xdc00 || low >= 0xe000 {
			return s.fail("half of a surrogate pair")
		}
	}
	return s.take(p, to)
}

func hex4(p []byte) (r rune, ok bool) {
	for _, c := range p[:4] {
		switch {
		case c >= '0' && c <= '9':
			c -= '0'
		case c >= 'a' && c <= 'f':
			c -= 'a' - 10
		case c >= 'A' && c <= 'F':
			c -= 'A' - 10
		default:
			return 0, false
		}
		r = r<<4 | rune(c)
	}
	return r, true
}

func (s *scanner) word(w string, to io.Writer) error {
	p, err := s.peek(len(w))
	if err != nil {
		return err
	}
	if string(p) != w {
		return s.fail("not a value")
	}
	return s.take(p, to)
}

// number passes a number on with the digits that it has.
func (s *scanner) number(to io.Writer) error {
	s.text = s.text[:0]
	for {
		p, err := s.peek(1)
		if err != nil || bytes.IndexByte([]byte("+-.0123456789Ee"), p[0]) < 0 {
			break // a failure to read shows when the next byte is asked for
		}
		if s.text = append(s.text, p[0]); len(s.text) > maxNumberBytes {
			return s.fail("a number of more than %d digits", maxNumberBytes)
		}
		s.at++
	}
	if !json.Valid(s.text) {
		return s.fail("not a value")
	}
	if _, err := to.Write(s.text); err != nil {
		return fmt.Errorf("fields: write: %w", err)
	}
	return nil
}

// text holds what must be seen as a whole before it is passed on.
type text []byte

func (t *text) Write(p []byte) (int, error) {
	*t = append(*t, p...)
	return len(p), nil
}

// brackets writes an object or a list around what is kept of it.
type brackets struct {
	to   io.Writer
	pair string
	open bool
}

func (b *brackets) element() error {
	before := ","
	if !b.open {
		before, b.open = b.pair[:1], true
	}
	return write(b.to, before)
}

func (b *brackets) member(key []byte) error {
	if err := b.element(); err != nil {
		return err
	}
	if _, err := b.to.Write(key); err != nil {
		return fmt.Errorf("fields: write: %w", err)
	}
	return write(b.to, ":")
}

func (b *brackets) close(err error) error {
	switch {
	case err != nil:
		return err
	case b.open:
		return write(b.to, b.pair[1:])
	}
	return write(b.to, b.pair)
}

func write(to io.Writer, s string) error {
	if _, err := io.WriteString(to, s); err != nil {
		return fmt.Errorf("fields: write: %w", err)
	}
	return nil
}

// name is what a key says. The scanner has checked it.
func name(key []byte) (string, error) {
	if bytes.IndexByte(key, '\\') < 0 {
		return string(key[1 : len(key)-1]), nil
	}
	var s string
	err := json.Unmarshal(key, &s)
	return s, err
}
