package server

import (
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/jackc/pgx/v5"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// A watcher that does not read is cut off, in each protocol, and its last message is a
// reset. Another watcher gets everything meanwhile.
func TestSlowWatcher(t *testing.T) {
	t.Parallel() // it takes long
	times := defaultTimeouts
	times.message, times.answer = 10*time.Minute, 10*time.Minute // a message that cannot be sent must wait until the watcher reads
	database := storetest.New(t)
	s, _, clients, _, _ := hurriedOn(t, database, "decision", Config{times: times})
	conn, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	watch := func(c *connect.Client) (stream cedarpostv1connect.AuthorizationServiceWatchClientStream, at int64) {
		stream, err := cedarpostv1connect.NewAuthorizationServiceClient(c).Watch(t.Context(), &cedarpostv1.WatchRequest{})
		if err != nil {
			t.Fatal(err)
		}
		m, err := stream.Receive()
		if err != nil {
			t.Fatal(err)
		}
		return stream, m.Revision.Number
	}
	quick, began := watch(clients[2])
	var slow []cedarpostv1connect.AuthorizationServiceWatchClientStream
	for _, c := range clients {
		stream, _ := watch(c)
		slow = append(slow, stream)
	}
	// The server keeps 20 such events. A slow watcher has fewer than ten in its buffers, and
	// may have taken 20 more before it was blocked.
	for range 60 {
		newest := changeMany(t, conn)
		m, err := quick.Receive()
		if err != nil || m.Revision.Number != newest || m.Reset_ || len(m.Tags) != manyTags {
			t.Fatalf("%d tags of %v, %v", len(m.GetTags()), m.GetRevision(), err)
		}
	}
	for i, stream := range slow {
		at := began
		var last *cedarpostv1.WatchResponse
		for {
			m, err := stream.Receive()
			if err != nil {
				if connect.CodeOf(err) != connect.CodeResourceExhausted || errors.Is(err, io.EOF) {
					t.Errorf("%s: ended with %v", wires[i].name, err)
				}
				break
			}
			if m.After != at {
				t.Errorf("%s: revision %d comes after %d", wires[i].name, m.After, at)
			}
			last, at = m, m.Revision.Number
		}
		if !last.GetReset_() || len(last.GetTags()) > 0 {
			t.Errorf("%s: the last message is of %v, and no reset", wires[i].name, last.GetRevision())
		}
	}
	if cuts := gauge(t, s, "cedarpost_watchers_cut_total"); cuts != float64(len(slow)) {
		t.Errorf("%v watchers were cut off", cuts)
	}
	_ = quick.Close()
	leave(t, s)
}

// While nothing changes, a watcher gets heartbeats.
func TestWatchHeartbeat(t *testing.T) {
	times := defaultTimeouts
	times.heartbeat = 20 * time.Millisecond
	s, _, clients, _, _ := hurriedPlane(t, "decision", times)
	for i, c := range clients {
		stream, err := cedarpostv1connect.NewAuthorizationServiceClient(c).Watch(t.Context(), &cedarpostv1.WatchRequest{})
		if err != nil {
			t.Fatal(err)
		}
		for n := range 5 {
			m, err := stream.Receive()
			if err != nil || m.After != m.Revision.Number || m.Reset_ || len(m.Tags) > 0 {
				t.Errorf("%s, message %d: %v, %v", wires[i].name, n, m, err)
			}
		}
		_ = stream.Close()
	}
	leave(t, s)
}

// leave waits until the server has noticed that all watchers hung up.
func leave(t *testing.T, s *Server) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if gauge(t, s, "cedarpost_watchers") == 0 {
			return
		}
	}
	t.Error("their places are still taken")
}

// gauge reads a metric that has no labels.
func gauge(t *testing.T, s *Server, name string) float64 {
	t.Helper()
	families, err := s.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			return f.Metric[0].GetGauge().GetValue() + f.Metric[0].GetCounter().GetValue()
		}
	}
	t.Fatalf("there is no metric %s", name)
	return 0
}

// manyTags is how many tags an event can have.
const manyTags = 10_000

// changeMany makes a revision that changes many entities, and returns its number.
func changeMany(t *testing.T, conn *pgx.Conn) (number int64) {
	t.Helper()
	err := pgx.BeginFunc(t.Context(), conn, func(tx pgx.Tx) error {
		if err := tx.QueryRow(t.Context(), "update revision set n = n + 1 returning n").Scan(&number); err != nil {
			return err
		}
		if _, err := tx.Exec(t.Context(), "insert into revisions (n, caller) values ($1, 'test')", number); err != nil {
			return err
		}
		_, err := tx.Exec(t.Context(), `insert into revision_entries (revision, kind, type, id)
			select $1, $2, 'U', n::text from generate_series(1, $3) n`, number, store.KindEntity, manyTags)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return number
}

// The number of watches of one caller is bounded.
func TestTooManyWatchers(t *testing.T) {
	_, _, clients, _, _ := hurriedOn(t, storetest.New(t), "decision", Config{maxWatchers: 4})
	c := cedarpostv1connect.NewAuthorizationServiceClient(clients[2])
	for n := range 3 {
		stream, err := c.Watch(t.Context(), &cedarpostv1.WatchRequest{})
		if err == nil {
			_, err = stream.Receive()
		}
		if code := connect.CodeOf(err); (n < 2) != (err == nil) || err != nil && code != connect.CodeResourceExhausted {
			t.Errorf("watcher %d: %v", n, err)
		}
	}
}
