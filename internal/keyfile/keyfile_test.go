package keyfile_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cedarpost/cedarpost/internal/keyfile"
)

// Read refuses a file to which others have any right, whatever rights the owner and the group
// have.
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

// Write replaces a file that everybody may read, and leaves nothing else in its folder.
func TestWrite(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "key")
	if err := os.WriteFile(file, []byte("old"), 0o666); err != nil {
		t.Fatal(err)
	}
	if err := keyfile.Write(file, []byte("new")); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(file)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v, want mode 0600", info, err)
	}
	if text, err := keyfile.Read(file); err != nil || string(text) != "new" {
		t.Errorf("%q, %v", text, err)
	}
	if all, err := os.ReadDir(dir); err != nil || len(all) != 1 {
		t.Errorf("%v, %v", all, err)
	}
	if err := keyfile.Write(filepath.Join(dir, "none", "key"), nil); !os.IsNotExist(err) {
		t.Error(err)
	}
}
