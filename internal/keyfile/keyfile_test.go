package keyfile_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cedarpost/cedarpost/internal/keyfile"
)

// Each of the rights that others can have is enough to refuse a secret; none that the
// owner and the group have is.
func TestRead(t *testing.T) {
	dir := t.TempDir()
	file, link := filepath.Join(dir, "key"), filepath.Join(dir, "link")
	if err := os.WriteFile(file, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(file, link); err != nil { // as Kubernetes mounts secrets
		t.Fatal(err)
	}
	for mode := range os.FileMode(0o1000) {
		if mode&0o400 == 0 {
			continue // not readable by its owner, unless that is root
		}
		if err := os.Chmod(file, mode); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{file, link} {
			text, err := keyfile.Read(name)
			if ok := mode&0o007 == 0; ok != (err == nil) || ok != (string(text) == "secret\n") {
				t.Errorf("mode %04o: %q, %v", mode, text, err)
			}
			if err != nil && (!strings.Contains(err.Error(), name) || strings.Contains(err.Error(), "secret")) {
				t.Error(err)
			}
		}
	}
	if _, err := keyfile.Read(filepath.Join(dir, "none")); !os.IsNotExist(err) {
		t.Error(err)
	}
}
