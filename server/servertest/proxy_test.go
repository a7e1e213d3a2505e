package servertest_test

import (
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cedarpost/cedarpost/server/servertest"
)

// echo is a server that sends back what it receives. It reports when a client closes the
// connection.
func echo(t *testing.T) (addr string, left chan struct{}) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	left = make(chan struct{}, 10)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(c, c)
				_ = c.Close()
				left <- struct{}{}
			}()
		}
	}()
	return l.Addr().String(), left
}

func dial(t *testing.T, addr string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// says sends a word and reads the answer for a limited time.
func says(t *testing.T, c net.Conn, word string, patience time.Duration) (string, error) {
	t.Helper()
	if _, err := io.WriteString(c, word); err != nil {
		return "", err
	}
	if err := c.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(word))
	n, err := io.ReadFull(c, got)
	return string(got[:n]), err
}

func echoes(t *testing.T, c net.Conn, word string) {
	t.Helper()
	if got, err := says(t, c, word, 10*time.Second); got != word || err != nil {
		t.Errorf("%q came back as %q, %v", word, got, err)
	}
}

// breaks fails if the connection does not break.
func breaks(t *testing.T, c net.Conn) {
	t.Helper()
	if got, err := says(t, c, "x", 10*time.Second); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("%q, %v from a connection that is cut", got, err)
	}
}

func TestProxy(t *testing.T) {
	target, left := echo(t)
	p := servertest.NewProxy(t, "postgres://me:secret@"+target+"/db?sslmode=disable")
	addr, found := strings.CutPrefix(p.URL(), "postgres://me:secret@")
	addr, rest, _ := strings.Cut(addr, "/")
	if !found || addr == target || rest != "db?sslmode=disable" {
		t.Fatalf("the URL is %s", p.URL())
	}
	open := func(n int) {
		t.Helper()
		for range 1000 {
			if p.Connections() == n {
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
		t.Errorf("%d connections, want %d", p.Connections(), n)
	}
	c := dial(t, addr)
	echoes(t, c, "hello")
	open(1)

	var drawn atomic.Int64
	p.Delay(func() time.Duration { drawn.Add(1); return 30 * time.Millisecond })
	began := time.Now()
	echoes(t, c, "late")
	if took := time.Since(began); drawn.Load() == 0 || took < 30*time.Millisecond {
		t.Errorf("%d delays, %v", drawn.Load(), took)
	}
	p.Delay(nil)

	p.Refuse(true)
	breaks(t, dial(t, addr))
	echoes(t, c, "still here")
	p.Refuse(false)

	p.Blackhole(true)
	quitter := dial(t, addr)
	for _, side := range []net.Conn{c, quitter} {
		if got, err := says(t, side, "lost", 50*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("%q, %v out of a black hole", got, err)
		}
	}
	open(2)
	_ = quitter.Close()
	select {
	case <-left:
		t.Error("the other side learned that the connection was closed")
	case <-time.After(50 * time.Millisecond):
	}
	p.Blackhole(false)
	<-left
	open(1)
	echoes(t, c, "back again")

	p.Cut()
	open(0)
	breaks(t, c)
	echoes(t, dial(t, addr), "anew")
}

// Whichever side closes, data that was sent before arrives.
func TestProxyDeliversBeforeItHangsUp(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	text := strings.Repeat("farewell ", 100_000)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(c, text)
			_ = c.Close()
		}
	}()
	p := servertest.NewProxy(t, "postgres://"+l.Addr().String())
	for range 20 {
		got, err := io.ReadAll(dial(t, strings.TrimPrefix(p.URL(), "postgres://")))
		if err != nil || string(got) != text {
			t.Fatalf("%d bytes of %d, %v", len(got), len(text), err)
		}
	}
}
