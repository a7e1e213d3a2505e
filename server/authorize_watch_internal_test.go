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

// One who does not read is cut off, with a reset for a last message. Others hear
// everything meanwhile.
func TestSlowWatcher(t *testing.T) {
	t.Parallel() // it takes long
	times := defaultTimeouts
	times.message = 10 * time.Minute // the place in the buffers is to run out, and not the time
	database := storetest.New(t)
	s, _, clients, _, _ := hurriedOn(t, database, "decision", Config{times: times})
	conn, err := pgx.Connect(t.Context(), database)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	for i, c := range clients {
		t.Run(wires[i].name, func(t *testing.T) {
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
			slow, at := watch(c)
			quick, _ := watch(clients[2])
			defer leave(t, s)
			defer func() { _ = quick.Close() }()
			// Until the buffers of both sides are full, and the slow watcher is behind.
			for cuts := gauge(t, s, "cedarpost_watchers_cut_total"); gauge(t, s, "cedarpost_watchers_cut_total") == cuts; {
				newest := changeMany(t, conn)
				m, err := quick.Receive()
				if err != nil || m.Revision.Number != newest || m.Reset_ || len(m.Tags) != manyTags {
					t.Fatalf("%d tags of %v, %v", len(m.GetTags()), m.GetRevision(), err)
				}
			}
			var last *cedarpostv1.WatchResponse
			for {
				m, err := slow.Receive()
				if err != nil {
					if connect.CodeOf(err) != connect.CodeResourceExhausted || errors.Is(err, io.EOF) {
						t.Errorf("ended with %v", err)
					}
					break
				}
				if m.After != at {
					t.Errorf("revision %d comes after %d", m.After, at)
				}
				last, at = m, m.Revision.Number
			}
			if !last.GetReset_() || len(last.GetTags()) > 0 {
				t.Errorf("the last message is of %v, and no reset", last.GetRevision())
			}
		})
	}
}

// Where nothing changes, a watcher hears that the connection lives.
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

// leave waits until all who hung up have left their places.
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

// manyTags is how many entities an event can name.
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

// There is room for so many, and then for no more.
func TestTooManyWatchers(t *testing.T) {
	_, _, clients, _, _ := hurriedOn(t, storetest.New(t), "decision", Config{maxWatchers: 2})
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
