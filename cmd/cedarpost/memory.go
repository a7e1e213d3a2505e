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

// heapGrowth is by how many percent the heap grows before the garbage collector runs. Most of what
// a decision allocates is garbage a moment later. With Go's default of 100, collecting it takes a third
// of the CPU.
const heapGrowth = 400

// tuneMemory lets the heap grow by heapGrowth, and sets the soft memory limit of the Go runtime to
// nine tenths of what the cgroup of this process may use, or to half of the machine's memory. Above
// the limit the collector runs more often. Without a limit the kernel could end the process. Values
// from GOGC and GOMEMLIMIT stay.
func tuneMemory(log *slog.Logger) {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(heapGrowth)
	}
	if debug.SetMemoryLimit(-1) != math.MaxInt64 {
		return
	}
	root := os.DirFS("/")
	if most := cgroupMemory(root); most > 0 {
		limit := most / 10 * 9
		debug.SetMemoryLimit(limit)
		log.Info("soft memory limit set, nine tenths of the limit of the cgroup", "bytes", limit)
	} else if all := machineMemory(root); all > 0 {
		debug.SetMemoryLimit(all / 2)
		log.Info("soft memory limit set, half of the memory of this machine", "bytes", all/2)
	}
}

// machineMemory returns how much memory the machine has, or 0 if that is not known.
func machineMemory(root fs.FS) int64 {
	text, err := fs.ReadFile(root, "proc/meminfo")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(text)) {
		if amount, ok := strings.CutPrefix(line, "MemTotal:"); ok {
			kib, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(amount), "kB")), 10, 64)
			if err == nil && kib > 0 && kib < 1<<50 {
				return kib << 10
			}
		}
	}
	return 0
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
