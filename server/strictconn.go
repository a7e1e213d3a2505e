package server

import (
	"bytes"
	"errors"
	"net"
	"strconv"
	"strings"
)

// preface begins a connection of HTTP/2 without TLS.
const preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

// maxLine is more than net/http reads of all headers of a request.
const maxLine = maxHeaderBytes + 8<<10

// strictConn reads the framing of HTTP/1 before net/http does, and fails at what another server
// or proxy may frame in another way: a line that ends without CR, a CR, LF or NUL inside of a line,
// a folded header, Content-Length twice or together with Transfer-Encoding, or a chunk with
// an extension. Otherwise a caller could hide a second request in the body of a first one,
// which a proxy in front of the server does not see (request smuggling). net/http answers
// such a request with 400 and closes the connection.
type strictConn struct {
	net.Conn
	framing framing
	bad     error
}

func (c *strictConn) Read(p []byte) (int, error) {
	if c.bad != nil {
		return 0, c.bad
	}
	n, err := c.Conn.Read(p)
	if c.framing.part == http2 {
		return n, err
	}
	if c.bad = c.framing.check(p[:n]); c.bad != nil {
		return 0, c.bad
	}
	return n, err
}

// CloseWrite lets net/http end an answer before the caller has sent all of its request.
func (c *strictConn) CloseWrite() error { return closeWrite(c.Conn) }

func closeWrite(c net.Conn) error {
	if w, ok := c.(interface{ CloseWrite() error }); ok {
		return w.CloseWrite()
	}
	return nil
}

// framing says what comes next on a connection.
type framing struct {
	part   part
	line   []byte // the current line, if a part of it has come
	remain int64  // of the body or of a chunk
	old    bool   // HTTP/1.0

	length  int64 // the Content-Length; less than 0: none
	chunked bool
}

type part int

const (
	start       part = iota // of the connection: HTTP/2, or a request line
	requestLine             // also between two requests
	headers
	content // of a known length
	chunkSize
	chunk
	chunkEnd
	trailers
	http2 // is framed by net/http alone
)

var (
	errLine    = errors.New("a line does not end with CR and LF, or has one of them or NUL inside")
	errVersion = errors.New("not a request of HTTP/1.1 or HTTP/1.0")
	errFolded  = errors.New("a header is folded or has no name")
	errLength  = errors.New("the length of the body is not given in exactly one way")
	errChunk   = errors.New("not a chunk without extensions")
	errLong    = errors.New("a line is too long")
)

// check reads the next bytes of a connection.
func (f *framing) check(p []byte) error {
	for len(p) > 0 && f.part != http2 {
		switch f.part {
		case start:
			n := len(f.line)
			if p[0] == preface[n] {
				f.line = append(f.line, p[0])
				p = p[1:]
				if n+1 == len(preface) {
					f.part, f.line = http2, nil
				}
				continue
			}
			if n >= len("PRI") {
				return errVersion
			}
			f.part = requestLine
		case content, chunk:
			n := min(f.remain, int64(len(p)))
			p = p[n:]
			if f.remain -= n; f.remain > 0 {
				return nil
			}
			if f.part == chunk {
				f.part = chunkEnd
			} else {
				f.part = requestLine
			}
		default:
			end := bytes.IndexByte(p, '\n') + 1
			whole := end > 0
			if !whole {
				end = len(p)
			}
			if len(f.line)+end > maxLine {
				return errLong
			}
			f.line = append(f.line, p[:end]...)
			p = p[end:]
			if !whole {
				return nil
			}
			if err := f.endLine(); err != nil {
				return err
			}
			f.line = f.line[:0]
		}
	}
	return nil
}

// endLine reads a whole line.
func (f *framing) endLine() error {
	line, ok := bytes.CutSuffix(f.line, []byte("\r\n"))
	if !ok || bytes.ContainsAny(line, "\r\x00") {
		return errLine
	}
	switch f.part {
	case requestLine:
		f.old = bytes.HasSuffix(line, []byte(" HTTP/1.0"))
		if !f.old && !bytes.HasSuffix(line, []byte(" HTTP/1.1")) {
			return errVersion
		}
		f.part, f.length, f.chunked = headers, -1, false
	case headers:
		if len(line) > 0 {
			return f.header(line)
		}
		f.part = requestLine
		switch {
		case f.chunked:
			f.part = chunkSize
		case f.length > 0:
			f.part, f.remain = content, f.length
		}
	case chunkSize:
		// Some senders pad the size, and net/http takes it.
		n, err := strconv.ParseUint(string(bytes.TrimRight(line, " \t")), 16, 32)
		if err != nil {
			return errChunk
		}
		f.part, f.remain = chunk, int64(n)
		if n == 0 {
			f.part = trailers
		}
	case chunkEnd:
		if len(line) > 0 {
			return errChunk
		}
		f.part = chunkSize
	case trailers:
		if len(line) == 0 {
			f.part = requestLine
			return nil
		}
		if name, _, ok := strings.Cut(string(line), ":"); !ok || name == "" || strings.ContainsAny(name, " \t") {
			return errFolded
		}
	}
	return nil
}

// header reads a header.
func (f *framing) header(line []byte) error {
	name, value, ok := bytes.Cut(line, []byte(":"))
	if !ok || len(name) == 0 || bytes.ContainsAny(name, " \t") {
		return errFolded
	}
	value = bytes.Trim(value, " \t")
	switch {
	case bytes.EqualFold(name, []byte("Content-Length")):
		n, err := strconv.ParseUint(string(value), 10, 62)
		if err != nil || f.length >= 0 || f.chunked {
			return errLength
		}
		f.length = int64(n)
	case bytes.EqualFold(name, []byte("Transfer-Encoding")):
		if f.old || f.length >= 0 || f.chunked || !bytes.EqualFold(value, []byte("chunked")) {
			return errLength
		}
		f.chunked = true
	}
	return nil
}
