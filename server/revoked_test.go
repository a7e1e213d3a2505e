package server_test

import (
	"context"
	"testing"
	"time"

	"connectrpc.com/connect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// A key that is revoked by hand in the database, which makes no revision, ends at once, however
// it is done: for new calls, for watches and for exports that follow.
func TestKeyRevokedByHand(t *testing.T) {
	t.Parallel() // it starts several servers
	for _, way := range []struct{ name, sql string }{
		{"revoked", "update api_keys set revoked_at = now() where name = 'bootstrap'"},
		{"deleted", "delete from api_keys where name = 'bootstrap'"},
		{"all keys removed", "truncate api_keys"},
		{"a hash that is none", "update api_keys set hash = 'short'"},
		{"with triggers off", "set session_replication_role = replica; update api_keys set revoked_at = now()"},
	} {
		t.Run(way.name, func(t *testing.T) {
			s := docServer(t)
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute) // if the streams do not end
			defer cancel()
			conn := servertest.Session(t, s.URL)
			var name string
			if err := conn.QueryRow(t.Context(), "select name from api_keys").Scan(&name); err != nil || name != "bootstrap" {
				t.Fatalf("the key is of %q, %v", name, err)
			}
			watch, err := s.Authorization.Watch(ctx, &cedarpostv1.WatchRequest{})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = watch.Close() }()
			if _, err := watch.Receive(); err != nil {
				t.Fatal(err)
			}
			export, err := s.Audit.ExportDecisions(ctx, &cedarpostv1.ExportDecisionsRequest{Follow: true})
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = export.Close() }()
			ask := func() error {
				_, err := s.Authorization.GetRevision(t.Context(), &cedarpostv1.GetRevisionRequest{})
				return err
			}
			if err := ask(); err != nil {
				t.Fatal(err)
			}
			servertest.MustExec(t, conn, way.sql)
			servertest.Eventually(t, "the key is gone", func() bool { return connect.CodeOf(ask()) == connect.CodeUnauthenticated })
			for {
				if _, err = watch.Receive(); err != nil {
					break
				}
			}
			servertest.WantCode(t, err, connect.CodeUnauthenticated, "revoked")
			for {
				if _, err = export.Receive(); err != nil {
					break
				}
			}
			servertest.WantCode(t, err, connect.CodeUnauthenticated, "revoked")
		})
	}
}
