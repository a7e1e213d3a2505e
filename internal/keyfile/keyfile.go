// Package keyfile reads and writes files that hold a secret. The server, the command line and
// the Go client all refuse such a file if every user of the machine has rights to it.
package keyfile

import (
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/google/renameio/v2"
)

// Read reads a file that holds a secret. It refuses the file if users other than its owner and
// its group have any rights to it. The group may have rights, because platforms that mount
// secrets give a process access through its group. Only regular files are checked.
func Read(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat() // of the open file: another one may take its name meanwhile
	if err != nil {
		return nil, err
	}
	if mode := info.Mode(); mode.IsRegular() && mode.Perm()&0o007 != 0 {
		return nil, fmt.Errorf("%s: all users of this machine may use it (mode %04o); take their rights away with chmod o-rwx, or mount it with mode 0440", name, mode.Perm())
	}
	return io.ReadAll(f)
}

// Write replaces a file, or makes it, so that only its owner can read it. A crash leaves the
// old file or the new one, never a part of either.
func Write(name string, content []byte) error {
	// Not renameio.WriteFile, which keeps the permissions of the file that it replaces.
	f, err := renameio.NewPendingFile(name, renameio.WithStaticPermissions(0o600), renameio.WithTempDir(filepath.Dir(name)))
	if err != nil {
		return err
	}
	defer func() { _ = f.Cleanup() }()
	if _, err := f.Write(content); err != nil {
		return err
	}
	return f.CloseAtomicallyReplace()
}
