package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"testing"

	"connectrpc.com/connect/v2"
	"pgregory.net/rapid"
)

// After any reads and releases, the budget has as many bytes as in the beginning. A body never has
// read more than it holds, up to the bound of a message, and what is read is what was sent.
func TestBodiesGiveBack(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const total = 1 << 20
		budget := newBodies(total)
		ctx, cancel := context.WithCancel(t.Context())
		cancel() // do not wait for bytes
		for range rapid.IntRange(1, 10).Draw(t, "calls") {
			sent := bytes.Repeat([]byte("x"), rapid.IntRange(0, 700<<10).Draw(t, "bytes"))
			most, streams := rapid.IntRange(1, 300<<10).Draw(t, "most"), rapid.Bool().Draw(t, "streams")
			b := &body{ReadCloser: io.NopCloser(bytes.NewReader(sent)), announced: -1}
			if rapid.Bool().Draw(t, "announced") {
				b.announced = int64(len(sent))
			}
			caller := rapid.SampledFrom([]string{"a", "b", ""}).Draw(t, "caller")
			b.measure(ctx, budget, caller, most, streams)
			got := 0
			for p := make([]byte, rapid.IntRange(256, 64<<10).Draw(t, "buffer")); ; {
				n, err := b.Read(p)
				if got += n; b.held < min(b.used, b.most) && err == nil {
					t.Fatalf("%d bytes are read and %d held of at most %d", b.used, b.held, b.most)
				}
				if errors.Is(err, io.EOF) {
					break
				}
				if connect.CodeOf(err) == connect.CodeResourceExhausted {
					t.Fatalf("%d of %d bytes are refused: %v", b.held, total, err)
				}
				if streams && rapid.Bool().Draw(t, "next message") {
					b.settle()
					b.release()
				}
			}
			if got != len(sent) {
				t.Fatalf("%d bytes of %d are read", got, len(sent))
			}
			b.end()
		}
		if !budget.all.TryAcquire(total) || !budget.of("a").TryAcquire(total/2) {
			t.Fatal("bytes are lost")
		}
	})
}

func BenchmarkBody(b *testing.B) {
	budget, p, sent := newBodies(defaultRequestBytes), make([]byte, 512), make([]byte, 300)
	r := bytes.NewReader(sent)
	b.ReportAllocs()
	for b.Loop() {
		r.Reset(sent)
		in := body{ReadCloser: io.NopCloser(r), announced: -1}
		in.measure(b.Context(), budget, "a", 64<<10, false)
		for {
			if _, err := in.Read(p); err != nil {
				break
			}
		}
		in.end()
	}
}

// The shares of callers that hold nothing do not pile up, and what is held stays counted.
func TestSharesAreForgotten(t *testing.T) {
	budget := newBodies(minRequestBytes)
	busy := budget.of("busy")
	if !busy.TryAcquire(1) {
		t.Fatal("no share")
	}
	for i := range 3 * maxShares {
		budget.of(fmt.Sprint("caller", i))
	}
	if n := len(budget.shares); n > maxShares+1 || budget.of("busy") != busy {
		t.Errorf("%d shares, that of a busy caller is kept: %v", n, budget.of("busy") == busy)
	}
}
