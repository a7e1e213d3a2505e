package bundle_test

import (
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/fstest"

	"github.com/cedarpost/cedarpost/bundle"
	"pgregory.net/rapid"
)

// folder makes a bundle "shop" with more files and with links: name → target. Next to it
// is the folder "shared" with a policy.
func folder(t testing.TB, more files, links files) string {
	t.Helper()
	top := t.TempDir()
	for name, content := range (files{"shared/f.cedar": "forbid (principal, action, resource);", "shared/note.txt": "for people"}) {
		write(t, filepath.Join(top, name), content)
	}
	dir := filepath.Join(top, "shop")
	for name, content := range with(more) {
		write(t, filepath.Join(dir, name), content)
	}
	for name, target := range links {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func write(t testing.TB, name, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// read reads a folder with ReadDir and Read, which must agree, and returns the paths of
// its policies.
func read(t *testing.T, dir string) ([]string, error) {
	t.Helper()
	b, err := bundle.ReadDir(dir)
	b2, err2 := bundle.Read(os.DirFS(dir), "shop")
	if (err == nil) != (err2 == nil) || err != nil && err.Error() != err2.Error() || err == nil && b.Digest() != b2.Digest() {
		t.Errorf("as a folder: %v, as a file system: %v", err, err2)
	}
	var paths []string
	if err == nil {
		for _, f := range b.Policies {
			paths = append(paths, f.Path)
		}
	}
	return paths, err
}

// A link may lead to a policy, whatever its name is, so a link that cannot be followed is
// never ignored.
func TestLinksThatCannotBeFollowed(t *testing.T) {
	const refused = ": is a link that cannot be followed inside the bundle: "
	const leaves, absolute, missing, circle = "it leaves the bundle's folder", "its target is an absolute path", "no such file or directory",
		"too many links, one after the other or in a circle"
	for _, c := range []struct {
		name  string
		links files
		want  []string
	}{
		{"to a folder outside", files{"docs/shared": "../../shared"}, []string{"docs/shared" + refused + leaves}},
		{"to a file outside of a kind that a bundle does not know", files{"note.txt": "../shared/note.txt"}, []string{"note.txt" + refused + leaves}},
		{"to a file outside that people read", files{"README.md": "../shared/note.txt"}, []string{"README.md" + refused + leaves}},
		{"to a policy outside", files{"f.cedar": "../shared/f.cedar"}, []string{"f.cedar" + refused + leaves}},
		{"out and back in", files{"f.cedar": "../shop/views/v.cedar"}, []string{"f.cedar" + refused + leaves}},
		{"to nothing", files{"gone": "nowhere", "gone.cedar": "nowhere"}, []string{"gone" + refused + missing, "gone.cedar" + refused + missing}},
		{"through a file", files{"v": "views/v.cedar/", "w": "views/v.cedar/../v.cedar"}, []string{"v" + refused + "not a folder", "w" + refused + "not a folder"}},
		{"to itself", files{"a": "a"}, []string{"a" + refused + circle}},
		{"to each other", files{"a": "x/b", "x/b": "../a"}, []string{"a" + refused + circle, "x/b" + refused + circle}},
		{"to an absolute path", files{"a": "/"}, []string{"a" + refused + absolute}},
		{"through another link", files{".out": "../shared", "a": ".out", "b": ".out/f.cedar"}, []string{"a" + refused + leaves, "b" + refused + leaves}},
		{"from a linked folder", files{"a": ".b", ".b/out": "../../shared", ".b/in.cedar": "../views/v.cedar"}, []string{"a/out" + refused + leaves}},

		{"to a folder inside", files{"again": "views"}, []string{"again: is a link to a folder that is read at its own place"}},
		{"to the bundle itself", files{"views/again": ".."}, []string{"views/again: is a link to a folder that is read at its own place"}},
		{"twice to a hidden folder", files{"a": ".b", "c": "./.b/.", ".b/v.cedar": "../views/v.cedar"}, []string{"c: is the same folder as a"}},
		{"in a hidden folder to itself", files{"a": ".b/c", ".b/c/d": ".."}, []string{"a/d/c: is the same folder as a"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := read(t, folder(t, files{"views/v.cedar": "permit (principal, action, resource);"}, c.links))
			wantProblems(t, err, c.want...)
		})
	}
}

// A mounted ConfigMap or projected volume has its files in a hidden folder, and links to
// them by two links.
func TestMountedConfigMap(t *testing.T) {
	for _, below := range []string{"", "mounted/"} {
		got, err := read(t, folder(t, files{
			below + "..2024_01_02/f.cedar": "forbid (principal, action, resource);", below + "..2024_01_02/sub/g.cedar": "forbid (principal, action, resource);",
			below + "..2024_01_02/sub/deep/h.cedar": "forbid (principal, action, resource);", below + "..2024_01_02/notes.txt": "for people",
		}, files{
			below + "..data": "..2024_01_02", below + "f.cedar": "..data/f.cedar", below + "sub": "..data/sub", below + "notes.txt": "..data/notes.txt",
		}))
		if want := []string{below + "f.cedar", below + "sub/deep/h.cedar", below + "sub/g.cedar"}; err != nil || !slices.Equal(got, want) {
			t.Errorf("%q, %v, want %q", got, err, want)
		}
	}
}

// With any links between its files and folders, a bundle is either refused or read with
// every policy that a program finds if it follows all links.
func TestNoLinkLosesAPolicy(t *testing.T) {
	names := []string{"a", "b.cedar", "c/d", "c/e.cedar", ".h/f", ".h/g.cedar"}
	targets := []string{"a", "b.cedar", "c", "../c", ".h", "../.h", "..", "../../shared", "c/p.cedar", ".h/q.cedar", "../.h/q.cedar", "."}
	rapid.Check(t, func(rt *rapid.T) {
		links := rapid.MapOfN(rapid.SampledFrom(names), rapid.SampledFrom(targets), 0, 4).Draw(rt, "links")
		dir := folder(t, files{"c/p.cedar": "permit (principal, action, resource);", ".h/q.cedar": "forbid (principal, action, resource);"}, links)
		b, err := bundle.ReadDir(dir)
		if err != nil {
			return
		}
		has := map[string]bool{}
		for _, f := range b.Policies {
			has[string(f.Content)] = true
		}
		// Without an error no link leads out, so everything that can be reached is below
		// the folder, and no link leads in a circle.
		var visit func(at string, depth int)
		visit = func(at string, depth int) {
			entries, err := os.ReadDir(filepath.Join(dir, at))
			if err != nil {
				rt.Fatal(err)
			}
			for _, d := range entries {
				name := filepath.Join(at, d.Name())
				info, err := os.Stat(filepath.Join(dir, name))
				switch {
				case strings.HasPrefix(d.Name(), "."):
				case err != nil || depth > 10:
					rt.Fatalf("%s: depth %d, %v", name, depth, err)
				case info.IsDir():
					visit(name, depth+1)
				case strings.HasSuffix(name, ".cedar"):
					if text, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !has[string(text)] {
						rt.Fatalf("%s is not in the bundle: %v", name, err)
					}
				}
			}
		}
		visit("", 0)
	})
}

func TestWhatIsNoFile(t *testing.T) {
	dir := folder(t, nil, files{"linked.cedar": "pipe.cedar", "null": "../../../../../../../../../../dev/null"})
	for _, name := range []string{"pipe.cedar", "notes"} {
		if err := syscall.Mkfifo(filepath.Join(dir, name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"empty.cedar", "tests.yaml", ".cedar"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	_, err := read(t, dir)
	wantProblems(t, err,
		"empty.cedar: is a folder, and its name is that of a file",
		"linked.cedar: is not a regular file",
		"null: is a link that cannot be followed inside the bundle: it leaves the bundle's folder",
		"pipe.cedar: is not a regular file",
		"tests.yaml: is a folder, and its name is that of a file")
}

// locked is a file system whose folder "locked" cannot be read. A test that runs as root
// cannot make such a folder on disk.
type locked struct{ fstest.MapFS }

func (l locked) ReadDir(name string) ([]fs.DirEntry, error) {
	if name == "locked" {
		return nil, &fs.PathError{Op: "readdir", Path: name, Err: fs.ErrPermission}
	}
	return l.MapFS.ReadDir(name)
}

func TestFolderThatCannotBeRead(t *testing.T) {
	_, err := bundle.Read(locked{fstest.MapFS{"schema.cedarschema": {}, "locked/f.cedar": {}}}, "shop")
	wantProblems(t, err, "locked: cannot be read: permission denied")
}

// On a disk that ignores case, the second of two files would replace the first.
func TestWriteDirReplacesNothing(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "x")
	err := bundle.WriteDir(dir, []bundle.File{{Path: "a.cedar", Content: []byte("forbid")}, {Path: "a.cedar", Content: []byte("permit")}})
	text, readErr := os.ReadFile(filepath.Join(dir, "a.cedar"))
	if err == nil || readErr != nil || string(text) != "forbid" {
		t.Errorf("%v, %q, %v", err, text, readErr)
	}
}
