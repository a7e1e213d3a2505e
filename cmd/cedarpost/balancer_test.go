package main

import (
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"
)

// balancer is a TCP load balancer. As real ones do, it asks each server for /readyz every 200 ms, gives
// a new connection to a server that is ready, tries another one if a server does not take it, and keeps
// the connections that exist.
type balancer struct {
	listener net.Listener
	plane    string
	client   http.Client
	running  sync.WaitGroup
	ended    context.Context
	stop     context.CancelFunc

	mu      sync.Mutex
	servers []*balanced
	next    int
}

// balanced is a server behind a balancer.
type balanced struct {
	daemon *daemon
	up     bool
}

const checkEvery = 200 * time.Millisecond

// newBalancer starts a balancer in front of one plane of servers. It ends with the test.
func newBalancer(t *testing.T, plane string, servers ...*daemon) *balancer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	b := &balancer{listener: l, plane: plane, client: http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}}
	b.ended, b.stop = context.WithCancel(context.Background())
	for i, d := range servers {
		b.servers = append(b.servers, &balanced{})
		b.use(i, d)
	}
	b.running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			b.running.Go(func() { b.connect(c) })
		}
	})
	t.Cleanup(func() {
		b.stop()
		_ = l.Close()
		b.running.Wait()
	})
	return b
}

func (b *balancer) url() string { return "http://" + b.listener.Addr().String() }

// use puts a server at a place, and begins to check it.
func (b *balancer) use(place int, d *daemon) {
	s := &balanced{daemon: d}
	b.check(s)
	b.mu.Lock()
	b.servers[place] = s
	b.mu.Unlock()
	b.running.Go(func() {
		for {
			select {
			case <-b.ended.Done():
				return
			case <-d.dead:
				b.mu.Lock()
				s.up = false
				b.mu.Unlock()
				return
			case <-time.After(checkEvery):
				b.check(s)
			}
		}
	})
}

// check asks a server whether it is ready.
func (b *balancer) check(s *balanced) {
	up := false
	if res, err := b.client.Get(s.daemon.url("ops") + "/readyz"); err == nil {
		_ = res.Body.Close()
		up = res.StatusCode == http.StatusOK
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	s.up = up
}

// candidates returns the servers that are ready, in turn.
func (b *balancer) candidates() (list []*daemon) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.next++
	for i := range b.servers {
		if s := b.servers[(b.next+i)%len(b.servers)]; s.up {
			list = append(list, s.daemon)
		}
	}
	return list
}

// connect carries one connection to the first server that takes it.
func (b *balancer) connect(client net.Conn) {
	defer func() { _ = client.Close() }()
	for _, d := range b.candidates() {
		server, err := net.Dial("tcp", strings.TrimPrefix(d.url(b.plane), "http://"))
		if err == nil {
			b.carry(client, server)
			return
		}
	}
}

// carry carries what both sides send, until both have ended or the balancer ends.
func (b *balancer) carry(client, server net.Conn) {
	defer func() { _ = server.Close() }()
	defer context.AfterFunc(b.ended, func() {
		_ = client.Close()
		_ = server.Close()
	})()
	var both sync.WaitGroup
	for _, way := range [][2]net.Conn{{server, client}, {client, server}} {
		both.Go(func() {
			_, _ = io.Copy(way[0], way[1])
			_ = way[0].(*net.TCPConn).CloseWrite()
		})
	}
	both.Wait()
}
