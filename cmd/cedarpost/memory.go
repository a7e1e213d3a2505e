package main

import (
	"io/fs"
	"log/slog"
	"math"
	"os"
	"path"
	"runtime/debug"
	"strconv"
	"strings"
)

// limitMemory sets the soft memory limit of the Go runtime to nine tenths of what the cgroup of
// this process may use. Without it the heap may double before the garbage collector runs, and
// the kernel ends the process. A limit from GOMEMLIMIT stays.
func limitMemory(log *slog.Logger) {
	if debug.SetMemoryLimit(-1) != math.MaxInt64 {
		return
	}
	if most := cgroupMemory(os.DirFS("/")); most > 0 {
		limit := most / 10 * 9
		debug.SetMemoryLimit(limit)
		log.Info("soft memory limit set, nine tenths of the limit of the cgroup", "bytes", limit)
	}
}

// cgroupMemory returns the least memory.max of the cgroup of this process (version 2) and of
// those that it is in, or 0 if there is none.
func cgroupMemory(root fs.FS) (most int64) {
	own, err := fs.ReadFile(root, "proc/self/cgroup")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(own)) {
		name, ok := strings.CutPrefix(strings.TrimSpace(line), "0::/")
		if !ok {
			continue
		}
		// A path with "..", as for a process outside of the cgroup namespace, is cleaned.
		for dir := path.Clean("/" + name); ; dir = path.Dir(dir) {
			text, err := fs.ReadFile(root, path.Join("sys/fs/cgroup", dir, "memory.max"))
			if n, bad := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64); err == nil && bad == nil && (most == 0 || n < most) {
				most = n
			}
			if dir == "/" {
				return most
			}
		}
	}
	return 0
}
