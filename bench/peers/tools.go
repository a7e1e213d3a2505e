package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// tool is a program of another project.
type tool struct{ name, module, version, folder string }

// The versions are the newest that build with the Go version of this repository.
var (
	opaTool     = tool{"opa", "github.com/open-policy-agent/opa", "v1.22.4", "."}
	cerbosTool  = tool{"cerbos", "github.com/cerbos/cerbos", "v0.55.0", "./cmd/cerbos"}
	openfgaTool = tool{"openfga", "github.com/openfga/openfga", "v1.22.1", "./cmd/openfga"}
	ghzTool     = tool{"ghz", "github.com/bojand/ghz", "v0.93.0", "./cmd/ghz"}
)

// build returns the path of the program, and builds it unless this version is there. It builds in
// the folder of the module: go install refuses a module that replaces others, as Cerbos does.
func (t tool) build(ctx context.Context, bin string) (path string, err error) {
	path = filepath.Join(bin, t.name+"-"+t.version)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return "", err
	}
	fmt.Fprintf(os.Stderr, "build %s@%s\n", t.module, t.version)
	download := exec.CommandContext(ctx, "go", "mod", "download", "-json", t.module+"@"+t.version)
	download.Dir = os.TempDir() // outside of this module
	output, err := download.Output()
	var module struct{ Dir, Error string }
	if jsonErr := json.Unmarshal(output, &module); jsonErr != nil || module.Error != "" || module.Dir == "" {
		return "", fmt.Errorf("not installed: go mod download %s@%s: %s (%w)", t.module, t.version, module.Error, errors.Join(err, jsonErr))
	}
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", path, t.folder)
	build.Dir = module.Dir
	build.Env = append(os.Environ(), "GOWORK=off", "CGO_ENABLED=0")
	if output, err := build.CombinedOutput(); err != nil {
		lines := strings.Split(strings.TrimSpace(string(output)), "\n")
		return "", fmt.Errorf("not installed: go build %s@%s: %w: %s", t.module, t.version, err, lines[len(lines)-1])
	}
	return path, nil
}
