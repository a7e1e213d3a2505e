// Package keyfile reads files that hold a secret. Several rooms do, and each has to
// refuse a file that every user of the machine may read.
package keyfile

import (
	"fmt"
	"io"
	"os"
)

// Read reads the file of a secret, unless users other than its owner and its group may
// read or change it. The group may, as a platform that mounts secrets gives them to a
// process by its group. What is no regular file, as a pipe, has no such rights to look
// at.
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
