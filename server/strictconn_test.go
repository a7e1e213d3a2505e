package server

import (
	"bufio"
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/store/storetest"
)

// framed are requests as they are on the wire, and whether they are accepted.
var framed = map[string]struct {
	wire string
	ok   bool
}{
	"no body":                  {"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n", true},
	"HTTP/1.0":                 {"GET /livez HTTP/1.0\r\n\r\n", true},
	"a body":                   {"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", true},
	"no bytes":                 {"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", true},
	"chunks":                   {"GET /livez HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0A\r\n0123456789\r\n0\r\n\r\n", true},
	"a padded size":            {"GET /livez HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n3 \t\r\nabc\r\n0\r\n\r\n", true},
	"trailers":                 {"GET /livez HTTP/1.1\r\nHost: x\r\nTransfer-Encoding:Chunked\r\n\r\n0\r\nX: y\r\n\r\n", true},
	"both lengths":             {"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", false},
	"both, the other first":    {"GET /livez HTTP/1.1\r\nHost: x\r\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n0\r\n\r\n", false},
	"one length twice":         {"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nContent-Length: 0\r\n\r\n", false},
	"a list of lengths":        {"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: 0, 0\r\n\r\n", false},
	"a length with a sign":     {"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: +0\r\n\r\n", false},
	"another encoding":         {"GET /livez HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", false},
	"an encoding of HTTP/1.0":  {"GET /livez HTTP/1.0\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", false},
	"a folded header":          {"GET /livez HTTP/1.1\r\nHost: x\r\nX: a\r\n b\r\n\r\n", false},
	"a folded length":          {"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length:\r\n\t0\r\n\r\n", false},
	"a fold after the request": {"GET /livez HTTP/1.1\r\n Host: x\r\n\r\n", false},
	"space before the colon":   {"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length : 0\r\n\r\n", false},
	"a bare LF":                {"GET /livez HTTP/1.1\r\nHost: x\nContent-Length: 0\r\n\r\n", false},
	"bare LF everywhere":       {"GET /livez HTTP/1.1\nHost: x\n\n", false},
	"a bare LF at the end":     {"GET /livez HTTP/1.1\r\nHost: x\r\n\n", false},
	"a bare CR":                {"GET /livez HTTP/1.1\r\nHost: x\r\nX: a\rContent-Length: 0\r\n\r\n", false},
	"NUL":                      {"GET /livez HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n", false},
	"a bare LF in a chunk":     {"GET /livez HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\na\r\n0\r\n\r\n", false},
	"a chunk extension":        {"GET /livez HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1;x=y\r\na\r\n0\r\n\r\n", false},
	"a long chunk":             {"GET /livez HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n", false},
	"no version":               {"GET /livez\r\n\r\n", false},
	"half of a preface":        {"PRI * HTTP/2.0\r\n\r\nGET /livez HTTP/1.1\r\n\r\n", false},
	"a preface too late":       {"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" + preface, false},
}

// ends returns where requests end, by the framing of strictConn.
func ends(wire []byte, step int) (at []int, err error) {
	var f framing
	for i := 0; i < len(wire); {
		n := min(step, len(wire)-i)
		if err := f.check(wire[i : i+n]); err != nil {
			return at, err
		}
		if i += n; f.part == requestLine && len(f.line) == 0 && step == 1 {
			at = append(at, i)
		}
	}
	return at, nil
}

func TestFraming(t *testing.T) {
	for name, c := range framed {
		// A second request comes behind it, and the bytes come in pieces of any length.
		wire := []byte(c.wire + "GET /second HTTP/1.1\r\nHost: x\r\n\r\n")
		for step := 1; step <= len(wire); step++ {
			if _, err := ends(wire, step); (err == nil) != c.ok {
				t.Errorf("%s, %d bytes at once: %v", name, step, err)
				break
			}
		}
	}
	if _, err := ends([]byte("GET / HTTP/1.1\r\nX: "+strings.Repeat("x", maxLine)), 4096); err == nil {
		t.Error("a line without an end is kept")
	}
	var f framing
	if err := f.check([]byte(preface + "\x00\x00\n\r")); err != nil || f.part != http2 {
		t.Errorf("HTTP/2: %v, part %d", err, f.part)
	}
}

