package main

import (
	"os"
	"path/filepath"
	"testing"
)

// The limit is the least one of the cgroup and those around it.
func TestMemoryOfTheCgroup(t *testing.T) {
	for name, c := range map[string]struct {
		files map[string]string
		want  int64
	}{
		"a container":           {map[string]string{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "1073741824\n"}, 1 << 30},
		"no limit":              {map[string]string{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, 0},
		"a service":             {map[string]string{"proc/self/cgroup": "0::/system.slice/cedarpost.service\n", "sys/fs/cgroup/system.slice/cedarpost.service/memory.max": "2000\n"}, 2000},
		"a slice around it":     {map[string]string{"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "2000\n", "sys/fs/cgroup/a/memory.max": "1000\n"}, 1000},
		"both versions":         {map[string]string{"proc/self/cgroup": "4:memory:/x\n0::/a\n", "sys/fs/cgroup/a/memory.max": "5\n"}, 5},
		"outside of the space":  {map[string]string{"proc/self/cgroup": "0::/../../a\n", "sys/fs/cgroup/memory.max": "7\n"}, 7},
		"version 1":             {map[string]string{"proc/self/cgroup": "4:memory:/x\n"}, 0},
		"not Linux":             {nil, 0},
		"not a number of bytes": {map[string]string{"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "99999999999999999999\n"}, 0},
	} {
		dir := t.TempDir()
		for file, text := range c.files {
			if err := os.MkdirAll(filepath.Join(dir, filepath.Dir(file)), 0o700); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if got := cgroupMemory(os.DirFS(dir)); got != c.want {
			t.Errorf("%s: %d, want %d", name, got, c.want)
		}
	}
}

func TestMemoryOfTheMachine(t *testing.T) {
	for text, want := range map[string]int64{
		"MemTotal:       24732004 kB\nMemFree: 1 kB\n": 24732004 << 10,
		"MemFree: 1 kB\nMemTotal: 8 kB\n":              8 << 10,
		"MemTotal: much\n":                             0,
		"MemTotal: 9999999999999999 kB\n":              0,
		"":                                             0,
	} {
		dir := t.TempDir()
		if err := os.MkdirAll(filepath.Join(dir, "proc"), 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, dir, "proc/meminfo", text)
		if got := machineMemory(os.DirFS(dir)); got != want {
			t.Errorf("%q: %d, want %d", text, got, want)
		}
	}
	if got := machineMemory(os.DirFS(t.TempDir())); got != 0 {
		t.Errorf("no such file: %d", got)
	}
}
