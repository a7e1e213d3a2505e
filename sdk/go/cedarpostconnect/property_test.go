package cedarpostconnect_test

import (
	"context"
	"strings"
	"testing"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"
)

// For any client, and a handler that ignores errors: the handler gets only allowed
// messages, nothing is sent before the first one or after a refused one, and the call
// succeeds only if there was a message and all were allowed.
func TestNoHandlerGoesAround(t *testing.T) {
	w := newWorld(t)
	messages := map[string]proto.Message{
		"own": of(newRequest(), `{"order":{"id":"42"}}`), "other": of(newRequest(), `{"order":{"id":"99"}}`), "empty": newRequest(),
	}
	rapid.Check(t, func(t *rapid.T) {
		who := rapid.SampledFrom([]string{"bob", "bob", "mallory", "", "panic"}).Draw(t, "who")
		in := rapid.SliceOfN(rapid.SampledFrom([]string{"own", "own", "other", "empty"}), 0, 4).Draw(t, "messages")
		steps := rapid.StringOfN(rapid.SampledFrom([]rune("RRRSSH")), 0, 8, -1).Draw(t, "steps")
		method := rapid.SampledFrom([]string{"Get", "Update", "Follow", "Collect", "Chat"}).Draw(t, "method")

		f := &fake{}
		for _, name := range in {
			f.in = append(f.in, messages[name])
		}
		allowed := func(name string) bool { return who == "bob" && name == "own" && method != "Update" } // no mask: all fields
		passed, refused, sent := false, false, 0
		handler := func(_ context.Context, _ connect.Spec, s connect.ServerStream) error {
			for _, step := range steps {
				switch step {
				case 'R':
					next, had := "", len(f.in) > 0 && !refused
					if had {
						next = in[len(in)-len(f.in)]
					}
					req := newRequest()
					err := s.Receive(req)
					if had && allowed(next) != (err == nil) || !had && err == nil {
						t.Fatalf("%s receives %q: %v", who, next, err)
					}
					if err != nil && text(req) != "{}" {
						t.Fatalf("what was refused is still there: %s", text(req))
					}
					passed, refused = passed || err == nil, refused || had && err != nil
				case 'S', 'H':
					var err error
					if step == 'S' {
						err = s.Send(stored)
					} else {
						err = s.SendHeaders()
					}
					if ok := passed && !refused; ok != (err == nil) {
						t.Fatalf("passed %v, refused %v, sends: %v", passed, refused, err)
					}
					if err == nil {
						sent++
					}
					refused = refused || err != nil
				}
			}
			return nil
		}
		err := w.interceptor.Intercept(handler)(context.WithValue(context.Background(), userKey{}, who), spec(method), f)
		if (err == nil) != (passed && !refused) || f.sent != sent {
			t.Fatalf("passed %v, refused %v: ends with %v, sent %d of %d", passed, refused, err, f.sent, sent)
		}
		if err != nil && strings.Contains(err.Error(), "who is this") {
			t.Fatal(err)
		}
	})
}
