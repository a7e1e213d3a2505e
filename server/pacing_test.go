package server

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"github.com/google/uuid"
	"google.golang.org/protobuf/proto"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/policies"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// wires are the protocols of a stream.
var wires = []struct {
	name    string
	http2   bool
	options []connecthttp.Option
}{
	{"HTTP/1.1 binary", false, nil},
	{"HTTP/1.1 JSON", false, []connecthttp.Option{connecthttp.WithProtoJSON()}},
	{"HTTP/2 binary", true, nil},
	{"HTTP/2 gRPC", true, []connecthttp.Option{connecthttp.WithGRPC()}},
}

// bufferBytes is the size of the buffers of connections. They are small, so that a client that
// does not read soon blocks the server.
const bufferBytes = 64 << 10

// hurried starts a real server with its own timeouts. It returns a client of its policies for
// each of the wires, and the address and API key for a client without a library.
func hurried(t *testing.T, times timeouts) (clients []cedarpostv1connect.PolicyServiceClient, addr, key string) {
	t.Helper()
	_, conns, addr, key := hurriedServer(t, times)
	for _, c := range conns {
		clients = append(clients, cedarpostv1connect.NewPolicyServiceClient(c))
	}
	return clients, addr, key
}

func hurriedServer(t *testing.T, times timeouts) (db *store.DB, clients []*connect.Client, addr, key string) {
	t.Helper()
	_, db, clients, addr, key = hurriedPlane(t, "admin", times)
	return db, clients, addr, key
}

func hurriedPlane(t *testing.T, plane string, times timeouts) (s *Server, db *store.DB, clients []*connect.Client, addr, key string) {
	t.Helper()
	return hurriedOn(t, storetest.New(t), plane, Config{times: times})
}

// hurriedOn is hurriedPlane on an existing database. cfg needs no addresses.
func hurriedOn(t *testing.T, databaseURL, plane string, cfg Config) (s *Server, db *store.DB, clients []*connect.Client, addr, key string) {
	t.Helper()
	db, err := store.Open(t.Context(), store.Config{DatabaseURL: secret.New(databaseURL), Event: decisionlog.ChangeEvents("hurried")})
	if err != nil {
		t.Fatal(err)
	}
	keyFile := filepath.Join(t.TempDir(), "key")
	if _, err := access.BootstrapKey(t.Context(), db, keyFile, true); err != nil {
		t.Fatal(err)
	}
	// Each client is a caller of its own, because a caller uploads one bundle at a time.
	keys := make([]string, len(wires))
	for i := range keys {
		keys[i] = uuid.NewString()
		hash := sha256.Sum256([]byte(keys[i]))
		_, err := db.ChangeAccess(t.Context(), "test", func(context.Context, store.Access) (store.AccessChange, error) {
			return store.AccessChange{Put: access.AllGrants(keys[i], "test"), Add: []store.Key{{ID: keys[i], Name: keys[i], Hash: hash[:]}}}, nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	cfg.DB, cfg.Log = db, slog.New(slog.DiscardHandler)
	cfg.Listen, cfg.AdminListen, cfg.OpsListen = "127.0.0.1:0", "127.0.0.1:0", "127.0.0.1:0"
	s, err = New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(keyFile)
	if err != nil {
		t.Fatal(err)
	}
	addr, key = s.Addr(plane), strings.TrimSpace(string(text))
	for _, p := range s.planes {
		p.listener = smallBuffers{p.listener}
	}
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		db.Close()
	})
	for i, w := range wires {
		protocols := new(http.Protocols)
		protocols.SetHTTP1(!w.http2)
		protocols.SetUnencryptedHTTP2(w.http2)
		transport := &http.Transport{Protocols: protocols, HTTP2: &http.HTTP2Config{MaxReceiveBufferPerStream: bufferBytes}}
		transport.DialContext = func(ctx context.Context, network, addr string) (net.Conn, error) {
			c, err := new(net.Dialer).DialContext(ctx, network, addr)
			if err == nil {
				err = c.(*net.TCPConn).SetReadBuffer(bufferBytes)
			}
			return c, err
		}
		t.Cleanup(transport.CloseIdleConnections)
		clients = append(clients, connect.NewClient(
			connecthttp.NewTransport(&http.Client{Transport: transport, Timeout: 10 * time.Minute}, "http://"+addr, w.options...),
			func(next connect.ClientFunc) connect.ClientFunc {
				return func(ctx context.Context, spec connect.Spec) (connect.ClientStream, error) {
					if info, ok := connect.CallInfoForClientContext(ctx); ok {
						info.RequestHeader().Set("Authorization", "Bearer "+keys[i])
					}
					return next(ctx, spec)
				}
			}))
	}
	return s, db, clients, addr, key
}

// smallBuffers is a listener whose connections have a small buffer to send from.
type smallBuffers struct{ net.Listener }

func (l smallBuffers) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err == nil {
		err = c.(*net.TCPConn).SetWriteBuffer(bufferBytes)
	}
	return c, err
}

