package localpg_test

import (
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"

	"github.com/cedarpost/cedarpost/store/localpg"
)

// A server that is not durable has a secret of one iteration. Its password opens a session,
// and another one does not.
func TestSecret(t *testing.T) {
	server := start(t, localpg.Config{Dir: folder(t, 0o755)})
	conn, err := pgx.Connect(t.Context(), server.URL())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	var stored string
	if err := conn.QueryRow(t.Context(), "select rolpassword from pg_authid where rolname = current_user").Scan(&stored); err != nil || !strings.HasPrefix(stored, "SCRAM-SHA-256$1:") {
		t.Errorf("stored as %.20q, %v", stored, err)
	}
	config := conn.Config().Copy()
	config.Password += "x"
	if other, err := pgx.ConnectConfig(t.Context(), config); err == nil || !strings.Contains(err.Error(), "password authentication failed") {
		t.Errorf("with another password: %v", err)
		if other != nil {
			_ = other.Close(t.Context())
		}
	}
}
