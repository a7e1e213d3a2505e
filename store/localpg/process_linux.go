package localpg

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// dieWithParent has the kernel ask the child for a fast shutdown when we die, even
// by kill -9.
func dieWithParent(attr *syscall.SysProcAttr) { attr.Pdeathsig = syscall.SIGINT }

// servesData reports whether the process is a server of the data: its working
// directory is, for a number may long belong to someone else.
func servesData(pid int, data string) bool {
	cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid))
	if err != nil {
		return false
	}
	data, err = filepath.EvalSymlinks(data)
	return err == nil && cwd == data
}