// shopUpload returns the messages of an upload of the example bundle.
func shopUpload(t *testing.T) []*cedarpostv1.ApplyBundleRequest {
	t.Helper()
	shop, err := bundle.Read(policies.Shop(), "shop")
	if err != nil {
		t.Fatal(err)
	}
	messages := []*cedarpostv1.ApplyBundleRequest{header()}
	for _, f := range shop.Files {
		messages = append(messages, file(f.Path, f.Content))
	}
	return messages
}

func header() *cedarpostv1.ApplyBundleRequest {
	return &cedarpostv1.ApplyBundleRequest{Part: &cedarpostv1.ApplyBundleRequest_Header{
		Header: &cedarpostv1.BundleHeader{Name: "shop", DryRun: true}}}
}

func file(path string, content []byte) *cedarpostv1.ApplyBundleRequest {
	return &cedarpostv1.ApplyBundleRequest{Part: &cedarpostv1.ApplyBundleRequest_File{
		File: &cedarpostv1.FilePart{Path: path, Data: content}}}
}

func slowUpload(ctx context.Context, c cedarpostv1connect.PolicyServiceClient, messages []*cedarpostv1.ApplyBundleRequest, pause time.Duration) (*cedarpostv1.ApplyBundleResponse, error) {
	stream, err := c.ApplyBundle(ctx)
	if err != nil {
		return nil, err
	}
	for _, m := range messages {
		if stream.Send(m) != nil {
			break // the answer says why
		}
		time.Sleep(pause)
	}
	return stream.CloseAndReceive()
}

// An upload may take longer than the timeouts of a connection, if each of its messages comes in
// time. The answer of the server arrives.
func TestSlowUpload(t *testing.T) {
	t.Parallel() // it waits most of the time
	times := defaultTimeouts
	times.read, times.write = 4*time.Second, 4*time.Second
	clients, _, _ := hurried(t, times)
	for i, c := range clients {
		t.Run(wires[i].name, func(t *testing.T) {
			t.Parallel()
			messages := shopUpload(t)
			pause := 3 * times.write / 2 / time.Duration(len(messages))
			res, err := slowUpload(t.Context(), c, messages, pause)
			if err != nil || res.GetBundle().GetName() != "shop" {
				t.Errorf("%v, %v", res, err)
			}
			_, err = slowUpload(t.Context(), c, append(messages, header()), pause)
			if connect.CodeOf(err) != connect.CodeInvalidArgument || !strings.Contains(err.Error(), "two headers") {
				t.Errorf("got %v", err)
			}
		})
	}
}

// An upload that stalls is ended and gets an error, although the caller sends nothing more.
func TestStalledUpload(t *testing.T) {
	t.Parallel() // it waits most of the time
	times := defaultTimeouts
	times.message, times.discard = 2*time.Second, 100*time.Millisecond
	clients, addr, key := hurried(t, times)
	first, err := proto.Marshal(header())
	if err != nil {
		t.Fatal(err)
	}
	message := string(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(first)))) + string(first)
	for upload, want := range map[string]string{
		"\x00":            "deadline_exceeded", // less than a message
		message + message: "invalid_argument",  // a refusal before the end of the upload
	} {
		answer := stall(t, addr, key, upload)
		if !strings.Contains(answer, want) || !strings.HasSuffix(answer, "\r\n0\r\n\r\n") {
			t.Errorf("answered %q, want %s", answer, want)
		}
	}
	for i, c := range clients {
		t.Run(wires[i].name, func(t *testing.T) {
			t.Parallel()
			stream, err := c.ApplyBundle(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			for stream.Send(header()) == nil && t.Context().Err() == nil {
				time.Sleep(3 * times.message) // each message is too late, until the client notices the end
			}
			_, err = stream.CloseAndReceive()
			if connect.CodeOf(err) != connect.CodeDeadlineExceeded || !strings.Contains(err.Error(), "no message came") {
				t.Errorf("got %v", err)
			}
		})
	}
}

// A call whose body stalls gets an error that says so, without addresses.
func TestStalledCall(t *testing.T) {
	t.Parallel() // it waits most of the time
	times := defaultTimeouts
	times.read = 3 * time.Second
	_, addr, key := hurried(t, times)
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	_, err = fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{",
		cedarpostv1connect.AccessServiceWhoAmIProcedure, addr, key)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(conn)
	if err != nil || !strings.Contains(string(answer), `{"code":"deadline_exceeded","message":"the message did not come in time"}`) {
		t.Errorf("answered %q, %v", answer, err)
	}
}

