package cedarpostconnect_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/cedarpostconnect"
	"github.com/cedarpost/cedarpost/sdk/go/enforce"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// Clients may set their own deadlines. Clients with a deadline of a millisecond must
// not make the service look as if it were away: no user who must be denied is let
// through, and no other user is refused.
func TestHurriedClientsOpenNothing(t *testing.T) {
	for name, option := range map[string]func(*cedarpost.Config){
		"with a cache":    func(*cedarpost.Config) {},
		"without a cache": func(c *cedarpost.Config) { c.CacheBytes = -1 },
		"in batches":      func(c *cedarpost.Config) { c.CacheBytes, c.Coalesce = -1, true },
	} {
		t.Run(name, func(t *testing.T) {
			left := atomic.Int64{}
			left.Store(400)
			hurry(t, func() bool { return left.Add(-1) >= 0 }, option)
		})
	}
}

// TestSoakHurriedClients is the long version.
func TestSoakHurriedClients(t *testing.T) {
	if os.Getenv("CEDARPOST_SOAK") == "" {
		t.Skip("set CEDARPOST_SOAK=1 to run")
	}
	end := time.Now().Add(30 * time.Second)
	hurry(t, func() bool { return time.Now().Before(end) }, func(c *cedarpost.Config) { c.CacheBytes = -1 })
}

// hurry runs four attackers, who post with deadlines of 1 to 3 ms as long as more
// returns true, beside a user who must be denied and two who must not. These three wait
// long.
func hurry(t *testing.T, more func() bool, option func(*cedarpost.Config)) {
	var failures atomic.Int64
	pdp := servertest.New(t, func(c *server.Config) {
		c.Log = slog.New(slog.NewTextHandler(countErrors{&failures}, &slog.HandlerOptions{Level: slog.LevelError}))
	})
	pdp.MustLoadShop()
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	patient := &http.Transport{Protocols: protocols} // a busy machine can answer a ping late
	t.Cleanup(patient.CloseIdleConnections)
	cfg := cedarpost.Config{Servers: []string{pdp.API}, Token: pdp.Token, Timeout: time.Minute, HTTPClient: &http.Client{Transport: patient}}
	option(&cfg)
	client, err := cedarpost.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	guard, err := enforce.New(enforce.Config{
		Client: client,
		Principal: func(ctx context.Context) (cedarpost.EntityUID, error) {
			return cedarpost.UID("Shop::User", ctx.Value(userKey{}).(string)), nil
		},
		Context: func(context.Context) (map[string]any, error) { return map[string]any{"mfa": false}, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(guard.Close)
	interceptor, err := cedarpostconnect.New(guard, map[string]cedarpostconnect.Route{
		"/shop.v1.Orders/Get": {Action: action("ViewOrder"), Resource: byID, FailOpen: "the shop must go on"},
	})
	if err != nil {
		t.Fatal(err)
	}
	authenticate := func(next connect.ServerFunc) connect.ServerFunc {
		return func(ctx context.Context, spec connect.Spec, stream connect.ServerStream) error {
			info, _ := connect.CallInfoForServerContext(ctx)
			return next(context.WithValue(ctx, userKey{}, info.RequestHeader().Get("X-User")), spec, stream)
		}
	}
	service := connect.NewServer(authenticate, interceptor.Intercept)
	service.Register(connect.Method{Spec: spec("Get"), Handler: func(_ context.Context, _ connect.Spec, stream connect.ServerStream) error {
		req := newRequest()
		if err := stream.Receive(req); err != nil {
			return err
		}
		return stream.Send(stored)
	}})
	mux := http.NewServeMux()
	connecthttp.Mount(mux, service)
	hs := httptest.NewServer(mux)
	t.Cleanup(hs.Close)
	transport := &http.Transport{MaxIdleConnsPerHost: 8}
	t.Cleanup(transport.CloseIdleConnections)
	post := func(who, order, timeout string) int {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, hs.URL+"/shop.v1.Orders/Get", strings.NewReader(`{"order":{"id":"`+order+`"}}`))
		if err != nil {
			t.Error(err)
			return 0
		}
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("X-User", who)
		if timeout != "" {
			req.Header.Set("Connect-Timeout-Ms", timeout)
		}
		res, err := (&http.Client{Transport: transport}).Do(req)
		if err != nil {
			t.Error(err)
			return 0
		}
		_, _ = io.Copy(io.Discard, res.Body)
		_ = res.Body.Close()
		return res.StatusCode
	}

	var attackers, others sync.WaitGroup
	var over atomic.Bool
	var posts, through, denied, served, refused atomic.Int64
	for a := range 4 {
		attackers.Go(func() {
			for i := 0; more(); i++ {
				posts.Add(1)
				if post("mallory", fmt.Sprint(a, "-", i), fmt.Sprint(1+i%3)) == http.StatusOK {
					through.Add(1)
				}
			}
		})
	}
	others.Go(func() {
		for i := 0; i < 20 || !over.Load(); i++ {
			if status := post("mallory", fmt.Sprint("m-", i), ""); status == http.StatusOK {
				through.Add(1)
			} else if denied.Add(1); status != http.StatusForbidden {
				t.Errorf("who must be denied: status %d", status)
			}
		}
	})
	for range 2 {
		others.Go(func() {
			for i := 0; i < 20 || !over.Load(); i++ {
				if status := post("bob", "42", ""); status == http.StatusOK {
					served.Add(1)
				} else if refused.Add(1); refused.Load() == 1 {
					t.Errorf("who may: status %d", status)
				}
			}
		})
	}
	attackers.Wait()
	over.Store(true)
	others.Wait()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 5*time.Minute)
	defer cancel()
	if err := client.Close(ctx); err != nil {
		t.Error(err)
	}
	st := client.Stats()
	t.Logf("%d posts of attackers; %d denied who wait, %d let through; %d served, %d refused; %+v", posts.Load(), denied.Load(), through.Load(), served.Load(), refused.Load(), st)
	if through.Load() > 0 || refused.Load() > 0 || st.FailedOpen > 0 {
		t.Errorf("%d were let through who must be denied, %d refused who may", through.Load(), refused.Load())
	}
	if n := failures.Load(); n > 0 {
		t.Errorf("the log of the service has %d errors", n)
	}
}

// countErrors counts the lines of a log.
type countErrors struct{ n *atomic.Int64 }

func (c countErrors) Write(p []byte) (int, error) {
	c.n.Add(1)
	return len(p), nil
}
