// Package keyfile reads files that hold a secret. Server, command line and Go client all
// have to refuse a file that every user of the machine may use.
package keyfile

import (
	"fmt"
	"io"
	"os"
)

// Read reads a file that holds a secret. It refuses a file if users other than its owner
// and its group have any rights to it. The group may have rights, because platforms that
// mount secrets give them to a process by its group. Pipes and everything else that is no
// regular file are not checked.
func Read(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat() // of the file that is read, whatever takes its place
	if err != nil {
		return nil, err
	}
	if mode := info.Mode(); mode.IsRegular() && mode.Perm()&0o007 != 0 {
		return nil, fmt.Errorf("%s: all users of this machine may use it (mode %04o); take their rights away with chmod o-rwx, or mount it with mode 0440", name, mode.Perm())
	}
	return io.ReadAll(f)
}