// FuzzFraming compares with net/http: each request that both accept ends at the same byte.
func FuzzFraming(f *testing.F) {
	for _, c := range framed {
		f.Add([]byte(c.wire + "GET /second HTTP/1.1\r\nHost: x\r\n\r\n"))
	}
	f.Fuzz(func(t *testing.T, wire []byte) {
		if bytes.HasPrefix(wire, []byte(preface)) {
			return
		}
		at, bad := ends(wire, 1)
		if _, err := ends(wire, 7); (err == nil) != (bad == nil) {
			t.Fatalf("it depends on the pieces: %v, %v", err, bad)
		}
		r := bytes.NewReader(wire)
		b := bufio.NewReader(r)
		for _, end := range at {
			req, err := http.ReadRequest(b)
			if err != nil {
				return
			}
			if _, err := io.Copy(io.Discard, req.Body); err != nil {
				return
			}
			if got := len(wire) - r.Len() - b.Buffered(); got != end {
				t.Fatalf("%q: net/http ends a request at %d, the framing at %v", wire, got, at)
			}
		}
	})
}

// exchange sends bytes and returns all that is answered until the connection ends.
func exchange(t *testing.T, dial func() (net.Conn, error), wire string) []byte {
	t.Helper()
	conn, err := dial()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, wire); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(conn)
	if err != nil && len(got) == 0 { // the server may close while bytes are left
		t.Errorf("%q: %v", wire, err)
	}
	return got
}

// The server refuses what a proxy may frame in another way, on both planes, closes the
// connection, and does not answer a request that is hidden in such a one.
func TestAttackRequestSmuggling(t *testing.T) {
	_, _, _, addr, _ := hurriedPlane(t, "ops", defaultTimeouts)
	dial := func() (net.Conn, error) { return net.Dial("tcp", addr) }
	refused := 0
	for name, c := range framed {
		got := string(exchange(t, dial, c.wire+"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))
		first, second := strings.Count(got, "HTTP/1.1 200 OK")+strings.Count(got, "HTTP/1.0 200 OK"), strings.Count(got, " 404 Not Found")
		switch {
		case name == "a preface too late" && first == 1 && strings.Count(got, "HTTP/1.1 400 Bad Request") == 1: // behind a good request
		case name == "HTTP/1.0" && first == 1 && second == 0: // the connection ends after it
		case c.ok && first == 1 && second == 1:
		case strings.Contains(c.wire, "chunked\r\n\r\n1") && second == 0: // the answer may come before the body is read
			refused++
		case !c.ok && first == 0 && second == 0 && strings.HasPrefix(got, "HTTP/1.1 4"):
			refused++
		default:
			t.Errorf("%s: answered %q", name, got)
		}
	}
	t.Logf("%d ways to hide a request: all refused", refused)
}

// With TLS, HTTP/1 is as strict, and HTTP/2 is served.
func TestStrictOverTLS(t *testing.T) {
	cert, key := newPair(t, t.TempDir(), "localhost")
	_, _, _, addr, _ := hurriedOn(t, storetest.New(t), "decision", Config{times: defaultTimeouts, TLSCert: cert, TLSKey: key})
	config := &tls.Config{InsecureSkipVerify: true}
	dial := func() (net.Conn, error) { return tls.Dial("tcp", addr, config) }
	for name, c := range framed {
		got := string(exchange(t, dial, c.wire+"GET /nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))
		least, most := 2, 2 // answers: the decision plane has none of the two paths
		switch {
		case name == "HTTP/1.0": // the connection ends after it
			least, most = 1, 1
		case name == "a preface too late", !c.ok && strings.Contains(c.wire, "chunked\r\n\r\n1"):
			least, most = 0, 1 // the first one may be answered before the fault comes
		case !c.ok:
			least, most = 0, 0
		}
		if n := strings.Count(got, "404 Not Found"); n < least || n > most || most == 0 && !strings.HasPrefix(got, "HTTP/1.1 400 ") {
			t.Errorf("%s: answered %q", name, got)
		}
	}
	for _, version := range []string{"HTTP/1.1", "HTTP/2.0"} {
		protocols := new(http.Protocols)
		protocols.SetHTTP1(version == "HTTP/1.1")
		protocols.SetHTTP2(version == "HTTP/2.0")
		transport := &http.Transport{TLSClientConfig: config.Clone(), Protocols: protocols}
		t.Cleanup(transport.CloseIdleConnections)
		res, err := (&http.Client{Transport: transport}).Post("https://"+addr+"/grpc.health.v1.Health/Check", "application/json", strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		_ = res.Body.Close()
		if res.Proto != version || res.StatusCode != http.StatusOK {
			t.Errorf("%s: %s, %d", version, res.Proto, res.StatusCode)
		}
	}
	plain := string(exchange(t, func() (net.Conn, error) { return net.Dial("tcp", addr) }, "GET / HTTP/1.1\r\n\r\n"))
	if !strings.Contains(plain, "HTTP request to an HTTPS server") {
		t.Errorf("without TLS: %q", plain)
	}
}