// stall begins an upload, sends nothing more, and returns the whole answer.
func stall(t *testing.T, addr, key, upload string) string {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		t.Fatal(err)
	}
	_, err = fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: %s\r\nAuthorization: Bearer %s\r\n"+
		"Content-Type: application/connect+proto\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n",
		cedarpostv1connect.PolicyServiceApplyBundleProcedure, addr, key, len(upload), upload)
	if err != nil {
		t.Fatal(err)
	}
	answer, err := io.ReadAll(conn)
	if err != nil {
		t.Errorf("the answer has no end: %v", err)
	}
	return string(answer)
}

// An upload that sends a few bytes now and then is ended, although each message comes in time: it
// would keep its place for as long as an upload may take.
func TestAttackTrickledUpload(t *testing.T) {
	t.Parallel() // it waits most of the time
	times := defaultTimeouts
	times.message = 500 * time.Millisecond
	clients, _, _ := hurried(t, times)
	for i, c := range clients {
		if !wires[i].http2 {
			continue // over HTTP/1.1 a client that still sends may not see the answer
		}
		t.Run(wires[i].name, func(t *testing.T) {
			t.Parallel()
			stream, err := c.ApplyBundle(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			sent := 0
			for m := header(); stream.Send(m) == nil && t.Context().Err() == nil; m = file("a.cedar", []byte("//\n")) {
				sent++
				time.Sleep(times.message / 10)
			}
			_, err = stream.CloseAndReceive()
			if connect.CodeOf(err) != connect.CodeDeadlineExceeded || !strings.Contains(err.Error(), "slower than 16384 bytes each second") && !strings.Contains(err.Error(), "no message came") {
				t.Errorf("got %v", err)
			}
			t.Logf("an upload of 3 bytes at a time ended after %d messages", sent)
		})
	}
}

// An upload that takes too long in all is ended, although each message comes in time.
func TestEndlessUpload(t *testing.T) {
	t.Parallel() // it waits most of the time
	times := defaultTimeouts
	times.upload, times.discard = time.Second, time.Minute // over HTTP/1.1, the client needs time to see the answer while it sends
	clients, _, _ := hurried(t, times)
	for i, c := range clients {
		t.Run(wires[i].name, func(t *testing.T) {
			t.Parallel()
			for {
				stream, err := c.ApplyBundle(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				for m := header(); stream.Send(m) == nil && t.Context().Err() == nil; m = file("a.cedar", []byte("//\n")) {
					time.Sleep(times.upload / 20)
				}
				_, err = stream.CloseAndReceive()
				// Over HTTP/1.1 a client that still sends when the connection is closed, half a
				// second after the answer, does not see the answer.
				if ce := (*connect.Error)(nil); errors.As(err, &ce) && !ce.IsRemote() {
					t.Logf("once more: %v", err)
					continue
				}
				if connect.CodeOf(err) != connect.CodeDeadlineExceeded || !strings.Contains(err.Error(), "longer than 1s in all") {
					t.Errorf("got %v", err)
				}
				return
			}
		})
	}
}

// A caller that reads a bundle slowly is cut off when all messages take too long for their size,
// even if none of them takes too long.
func TestAttackSlowReaderOfABundle(t *testing.T) {
	t.Parallel() // it waits most of the time
	times := defaultTimeouts
	times.message, times.answer, times.slowest, times.discard = 10*time.Minute, time.Second, 1<<40, 100*time.Millisecond
	s, db, clients, _, _ := hurriedPlane(t, "admin", times)
	publish := store.Publish{Bundle: store.Bundle{Name: "big", Digest: "d", Fields: "[]"}, Files: []store.File{{Path: "a", Content: bytes.Repeat([]byte("x"), 24<<20)}}, Caller: "test"}
	if _, err := db.PublishBundle(t.Context(), publish); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); len(s.follower.Latest().Bundles) == 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the bundle is not there")
		}
	}
	for i, c := range clients {
		t.Run(wires[i].name, func(t *testing.T) {
			t.Parallel()
			stream, err := cedarpostv1connect.NewPolicyServiceClient(c).GetBundle(t.Context(), &cedarpostv1.GetBundleRequest{Name: "big"})
			if err != nil {
				t.Fatal(err)
			}
			began, received, messages := time.Now(), 0, 0
			time.Sleep(3 * times.answer)
			for err == nil {
				var m *cedarpostv1.GetBundleResponse
				if m, err = stream.Receive(); err == nil {
					messages, received = messages+1, received+len(m.GetFile().GetData())
				}
			}
			t.Logf("a caller that does not read for 3 s: cut off after %d messages, %d KiB and %v: %v", messages, received>>10, time.Since(began).Round(time.Second), err)
			if errors.Is(err, io.EOF) || messages == 0 || received >= 24<<20 {
				t.Errorf("received %d bytes, then %v", received, err)
			}
		})
	}
}
