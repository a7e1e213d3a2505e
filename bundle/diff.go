package bundle

import (
	"bytes"
	"cmp"
	"slices"

	"github.com/aymanbagabas/go-udiff"
)

// Limits on the text of a difference.
const (
	MaxDiffFile  = 1 << 20  // bytes of a file that is compared line by line
	MaxDiffText  = 4 << 20  // bytes of the text of all files together
	MaxDiffBytes = 64 << 20 // bytes of the files that are compared line by line, together
)

// FileDiff is a file that differs between two states of a bundle.
type FileDiff struct {
	Path string
	// Added and Removed say that only the second or only the first state has the file.
	Added, Removed bool
	// Text is the difference in the unified format, with three lines of context. It is empty if the
	// file or the whole difference is too large: then Omitted is true.
	Text    string
	Omitted bool
}

// Differ makes the texts of a difference, within the limits. The zero value begins one.
type Differ struct{ text, bytes int }

// Diff returns the difference of one file. A nil content says that the state does not have the file;
// before and after must differ. tooLarge says that the contents are not given, because one of them is
// over [MaxDiffFile].
func (d *Differ) Diff(path string, before, after []byte, tooLarge bool) FileDiff {
	f := FileDiff{Path: path, Added: before == nil, Removed: after == nil}
	d.bytes += len(before) + len(after)
	if f.Omitted = tooLarge || max(len(before), len(after)) > MaxDiffFile || d.bytes > MaxDiffBytes || d.text >= MaxDiffText; f.Omitted {
		return f
	}
	from, to := "a/"+path, "b/"+path
	if f.Added {
		from = "/dev/null"
	}
	if f.Removed {
		to = "/dev/null"
	}
	text := udiff.Unified(from, to, string(before), string(after))
	if d.text += len(text); d.text > MaxDiffText {
		f.Omitted = true
		return f
	}
	f.Text = text
	return f
}

// Diff compares the files of two states of a bundle, by path. It returns those that differ.
func Diff(before, after []File) (list []FileDiff) {
	content := map[string][2][]byte{}
	for i, files := range [][]File{before, after} {
		for _, f := range files {
			pair := content[f.Path]
			if pair[i] = f.Content; f.Content == nil {
				pair[i] = []byte{}
			}
			content[f.Path] = pair
		}
	}
	paths := make([]string, 0, len(content))
	for path, pair := range content {
		if pair[0] == nil || pair[1] == nil || !bytes.Equal(pair[0], pair[1]) {
			paths = append(paths, path)
		}
	}
	slices.Sort(paths)
	var d Differ
	for _, path := range paths {
		list = append(list, d.Diff(path, content[path][0], content[path][1], false))
	}
	return list
}

// An Edit puts or removes one file of a bundle.
type Edit struct {
	Path    string
	Removed bool
	Content []byte // nil if Removed
}

// Edits returns the edits that make the files after of the files before, by path.
func Edits(before, after []File) (list []Edit) {
	was := make(map[string][]byte, len(before))
	for _, f := range before {
		was[f.Path] = f.Content
	}
	is := make(map[string]bool, len(after))
	for _, f := range after {
		is[f.Path] = true
		if old, ok := was[f.Path]; !ok || !bytes.Equal(old, f.Content) {
			list = append(list, Edit{Path: f.Path, Content: f.Content})
		}
	}
	for _, f := range before {
		if !is[f.Path] {
			list = append(list, Edit{Path: f.Path, Removed: true})
		}
	}
	slices.SortFunc(list, func(a, b Edit) int { return cmp.Compare(a.Path, b.Path) })
	return list
}

// Apply returns the files with the edits, by path. The files are in order of path. An edit that removes
// a file that is not there changes nothing.
func Apply(files []File, edits []Edit) []File {
	edited := make(map[string]bool, len(edits))
	for _, e := range edits {
		edited[e.Path] = true
	}
	out := make([]File, 0, len(files)+len(edits))
	for _, f := range files {
		if !edited[f.Path] {
			out = append(out, f)
		}
	}
	for _, e := range edits {
		if !e.Removed {
			out = append(out, File{Path: e.Path, Content: e.Content})
		}
	}
	slices.SortFunc(out, func(a, b File) int { return cmp.Compare(a.Path, b.Path) })
	return out
}

// Conflicts lists the files that edits of one state of a bundle and the step from that state to
// another one both change, unless both make the same of a file. Without conflicts, the edits can be
// applied to the other state.
func Conflicts(base, other []File, edits []Edit) (paths []string) {
	content := func(files []File, path string) ([]byte, bool) {
		i, ok := slices.BinarySearchFunc(files, path, func(f File, path string) int { return cmp.Compare(f.Path, path) })
		if !ok {
			return nil, false
		}
		return files[i].Content, true
	}
	for _, e := range edits {
		was, had := content(base, e.Path)
		is, has := content(other, e.Path)
		if had == has && bytes.Equal(was, is) || has != e.Removed && bytes.Equal(is, e.Content) {
			continue
		}
		paths = append(paths, e.Path)
	}
	return paths
}
