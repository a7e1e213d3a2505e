package storetest

import (
	"os"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"github.com/cedarpost/cedarpost/store/localpg"
)

const (
	tempPrefix = "cedarpost-test-"
	memory     = "/dev/shm" // a file system in memory, on Linux
	// memoryNeeded is what the servers of a few test processes take at once.
	memoryNeeded = 4 << 30
	// abandonedAfter is the age of a folder that is removed if no server uses it. A process
	// makes the folder shortly before its server locks it.
	abandonedAfter = time.Hour
)

// memoryDir returns the folder of a file system in memory, where Postgres takes about a third
// less CPU time. It is empty if the system has none with enough room, and if a failed test is
// to keep its data.
func memoryDir() string {
	var free syscall.Statfs_t
	if runtime.GOOS != "linux" || os.Getenv(KeepEnv) != "" || syscall.Statfs(memory, &free) != nil ||
		free.Bavail*uint64(free.Bsize) < memoryNeeded {
		return ""
	}
	removeAbandoned(memory)
	return memory
}

// removeAbandoned removes the folders of test processes that were killed, because they take
// memory.
func removeAbandoned(parent string) {
	dirs, _ := filepath.Glob(filepath.Join(parent, tempPrefix+"*"))
	for _, dir := range dirs {
		info, err := os.Stat(dir)
		if err == nil && time.Since(info.ModTime()) > abandonedAfter && !localpg.InUse(dir) {
			_ = os.RemoveAll(dir)
		}
	}
}
