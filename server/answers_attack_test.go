package server_test

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store"
)

// bigBundle has an entity type that can be large.
var bigBundle = []string{
	"schema.cedarschema", `namespace Big { entity User; entity Doc { words: Set<String> }; action Read appliesTo { principal: [User], resource: [Doc], context: {} }; }`,
	"policies.cedar", `@id("p") permit (principal, action, resource);`,
}

// bigDoc returns an entity of about so many KiB.
func bigDoc(t *testing.T, id string, kib int) *cedarpostv1.Entity {
	t.Helper()
	words := make([]any, kib)
	for i := range words {
		words[i] = fmt.Sprintf("%06d", i) + strings.Repeat("x", 1024-6-3) // with quotes and a comma
	}
	return &cedarpostv1.Entity{Uid: &cedarpostv1.EntityUid{Type: "Big::Doc", Id: id}, Attrs: jsonStruct(t, map[string]any{"words": words})}
}

// pages reads pages of a list to its end. read returns how many rows a page has, its size, and the
// token of the next one.
func pages(t *testing.T, read func(token string) (rows, bytes int, next string)) (n, rows, largest int) {
	t.Helper()
	for token := ""; ; {
		r, size, next := read(token)
		if r == 0 && next != "" {
			t.Fatal("a page without rows is followed by another one")
		}
		n, rows, largest = n+1, rows+r, max(largest, size)
		if token = next; token == "" {
			return n, rows, largest
		}
	}
}

// Pages of a thousand large rows end early, at a bound of bytes, and no row is lost.
func TestAttackLargePages(t *testing.T) {
	s := servertest.New(t)
	s.MustApply("big", bigBundle...)
	const decisions, docs = 80, 16
	var rows []store.Decision
	began := time.Now()
	for i := range decisions {
		rows = append(rows, recordedAt(began.Add(-time.Duration(i)*time.Millisecond), func(d *store.Decision) {
			d.Caller = "big"
			for f := range 240 {
				d.Fields = append(d.Fields, fmt.Sprintf("+%03d%s", f, strings.Repeat("x", 227)))
			}
		}))
	}
	mustLog(t, s, rows...)
	for i := range docs {
		s.MustPut(bigDoc(t, fmt.Sprint(i), 200))
	}
	seen := honest(t, asks(t, s))
	for what, read := range map[string]func(token string) (int, int, string){
		"decisions": func(token string) (int, int, string) {
			page, err := s.Audit.QueryDecisions(t.Context(), &cedarpostv1.QueryDecisionsRequest{PageSize: 1000, Caller: "big", PageToken: token, From: timestamppb.New(began.Add(-time.Hour))})
			if err != nil {
				t.Fatal(err)
			}
			return len(page.Decisions), proto.Size(page), page.NextPageToken
		},
		"entities": func(token string) (int, int, string) {
			page, err := s.Entities.ListEntities(t.Context(), &cedarpostv1.ListEntitiesRequest{PageSize: 1000, PageToken: token})
			if err != nil {
				t.Fatal(err)
			}
			return len(page.Entities), proto.Size(page), page.NextPageToken
		},
	} {
		n, rows, largest := pages(t, read)
		t.Logf("a list of %d large %s, 1000 a page: %d pages, the largest has %d KiB", rows, what, n, largest>>10)
		if want := map[string]int{"decisions": decisions, "entities": docs}[what]; rows != want {
			t.Errorf("%s: %d rows, want %d", what, rows, want)
		}
		if largest > server.PageBytes+server.PageBytes/4 {
			t.Errorf("%s: a page of %d bytes", what, largest)
		}
	}
	t.Log(seen())
}

