// Package cedarpost has no code of its own. Its test keeps the rooms of the
// repository apart, as ARCHITECTURE.md draws them.
package cedarpost

import (
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/cedarpost/cedarpost/"

// arrows lists the rooms that each room may import. A package belongs to the room with the
// longest name that is a prefix of its folder.
var arrows = map[string][]string{
	"cmd": {"server", "server/access", "server/decisionlog", "server/engine", "server/entityfile", "server/offline", "server/telemetry", "store", "store/localpg", "auditlog", "logformat", "bundle", "policies", "proto", "sdk/go", "internal/clienttls", "internal/days", "internal/entityuid", "internal/keyfile", "internal/pause", "internal/privateca", "internal/recentlog", "internal/secret", "internal/serverurl"},
	"server": {"server/engine", "server/snapshot", "server/decisionlog", "server/impact", "server/access", "server/stored", "server/wire", "server/entityfile", "server/offline",
		"store", "auditlog", "bundle", "policies", "proto", "internal/entityuid", "internal/keyfile", "internal/pause", "internal/recentlog", "internal/secret"},
	"server/snapshot":    {"server/engine", "server/stored", "server/wire", "store", "proto", "internal/pause"},
	"server/decisionlog": {"server/engine", "server/stored", "server/wire", "server/entityfile", "store", "auditlog", "proto", "internal/keyfile", "internal/pause", "internal/secret"},
	"server/impact":      {"server/engine", "server/snapshot", "server/decisionlog", "server/access", "server/stored", "server/wire", "store", "proto"},
	"server/access":      {"server/engine", "server/offline", "store", "bundle", "policies", "internal/days", "internal/entityuid", "internal/keyfile", "internal/pause", "sdk/go/egress"},
	// It knows the libraries that send, and nothing of Cedarpost.
	"server/telemetry": {},
	// A receiver of OTLP, for tests.
	"server/telemetry/telemetrytest": {},
	// A real OpenID provider, for tests.
	"server/access/issuertest": {},
	"server/stored":            {"server/engine", "server/offline", "store", "bundle", "proto"},
	"auditlog":                 {"internal/keyfile"},
	"logformat":                {"auditlog", "proto", "internal/entityuid"},
	"server/engine":            {},
	// These also run without a server and its database.
	"server/wire":       {"server/engine", "proto"},
	"server/entityfile": {"proto"},
	"server/offline":    {"server/engine", "server/entityfile", "server/wire", "bundle"},
	// Reads the reference corpus for tests.
	"server/corpustest": {},
	"server/servertest": {"server", "server/access", "server/decisionlog", "server/entityfile", "auditlog", "store", "store/localpg", "store/storetest", "bundle", "policies", "proto", "internal/entityuid", "internal/secret"},
	"store":             {"migrations", "auditlog", "internal/secret"},
	"store/localpg":     {},
	"store/storetest":   {"store", "store/localpg", "migrations", "internal/secret"},
	"bundle":            {"internal/days", "internal/entityuid"},
	"policies":          {},
	"migrations":        {},
	"proto":             {},
	"sdk/go":            {"proto", "internal/clienttls", "internal/entityuid", "internal/keyfile", "internal/serverurl", "sdk/go/egress"},
	// Also for services that use nothing else of the SDK.
	"sdk/go/egress": {},
	// The real engine in the process of a test, for users of the SDK.
	"sdk/go/cedarposttest": {"sdk/go", "server/engine", "server/entityfile", "server/offline", "server/wire", "bundle", "proto"},
	"examples":             {"sdk/go", "proto"},
	"internal/clienttls":   {"internal/keyfile"},
	"internal/days":        {},
	"internal/entityuid":   {},
	"internal/keyfile":     {},
	"internal/privateca":   {},
	"internal/secret":      {},
	"internal/serverurl":   {},
	"internal/mutant":      {}, // for tests
	"internal/pause":       {},
	"internal/recentlog":   {},
	"bench":                {}, // only tests
	"deploy":               {}, // only tests
	"bench/peers":          {"policies", "proto", "store/localpg"},
}

// outside says which modules only some rooms may know.
var outside = map[string][]string{
	"github.com/cedar-policy/cedar-go":   {"server/engine", "server", "server/impact", "server/access", "server/snapshot", "server/stored", "server/wire", "server/offline", "server/corpustest", "sdk/go/cedarposttest"},
	"github.com/jackc/pgx":               {"server/servertest", "store", "store/localpg", "store/storetest"},
	"go.opentelemetry.io/otel/sdk":       {"server/telemetry"},
	"go.opentelemetry.io/otel/exporters": {"server/telemetry"},
	"connectrpc.com":                     {"cmd", "server", "server/servertest", "proto", "sdk/go", "sdk/go/cedarposttest", "examples", "bench/peers"},
}

func roomOf(folder string) string {
	best := ""
	for room := range arrows {
		if (folder == room || strings.HasPrefix(folder, room+"/")) && len(room) > len(best) {
			best = room
		}
	}
	return best
}

func TestArrows(t *testing.T) {
	packages := 0
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != "." && strings.HasPrefix(d.Name(), ".") {
			return filepath.SkipDir
		}
		folder := filepath.ToSlash(filepath.Dir(path))
		// Tests may import other rooms, to test them together.
		if !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") || folder == "." {
			return nil
		}
		packages++
		room := roomOf(folder)
		if room == "" {
			t.Errorf("%s is in no room", path)
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		for _, spec := range file.Imports {
			name, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			check(t, path, room, name)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if packages < 20 {
		t.Errorf("only %d files were looked at", packages)
	}
}

func check(t *testing.T, path, room, name string) {
	if folder, ours := strings.CutPrefix(name, module); ours {
		if to := roomOf(folder); to != room && !slices.Contains(arrows[room], to) {
			t.Errorf("%s: a new arrow, %s → %s", path, room, to)
		}
		return
	}
	if room == "server/engine" && strings.Contains(name, ".") && !strings.HasPrefix(name, "github.com/cedar-policy/cedar-go") {
		t.Errorf("%s: the engine knows Cedar and the standard library, not %s", path, name)
	}
	if room == "server/engine" && slices.Contains([]string{"context", "time", "os", "net", "net/http", "log/slog"}, name) {
		t.Errorf("%s: the engine is pure and has no use for %s", path, name)
	}
	for mod, rooms := range outside {
		if strings.HasPrefix(name, mod) && !slices.Contains(rooms, room) {
			t.Errorf("%s: %s may not know %s", path, room, mod)
		}
	}
}
