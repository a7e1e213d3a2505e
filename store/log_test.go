package store_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// deafProxy forwards everything to Postgres and back. If it is told to lose answers, it
// closes the connection as soon as the server has answered.
func deafProxy(t *testing.T, databaseURL string) (proxied string, lose *atomic.Bool) {
	t.Helper()
	u, err := url.Parse(databaseURL)
	if err != nil {
		t.Fatal(err)
	}
	server := u.Host
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	lose = new(atomic.Bool)
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			upstream, err := net.Dial("tcp", server)
			if err != nil {
				_ = client.Close()
				continue
			}
			go func() { _, _ = io.Copy(upstream, client); _ = upstream.Close() }()
			go func() {
				defer func() { _ = client.Close() }()
				buf := make([]byte, 64<<10)
				for {
					n, err := upstream.Read(buf)
					if err != nil || lose.Load() {
						return
					}
					if _, err := client.Write(buf[:n]); err != nil {
						return
					}
				}
			}()
		}
	}()
	u.Host = l.Addr().String()
	return u.String(), lose
}

func count(t *testing.T, url, sql string, args ...any) (n int) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), url)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	if err := conn.QueryRow(t.Context(), sql, args...).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

// If the reply to a commit is lost, the writer finds out that the commit happened, and
// the log has the batch once.
func TestLostReply(t *testing.T) {
	_, url := openURL(t)
	proxied, lose := deafProxy(t, url)
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(proxied)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(db.Close)
	w := db.NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(w.Close)
	for i := range byte(10) {
		// Some replies are lost, and the network works again a little later.
		var back sync.WaitGroup
		if i%2 == 1 {
			lose.Store(true)
			back.Go(func() { time.Sleep(100 * time.Millisecond); lose.Store(false) })
		}
		done, err := w.Append(t.Context(), []store.Decision{decision(time.Now(), i)}, nil)
		if err != nil || done.Leaf != int64(i) {
			t.Errorf("batch %d: %+v, %v", i, done, err)
		}
		back.Wait()
	}
	if n := count(t, url, "select count(*) from decisions"); n != 10 {
		t.Errorf("%d rows", n)
	}
	if n := count(t, url, "select count(*) from audit_batches"); n != 10 {
		t.Errorf("%d batches", n)
	}

	// If the network does not work again, Append returns an error in bounded time, and
	// the log has the batch once at most.
	lose.Store(true)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := w.Append(ctx, []store.Decision{decision(time.Now(), 77)}, nil); err == nil {
		t.Error("recorded, without a reply")
	}
	lose.Store(false)
	if _, err := w.Append(t.Context(), []store.Decision{decision(time.Now(), 78)}, nil); err != nil {
		t.Error(err)
	}
	if n := count(t, url, "select count(*) from decisions"); n != 11 && n != 12 {
		t.Errorf("%d rows", n)
	}
}

// A clock that was set back does not change the order of the log. A clock that is far off
// is refused before anything is answered.
func TestClockSetBack(t *testing.T) {
	db := storetest.Open(t)
	w := db.NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(w.Close)
	now := time.Now()
	for i, at := range []time.Time{now, now.Add(-time.Hour), now.Add(-20 * time.Hour), now.Add(time.Hour)} {
		done, err := w.Append(t.Context(), []store.Decision{decision(at, byte(i))}, nil)
		if err != nil || done.Leaf != int64(i) {
			t.Errorf("%v: %+v, %v", at, done, err)
		}
	}
	if _, err := w.Append(t.Context(), []store.Decision{decision(now.AddDate(0, -2, 0), 9)}, nil); !errors.Is(err, store.ErrNoPartition) {
		t.Errorf("two months ago: %v", err)
	}
	if done, err := w.Append(t.Context(), []store.Decision{decision(now, 10)}, nil); err != nil || done.Leaf != 4 {
		t.Errorf("%+v, %v", done, err)
	}
}

// The next writer of a server names a writer that ended without Close. It does not name
// one that is alive or closed.
func TestUncleanEnd(t *testing.T) {
	db, url := openURL(t)
	append1 := func(w *store.LogWriter, n byte) auditlog.Header {
		t.Helper()
		done, err := w.Append(t.Context(), []store.Decision{decision(time.Now(), n)}, nil)
		if err != nil {
			t.Fatal(err)
		}
		batches, err := db.Batches(t.Context(), done.Leaf, 1)
		if err != nil {
			t.Fatal(err)
		}
		h, err := auditlog.ParseHeader(batches[0].Header)
		if err != nil {
			t.Fatal(err)
		}
		return h
	}
	alive := db.NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(alive.Close)
	append1(alive, 1)
	alivePID := fmt.Sprint(count(t, url, "select pid from pg_locks where locktype = 'advisory' and database = "+
		"(select oid from pg_database where datname = current_database())"))
	closed := db.NewLogWriter("s1", auditlog.Strict, 0)
	append1(closed, 2)
	closed.Close()
	crashed := db.NewLogWriter("s1", auditlog.Buffered, 500)
	crashedHeader := append1(crashed, 3)
	// The session of the closed writer may still be ending. This waits until both
	// sessions have ended.
	mustRaw(t, url, "select pg_terminate_backend(pid, 60000) from pg_locks where locktype = 'advisory' and database = "+
		"(select oid from pg_database where datname = current_database()) and pid <> "+alivePID)
	next := db.NewLogWriter("s1", auditlog.Strict, 0)
	t.Cleanup(next.Close)
	h := append1(next, 4)
	if len(h.Unclean) != 1 || h.Unclean[0] != (auditlog.Unclean{Writer: crashedHeader.Writer, Lost: 500}) {
		t.Errorf("the next batch names %v, want %v", h.Unclean, crashedHeader.Writer)
	}
	other := db.NewLogWriter("s2", auditlog.Strict, 0)
	t.Cleanup(other.Close)
	if h := append1(other, 60); len(h.Unclean) != 0 {
		t.Errorf("another server names %v", h.Unclean)
	}
}
