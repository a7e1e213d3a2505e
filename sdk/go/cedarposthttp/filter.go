package cedarposthttp

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"mime"
	"net/http"
	"slices"
	"strings"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/enforce"
	"github.com/cedarpost/cedarpost/sdk/go/fields"
)

// filter runs the handler and reduces its answer to the permitted fields. The body streams:
// the handler writes into a pipe, and only the filter writes to the client. If the answer
// turns out not to be JSON after its beginning was sent, the connection is cut off, so that
// no client takes the part for the whole.
//
// The handler does not get the client's conditions and ranges. Even if the data did not
// change, the fields that the user may see may have changed. And whether a guessed ETag
// matches would reveal what is in the data.
//
// Headers that depend on the whole body, such as ETag, are removed from the answer and from
// informational answers before it. Trailers are removed too.
//
// The handler's writer cannot be flushed, hijacked or unwrapped, because each would bypass
// the filter.
func (c *compiled) filter(w http.ResponseWriter, r *http.Request, result cedarpost.Result) {
	r.Header = r.Header.Clone()
	for _, name := range []string{"If-Match", "If-None-Match", "If-Modified-Since", "If-Unmodified-Since", "If-Range", "Range"} {
		r.Header.Del(name)
	}
	before := w.Header().Clone()
	body, pipe := io.Pipe()
	f := &filtered{to: w, head: r.Method == http.MethodHead, own: w.Header().Clone(), pipe: pipe, done: make(chan error, 1)}
	if f.own == nil {
		f.own = http.Header{}
	}
	permitted := result.Fields()
	f.start = func() {
		go func() {
			err := c.pass(f, body, permitted)
			_ = body.CloseWithError(err) // the handler may still write
			f.done <- err
		}()
	}
	finished := false
	defer func() {
		if !finished { // the handler panicked: net/http cuts the answer off
			_ = pipe.CloseWithError(errPanic)
			_ = f.wait() // the panic says more than this error
		}
	}()
	c.next.ServeHTTP(f, r)
	finished = true
	_ = pipe.Close()
	if err := f.wait(); err != nil {
		c.guard.Refuse(c.pattern, &enforce.Refusal{Kind: enforce.Fault, Err: fmt.Errorf("the answer cannot be filtered: %w", err)})
		if f.committed {
			panic(http.ErrAbortHandler)
		}
		clear(w.Header()) // an informational answer may have left headers in it
		maps.Copy(w.Header(), before)
		refuse(w, r, &enforce.Refusal{Kind: enforce.Fault})
		return
	}
	f.commit() // needed for an answer without a body
}

// pass filters the body of an answer. It runs in a goroutine of its own, where a panic would
// end the program.
func (c *compiled) pass(f *filtered, body io.Reader, permitted cedarpost.Fields) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic: %v", r)
		}
	}()
	dropped, err := fields.New(permitted.Permitted(), permitted.Denied()).JSON(committing{f}, body)
	c.guard.Dropped(c.pattern, dropped)
	return err
}

var errPanic = errors.New("the handler panicked")

// filtered is the writer of a handler whose answer is filtered. The handler's goroutine owns
// all fields before start and after wait. In between, the filter's goroutine owns to and
// committed.
type filtered struct {
	to    http.ResponseWriter
	head  bool // the request is HEAD: the body is not sent
	own   http.Header
	pipe  *io.PipeWriter
	start func()
	done  chan error

	status  int         // 0: the handler has not set it yet
	sent    http.Header // the handler's header when it set the status
	mode    mode
	failure error

	committed bool // status and header are sent
}

type mode uint8

const (
	undecided mode = iota
	asItIs         // not a success: the body passes unchanged
	dropping       // an answer to HEAD: the body is dropped
	filtering
	failed
)

// Header implements http.ResponseWriter.
func (f *filtered) Header() http.Header { return f.own }

