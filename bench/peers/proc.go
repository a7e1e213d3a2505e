package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"time"
)

// tick is the unit of CPU times in /proc. It is the same on all Linux architectures that Go knows.
const tick = 10 * time.Millisecond

// process is one process, as /proc/PID/stat shows it.
type process struct {
	pid, parent int
	name        string
	cpu         time.Duration // its own, and that of children that ended and were waited for
}

// usage is CPU time or memory of a server and its Postgres apart.
type usage[T time.Duration | int64] struct{ server, database T }

// parseStat reads /proc/PID/stat. See proc(5).
func parseStat(stat string) (p process, err error) {
	open, end := strings.IndexByte(stat, '('), strings.LastIndexByte(stat, ')')
	if open < 1 || end < open {
		return p, fmt.Errorf("no name in %q", stat)
	}
	if p.pid, err = strconv.Atoi(strings.TrimSpace(stat[:open])); err != nil {
		return p, err
	}
	p.name = stat[open+1 : end] // it may have spaces and parentheses
	fields := strings.Fields(stat[end+1:])
	if len(fields) < 15 {
		return p, fmt.Errorf("too few fields in %q", stat)
	}
	if p.parent, err = strconv.Atoi(fields[1]); err != nil {
		return p, err
	}
	for _, field := range fields[11:15] { // utime, stime, cutime, cstime
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return p, err
		}
		p.cpu += time.Duration(n) * tick
	}
	return p, nil
}

// processes returns all processes of proc, which is /proc, by the process that started them.
func processes(proc fs.FS) (byParent map[int][]process, byID map[int]process, err error) {
	files, err := fs.Glob(proc, "[0-9]*/stat")
	if err != nil {
		return nil, nil, err
	}
	byParent, byID = map[int][]process{}, map[int]process{}
	for _, file := range files {
		stat, err := fs.ReadFile(proc, file)
		if err != nil {
			continue // the process has ended
		}
		p, err := parseStat(string(stat))
		if err != nil {
			return nil, nil, fmt.Errorf("%s: %w", file, err)
		}
		byParent[p.parent] = append(byParent[p.parent], p)
		byID[p.pid] = p
	}
	return byParent, byID, nil
}

// walk calls visit for the processes with the ids and for all below them. A process named
// postgres, and what is below it, is of the database.
func walk(proc fs.FS, ids []int, visit func(p process, database bool)) error {
	byParent, byID, err := processes(proc)
	if err != nil {
		return err
	}
	var down func(p process, database bool)
	down = func(p process, database bool) {
		database = database || p.name == "postgres"
		visit(p, database)
		for _, child := range byParent[p.pid] {
			down(child, database)
		}
	}
	for _, id := range ids {
		p, ok := byID[id]
		if !ok {
			return fmt.Errorf("process %d has ended", id)
		}
		down(p, false)
	}
	return nil
}

// cpu returns the CPU time of the trees of processes.
func cpu(proc fs.FS, ids []int) (used usage[time.Duration], err error) {
	err = walk(proc, ids, func(p process, database bool) {
		if database {
			used.database += p.cpu
		} else {
			used.server += p.cpu
		}
	})
	return used, err
}

// memory returns the resident memory of the trees of processes in bytes. What several processes
// share, such as the buffers of Postgres, counts once (the Pss of proc(5)).
func memory(proc fs.FS, ids []int) (used usage[int64], err error) {
	var failed error
	err = walk(proc, ids, func(p process, database bool) {
		rollup, err := fs.ReadFile(proc, fmt.Sprintf("%d/smaps_rollup", p.pid))
		if err != nil {
			return // the process has ended
		}
		n, err := parsePss(rollup)
		if err != nil {
			failed = err
		}
		if database {
			used.database += n
		} else {
			used.server += n
		}
	})
	return used, errors.Join(err, failed)
}

func parsePss(rollup []byte) (int64, error) {
	lines := bufio.NewScanner(bytes.NewReader(rollup))
	for lines.Scan() {
		if rest, ok := strings.CutPrefix(lines.Text(), "Pss:"); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(rest, "kB")), 10, 64)
			return n << 10, err
		}
	}
	return 0, errors.New("no Pss in smaps_rollup")
}