// An entity that is too large is refused, by each way to write it. One from before there was the
// bound is listed and read, and may shrink.
func TestAttackLargeEntities(t *testing.T) {
	s := servertest.New(t)
	s.MustApply("big", bigBundle...)
	_, err := servertest.Write(t, s, put(bigDoc(t, "small", 200)), put(bigDoc(t, "large", 300)))
	servertest.WantCode(t, err, connect.CodeInvalidArgument, `operation 2: entity Big::Doc::"large": it has 307`)
	servertest.WantCode(t, err, connect.CodeInvalidArgument, fmt.Sprintf("the limit is %d", store.MaxEntityBytes))
	t.Logf("an entity of 300 KiB: %v", err)
	_, err = importAll(t, s, &cedarpostv1.ImportEntitiesRequest{Entities: []*cedarpostv1.Entity{bigDoc(t, "large", 300)}})
	servertest.WantCode(t, err, connect.CodeInvalidArgument, `entity 1: Big::Doc::"large": it has 307`)
	set := func(id string, kib int) error {
		_, err := servertest.Write(t, s, &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_SetAttributes{
			SetAttributes: &cedarpostv1.SetAttributes{Uid: servertest.UID(`Big::Doc::"` + id + `"`), Attrs: bigDoc(t, id, kib).Attrs}}})
		return err
	}
	s.MustPut(bigDoc(t, "grows", 1))
	servertest.WantCode(t, set("grows", 300), connect.CodeInvalidArgument, "the limit is")

	const old = 5
	servertest.Tamper(t, s.URL, fmt.Sprintf(`insert into entities (type, id, attrs, tags, parents, since)
		select 'Big::Doc', 'old' || n, jsonb_build_object('words', (select jsonb_agg(lpad(i::text, 1000, 'x')) from generate_series(1, 1000) i)), '{}', '{}', (select n from revision)
		from generate_series(1, %d) n`, old))
	if got, err := s.Entities.GetEntity(t.Context(), &cedarpostv1.GetEntityRequest{Uid: servertest.UID(`Big::Doc::"old1"`)}); err != nil || proto.Size(got) < 3*store.MaxEntityBytes {
		t.Errorf("an old entity: %d bytes, %v", proto.Size(got), err)
	}
	n, rows, largest := pages(t, func(token string) (int, int, string) {
		page, err := s.Entities.ListEntities(t.Context(), &cedarpostv1.ListEntitiesRequest{PageSize: 1000, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		return len(page.Entities), proto.Size(page), page.NextPageToken
	})
	t.Logf("%d entities, of which %d have 1 MB: %d pages, the largest has %d KiB", rows, old, n, largest>>10)
	if rows != old+1 || largest > server.PageBytes+server.PageBytes/4 {
		t.Errorf("%d entities, a page of %d bytes", rows, largest)
	}
	servertest.WantCode(t, set("old1", 1200), connect.CodeInvalidArgument, "the limit is")
	if err := set("old1", 500); err != nil {
		t.Errorf("an old entity that shrinks: %v", err)
	}
}

// deaf returns a client whose connection takes few bytes that nobody has read.
func deaf(t *testing.T) *http.Client {
	t.Helper()
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: protocols, HTTP2: &http.HTTP2Config{MaxReceiveBufferPerConnection: 64 << 10, MaxReceiveBufferPerStream: 16 << 10}}
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

// heap returns how many MiB of memory are in use, in this process, which has server and callers.
func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc >> 20
}