// WriteHeader implements http.ResponseWriter.
func (f *filtered) WriteHeader(status int) {
	if f.status != 0 || f.mode == failed {
		return
	}
	if status >= 100 && status < 200 && status != http.StatusSwitchingProtocols {
		maps.Copy(f.to.Header(), f.own)
		strip(f.to.Header(), false)
		f.to.WriteHeader(status)
		return
	}
	f.status = status
	f.sent = f.own.Clone() // as in net/http, later changes of the header have no effect
	switch {
	case status < 100: // 0 would mean that there is no status yet
		f.fail("%d is no status", status)
	case status == http.StatusSwitchingProtocols:
		f.fail("a connection that switches protocols cannot be filtered")
	case status < 200 || status > 299:
		f.mode = asItIs
	}
}

// Write implements http.ResponseWriter.
func (f *filtered) Write(p []byte) (int, error) {
	if f.status == 0 {
		f.WriteHeader(http.StatusOK)
	}
	if f.mode == undecided {
		f.decide()
	}
	switch f.mode {
	case failed:
		return 0, f.failure
	case dropping:
		return len(p), nil
	case filtering:
		return f.pipe.Write(p)
	case asItIs, undecided:
	}
	f.commit()
	return f.to.Write(p)
}

func (f *filtered) fail(format string, args ...any) {
	f.mode, f.failure = failed, fmt.Errorf(format, args...)
}

// decide checks, before the first byte of the body, whether the body can be filtered.
func (f *filtered) decide() {
	types := f.sent.Values("Content-Type")
	var media string
	if len(types) == 1 {
		if parsed, _, err := mime.ParseMediaType(types[0]); err == nil {
			media = parsed
		}
	}
	switch {
	case media != "application/json" && !strings.HasSuffix(media, "+json"):
		f.fail("its Content-Type is %q, not JSON", types)
	case f.status == http.StatusPartialContent:
		f.fail("it is a part of a document")
	case f.sent.Get("Content-Encoding") != "":
		f.fail("it is encoded as %q", f.sent.Get("Content-Encoding"))
	case f.head:
		f.mode = dropping
	default:
		f.mode = filtering
		f.start()
	}
}

// wait waits for the end of the answer and returns the reason if it cannot be sent.
func (f *filtered) wait() error {
	if f.mode == filtering {
		return <-f.done
	}
	return f.failure
}

// ofTheWhole are headers that depend on the whole body, and so reveal something of the
// removed parts: length, validators, digests and signatures.
var ofTheWhole = []string{
	"Content-Length", "Etag", "Last-Modified", "Accept-Ranges", "Content-Range", "Content-Md5", "Digest", "Content-Digest", "Repr-Digest",
	"Unencoded-Digest", "Delta-Base", "Signature", "Signature-Input", "Trailer",
}

// strip removes the headers of ofTheWhole, and trailers. With length, Content-Length stays.
func strip(h http.Header, length bool) {
	maps.DeleteFunc(h, func(name string, _ []string) bool {
		if strings.HasPrefix(name, http.TrailerPrefix) {
			return true
		}
		name = http.CanonicalHeaderKey(name) // a handler may have set it as "ETag"
		return slices.Contains(ofTheWhole, name) && !(length && name == "Content-Length")
	})
}

// commit sends status and header, once.
func (f *filtered) commit() {
	if f.committed {
		return
	}
	f.committed = true
	if f.status == 0 {
		f.WriteHeader(http.StatusOK)
	}
	h := f.to.Header()
	clear(h)
	maps.Copy(h, f.sent)
	// An answer such as 304, 412 or 416 can have headers of the document that a 200 would
	// have sent. The Content-Length of a 304 is one of them; others have a body of their own.
	strip(h, f.mode == asItIs && f.status != http.StatusNotModified)
	if f.mode != asItIs && h.Get("Cache-Control") == "" {
		h.Set("Cache-Control", "private") // another user may see other fields
	}
	f.to.WriteHeader(f.status)
}

// committing is the filter's output. It sends the header before the first byte.
type committing struct{ *filtered }

func (c committing) Write(p []byte) (int, error) {
	c.commit()
	return c.to.Write(p)
}
