package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// An export removes the rows that an earlier one wrote after its state, and nothing else.
func TestSink(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "out")
	lines := func(state *exportState, text string) (*sink, error) {
		s, err := openSink(file, nil, state)
		if err == nil {
			err = s.line(text)
		}
		if err == nil {
			err = s.sync()
		}
		return s, err
	}
	is := func(want string) {
		t.Helper()
		if got, err := os.ReadFile(file); err != nil || string(got) != want {
			t.Errorf("%q, %v, want %q", got, err, want)
		}
	}
	s, err := lines(nil, "one\n")
	if err != nil || s.empty || s.size != 4 {
		t.Fatal(s, err)
	}
	state := exportState{Leaf: 3, Header: "h", File: file, Size: s.size}
	if err := state.write(filepath.Join(dir, "state")); err != nil {
		t.Fatal(err)
	}
	_ = s.line("torn")
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	is("one\ntorn")
	if _, err := lines(nil, "x"); err == nil || !strings.Contains(err.Error(), "not empty") {
		t.Errorf("written into another's file: %v", err)
	}
	read, err := readExportState(filepath.Join(dir, "state"))
	if err != nil || *read != state {
		t.Fatal(read, err)
	}
	for text, says := range map[string]string{
		`{"leaf":3,"header":"h","file":"f","size":4,"leaf":9}`: `"leaf"`, `{"leaf":3,"Leaf":9,"header":"h"}`: `"Leaf"`, `{"leaf":3} {}`: ``, `{"leaf":3}`: ``,
	} {
		bad := write(t, dir, "bad", text)
		if got, err := readExportState(bad); err == nil || !strings.Contains(err.Error(), "bad: not the state of an export") || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %v, %v", text, got, err)
		}
	}
	if s, err = lines(read, "two\n"); err != nil || s.empty || s.size != 8 {
		t.Fatal(s, err)
	}
	is("one\ntwo\n")
	// The state of another file, or of a file that was rotated, removes nothing.
	if _, err = lines(&exportState{File: file + "x", Size: 2}, "three\n"); err != nil {
		t.Fatal(err)
	}
	is("one\ntwo\nthree\n")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err = lines(read, "four\n"); err != nil {
		t.Fatal(err)
	}
	is("four\n")

	if s, err := readExportState(filepath.Join(dir, "none")); s != nil || err != nil {
		t.Error(s, err)
	}
	if _, err := readExportState(write(t, dir, "bad", `{"leaf":1}`)); err == nil {
		t.Error("a state without a header was taken")
	}
}

// A file that was rotated after the state was written keeps its complete lines.
func TestSinkRotatedWhileNobodyWrites(t *testing.T) {
	for says, line := range map[string]struct{ now, want string }{
		"what came after the state goes":          {"one\ntwo\ntorn", "one\n"},
		"a new, empty file":                       {"", ""},
		"a shorter one":                           {"1\n2", "1\n"},
		"one of the same length":                  {"1\n2\n", "1\n2\n"},
		"a longer one":                            {"other\nlines\nto", "other\nlines\n"},
		"one without a whole line":                {"torn", ""},
		"one with a long line that is not whole":  {"a\n" + strings.Repeat("b", 3*flushSize), "a\n"},
		"one that begins like the one it was not": {"on\ntw\n", "on\ntw\n"},
	} {
		t.Run(says, func(t *testing.T) {
			file := write(t, t.TempDir(), "out", "one\n")
			s, err := openSink(file, nil, &exportState{Leaf: 3, Header: "h", File: file, Size: 4})
			if err != nil {
				t.Fatal(err)
			}
			state := &exportState{Leaf: 3, Header: "h", File: file}
			if state.Size, state.Tail, err = s.mark(); err != nil {
				t.Fatal(err)
			}
			if err := s.close(); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, []byte(line.now), 0o600); err != nil {
				t.Fatal(err)
			}
			if s, err = openSink(file, nil, state); err != nil {
				t.Fatal(err)
			}
			if err := s.close(); err != nil {
				t.Fatal(err)
			}
			if got, err := os.ReadFile(file); err != nil || string(got) != line.want {
				t.Errorf("%.100q, %v", got, err)
			}
		})
	}
}

// A file that is cut off while it is written gets no zeros, and the state has its new size.
func TestSinkCutOff(t *testing.T) {
	file := filepath.Join(t.TempDir(), "out")
	s, err := openSink(file, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	moved := 0
	s.head, s.moved = "head\n", func() error { moved++; return nil }
	put := func(text string) {
		t.Helper()
		if err := errors.Join(s.line(text), s.sync()); err != nil {
			t.Fatal(err)
		}
	}
	put("one\n")
	put("two\n")
	if err := os.Truncate(file, 0); err != nil {
		t.Fatal(err)
	}
	put("three\n")
	if got, _ := os.ReadFile(file); string(got) != "head\nthree\n" || moved != 1 {
		t.Errorf("%q, moved %d times", got, moved)
	}
	// The file is cut off before the state is written.
	if err := os.Truncate(file, 5); err != nil {
		t.Fatal(err)
	}
	if size, _, err := s.mark(); size != 5 || err != nil {
		t.Error(size, err)
	}
}