// A caller asks for large answers on many connections, and does not read them. It holds its share
// of the budget for answers and no more. Another caller gets its pages and its bundle.
func TestAttackAnswersThatNobodyReads(t *testing.T) {
	const budget = 16 << 20
	s := servertest.New(t, server.AnswerBytes(budget))
	s.MustApply("big", bigBundle...)
	base, err := s.DB.PolicyRevision(t.Context(), 1<<40)
	if err != nil {
		t.Fatal(err)
	}
	content := bytes.Repeat([]byte("x"), 12<<20)
	if _, err := s.DB.PublishBundle(t.Context(), store.Publish{
		Bundle: store.Bundle{Name: "large", Digest: "d", Fields: "[]"}, Files: []store.File{{Path: "a", Content: content}, {Path: "b"}}, Caller: "test", BaseRevision: base,
	}); err != nil {
		t.Fatal(err)
	}
	for i := range 12 {
		s.MustPut(bigDoc(t, fmt.Sprint(i), 250))
	}
	key := tenant(t, s)
	seen := honest(t, func() error {
		_, err := s.Entities.ListEntities(t.Context(), &cedarpostv1.ListEntitiesRequest{PageSize: 1})
		return err
	})
	call := func(key, procedure, kind string, body []byte) *http.Response {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.Admin+procedure, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", kind)
		req.Header.Set("Authorization", "Bearer "+key)
		res, err := deaf(t).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = res.Body.Close() })
		return res
	}
	const calls = 12
	for _, attack := range []struct {
		name string
		ask  func() (held bool, res *http.Response)
	}{
		{"pages", func() (bool, *http.Response) {
			res := call(key, cedarpostv1connect.EntityServiceListEntitiesProcedure, "application/json", []byte(`{"pageSize":1000}`))
			if res.StatusCode != http.StatusOK {
				text, _ := io.ReadAll(res.Body)
				if res.StatusCode != http.StatusTooManyRequests || !strings.Contains(string(text), "this caller hold 8 MiB") {
					t.Errorf("%d %s", res.StatusCode, text)
				}
			}
			return res.StatusCode == http.StatusOK, res
		}},
		{"bundles", func() (bool, *http.Response) {
			body := []byte(`{"name":"large"}`)
			res := call(key, cedarpostv1connect.PolicyServiceGetBundleProcedure, "application/connect+json", append([]byte{0, 0, 0, 0, byte(len(body))}, body...))
			// The messages about the bundle and its small files come first.
			for head := make([]byte, 5); ; {
				if _, err := io.ReadFull(res.Body, head); err != nil {
					t.Fatal(err)
				}
				size := int64(head[1])<<24 | int64(head[2])<<16 | int64(head[3])<<8 | int64(head[4])
				if head[0] == 2 { // the end of the stream
					text, _ := io.ReadAll(res.Body)
					if !strings.Contains(string(text), "this caller hold 8 MiB") {
						t.Errorf("the stream ends with %s", text)
					}
					return false, res
				}
				if size > 1<<20 {
					return true, res
				}
				_, _ = io.CopyN(io.Discard, res.Body, size)
			}
		}},
	} {
		before := heap()
		var group sync.WaitGroup
		var mu sync.Mutex
		var answers []*http.Response
		held := 0
		for range calls {
			group.Go(func() {
				ok, res := attack.ask() //nolint:bodyclose // it is closed below, after all have been held
				mu.Lock()
				defer mu.Unlock()
				if answers = append(answers, res); ok { //nolint:bodyclose // as above
					held++
				}
			})
		}
		group.Wait()
		t.Logf("%d %s that nobody reads: %d are held, %d refused, heap %d MiB → %d MiB", calls, attack.name, held, calls-held, before, heap())
		if held == 0 || held == calls {
			t.Errorf("%d of %d %s are held", held, calls, attack.name)
		}
		if page, err := s.Entities.ListEntities(t.Context(), &cedarpostv1.ListEntitiesRequest{PageSize: 1000}); err != nil || len(page.Entities) < 2 {
			t.Errorf("another caller's page: %v", err)
		}
		if got := bundleSize(t, s, "large"); got != len(content) {
			t.Errorf("another caller gets %d bytes of the bundle", got)
		}
		if attack.name == "bundles" && held > 2 {
			t.Errorf("%d pieces of 4 MiB are held", held)
		}
		together := int64(0)
		for _, res := range answers {
			if attack.name == "pages" && res.StatusCode == http.StatusOK {
				n, _ := io.Copy(io.Discard, res.Body)
				together += n
			}
			_ = res.Body.Close()
		}
		if together > budget/2 {
			t.Errorf("%d %s of %d bytes together were held", held, attack.name, together)
		}
		servertest.Eventually(t, "the share of the tenant", func() bool {
			page, err := cedarpostv1connect.NewEntityServiceClient(s.Client(s.Admin, key)).ListEntities(t.Context(), &cedarpostv1.ListEntitiesRequest{PageSize: 1000})
			return err == nil && len(page.Entities) > 6
		})
	}
	t.Log(seen())
}

// bundleSize reads a bundle and returns how many bytes its files have.
func bundleSize(t *testing.T, s *servertest.Server, name string) (n int) {
	t.Helper()
	stream, err := s.Policies.GetBundle(t.Context(), &cedarpostv1.GetBundleRequest{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	for {
		m, err := stream.Receive()
		if err != nil {
			if !strings.Contains(err.Error(), "EOF") {
				t.Error(err)
			}
			return n
		}
		n += len(m.GetFile().GetData())
	}
}
