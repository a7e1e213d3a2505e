package bundle

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"
)

// Limits on what is read. The server has other limits on the contents of policies and
// entities.
const (
	MaxFiles     = 10_000
	MaxBytes     = 256 << 20 // all files together
	MaxYAMLBytes = 1 << 20   // one YAML file
	MaxFields    = 10_000
	MaxTests     = 10_000

	maxPathBytes = 512     // the path of one file
	maxEntries   = 100_000 // directory entries, of known files or not
)

// ReadDir reads the bundle in a folder. Its name is that of the folder, unless
// bundle.yaml has a name. Links are read as by [Read]. If there are mistakes, the error
// is a [Problems].
func ReadDir(dir string) (*Bundle, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("read bundle: %w", err)
	}
	// An os.Root refuses links that lead out of the folder, without a race. os.DirFS does
	// not.
	root, err := os.OpenRoot(abs)
	if err != nil {
		return nil, fmt.Errorf("read bundle: %w", err)
	}
	defer root.Close()
	return Read(root.FS(), filepath.Base(abs))
}

// Read reads the bundle at the root of a file system. It leaves out names that start with
// a dot, README files and files of unknown types, and lists them as [Bundle.Ignored], but a
// file that people could take for a part of the bundle is a problem.
//
// A symbolic link must lead to a file in the file system, or to a folder below a name
// that starts with a dot, which is read under the name of the link: a mounted ConfigMap
// of Kubernetes has such links. Any other link is a problem, whatever its name is,
// because it may lead to policies. A link to a folder without a dot is a problem too,
// because that folder is read under its own name.
func Read(fsys fs.FS, defaultName string) (*Bundle, error) {
	w := walker{fsys: fsys, folders: map[string]string{}}
	if err := w.folder(".", "."); err != nil && !errors.Is(err, errStop) {
		return nil, fmt.Errorf("read bundle: %w", err)
	}
	return fromFiles(defaultName, w.files, w.ignored, w.probs)
}

// errStop ends a walk after its problem was added.
var errStop = errors.New("stop")

type walker struct {
	fsys    fs.FS
	folders map[string]string // folders that were read: path without links → name in the bundle
	files   []File
	ignored []string
	probs   Problems
	seen    int
	bytes   int
}

// folder reads everything in a folder. name is its path in the bundle, and actual its
// path without links.
func (w *walker) folder(name, actual string) error {
	if first, twice := w.folders[actual]; twice {
		w.probs.add(Problem{File: name, Message: "is the same folder as " + first, Hint: "policies are read once: remove one of the two"})
		return nil
	}
	w.folders[actual] = name
	entries, err := fs.ReadDir(w.fsys, actual)
	switch {
	case err != nil && name == ".":
		return err
	case err != nil:
		w.probs.add(Problem{File: name, Message: "cannot be read: " + cause(err)})
		return nil
	}
	for _, d := range entries {
		if strings.HasPrefix(d.Name(), ".") {
			w.hide(path.Join(name, d.Name()), d)
			continue
		}
		if w.seen++; w.seen > maxEntries {
			w.probs.add(Problem{Message: fmt.Sprintf("the folder holds more than %d entries", maxEntries),
				Hint: "is this the bundle's folder?"})
			return errStop
		}
		if err := w.entry(path.Join(name, d.Name()), path.Join(actual, d.Name()), d.Type()); err != nil {
			return err
		}
	}
	return nil
}

// hide notes a name that starts with a dot. The names with two dots in a mounted ConfigMap are read by
// links.
func (w *walker) hide(name string, d fs.DirEntry) {
	if strings.HasPrefix(d.Name(), "..") || len(w.ignored) > maxEntries {
		return
	}
	if d.IsDir() {
		name += "/"
	}
	w.ignored = append(w.ignored, name)
}

// entry reads one entry of a folder.
func (w *walker) entry(name, actual string, mode fs.FileMode) error {
	if mode&fs.ModeSymlink != 0 {
		target, info, err := resolve(w.fsys, actual)
		switch {
		case err != nil:
			w.probs.add(Problem{File: name, Message: "is a link that cannot be followed inside the bundle: " + cause(err),
				Hint: "put here what it links to"})
			return nil
		case info.IsDir() && !hidden(target):
			w.probs.add(Problem{File: name, Message: "is a link to a folder that is read at its own place", Hint: "remove the link"})
			return nil
		}
		actual, mode = target, info.Mode().Type()
	}
	if !mode.IsDir() {
		return w.file(name, actual, mode)
	}
	if p := folderProblem(name); p != nil {
		w.probs.add(*p)
		return nil
	}
	return w.folder(name, actual)
}

// maxLinks bounds the links on the path to one file, as in Linux.
const maxLinks = 40

// resolve follows the links in a path inside the file system, and returns the
// path without links.
func resolve(fsys fs.FS, name string) (string, fs.FileInfo, error) {
	links, actual, rest := 0, ".", strings.Split(name, "/")
	info, err := fs.Stat(fsys, ".")
	for err == nil && len(rest) > 0 {
		var segment string
		segment, rest = rest[0], rest[1:]
		switch {
		case !info.IsDir():
			return "", nil, errors.New("not a folder")
		case segment == "" || segment == ".":
			continue
		case segment == ".." && actual == ".":
			return "", nil, errors.New("it leaves the bundle's folder")
		case segment == "..":
			actual = path.Dir(actual)
			continue
		}
		next := path.Join(actual, segment)
		var found fs.FileInfo
		if found, err = fs.Lstat(fsys, next); err != nil {
			break
		}
		if found.Mode()&fs.ModeSymlink == 0 {
			actual, info = next, found
			continue
		}
		var target string
		if target, err = fs.ReadLink(fsys, next); err != nil {
			break
		}
		target = filepath.ToSlash(target)
		if links++; links > maxLinks {
			return "", nil, errors.New("too many links, one after the other or in a circle")
		}
		if path.IsAbs(target) {
			return "", nil, errors.New("its target is an absolute path")
		}
		rest = append(strings.Split(target, "/"), rest...)
	}
	if err != nil {
		return "", nil, err
	}
	return actual, info, nil
}

// file reads one entry that is not a folder, if it is part of a bundle.
func (w *walker) file(name, actual string, mode fs.FileMode) error {
	kind, prob := classify(name)
	switch {
	case prob != nil:
		w.probs.add(*prob)
		return nil
	case kind == kindIgnored:
		w.ignored = append(w.ignored, name)
		return nil
	case !mode.IsRegular():
		w.probs.add(Problem{File: name, Message: "is not a regular file"})
		return nil
	case len(w.files) == MaxFiles:
		w.probs.add(Problem{Message: fmt.Sprintf("the bundle holds more than %d files", MaxFiles)})
		return errStop
	}
	content, err := w.read(actual)
	if err != nil {
		w.probs.add(Problem{File: name, Message: "cannot be read: " + cause(err)})
		return nil
	}
	if w.bytes += len(content); w.bytes > MaxBytes {
		w.probs.add(tooBig())
		return errStop
	}
	w.files = append(w.files, File{Path: name, Content: content})
	return nil
}

// read returns the content of a file, at most one byte more than the limit allows.
func (w *walker) read(name string) (_ []byte, err error) {
	f, err := w.fsys.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, int64(MaxBytes-w.bytes)+1))
}

// cause returns the text of an error without the path, which the Problem has already.
func cause(err error) string {
	if pe, ok := errors.AsType[*fs.PathError](err); ok {
		return pe.Err.Error()
	}
	return err.Error()
}

func tooBig() Problem {
	return Problem{Message: fmt.Sprintf("the bundle is larger than %d MiB", MaxBytes>>20)}
}

// FromFiles makes a bundle of uploaded files. Every path must be relative and clean, with
// forward slashes, and given once.
func FromFiles(name string, files []File) (*Bundle, error) {
	return fromFiles(name, files, nil, nil)
}

// fromFiles is FromFiles with the paths that were ignored and the problems that were found before.
func fromFiles(name string, files []File, ignored []string, probs Problems) (*Bundle, error) {
	var (
		kept  []File
		total int
		seen  = make(map[string]bool, len(files))

		byFolded = make(map[string]string, len(files)) // path in lower case → path
	)
	if len(files) > MaxFiles {
		return nil, Problems{{Message: fmt.Sprintf("the bundle holds more than %d files", MaxFiles)}}
	}
	for _, f := range files {
		if !validFilePath(f.Path) {
			probs.add(*notAPath(f.Path))
			continue
		}
		if seen[f.Path] {
			probs.add(Problem{File: f.Path, Message: "is given twice"})
			continue
		}
		seen[f.Path] = true
		kind, prob := classify(f.Path)
		if prob != nil {
			probs.add(*prob)
		}
		if kind == kindIgnored {
			ignored = append(ignored, f.Path)
			continue
		}
		folded := strings.ToLower(f.Path)
		if other, twice := byFolded[folded]; twice {
			probs.add(Problem{File: f.Path, Message: fmt.Sprintf("differs from %s in upper and lower case only", other),
				Hint: "on some systems the two are one file: rename one"})
			continue
		}
		byFolded[folded] = f.Path
		if total += len(f.Content); total > MaxBytes {
			return nil, append(probs, tooBig())
		}
		kept = append(kept, f)
	}
	b, err := build(name, kept, probs)
	if b != nil {
		slices.Sort(ignored)
		b.Ignored = ignored
	}
	return b, err
}

// validFilePath reports whether p is a path in a bundle on every system.
func validFilePath(p string) bool {
	return len(p) <= maxPathBytes && p != "." && fs.ValidPath(p) &&
		!strings.ContainsFunc(p, func(r rune) bool { return r == '\\' || r == ':' || r < ' ' || r == 0x7f })
}

type kind int

const (
	kindIgnored kind = iota
	kindKnown
	kindPolicy
	kindSchema
)

var (
	policyPattern = regexp.MustCompile(`[^/]\.cedar(\.json)?$`)
	schemaPattern = regexp.MustCompile(`[^/]\.cedarschema(\.json)?$`)
	// cedarPattern matches names of policies and schemas in other letters or with something behind, as
	// "A.CEDAR", "a.cedar.bak" and "a.cedar~".
	cedarPattern = regexp.MustCompile(`(?is)\.cedar(schema)?([^a-z0-9].*)?$`)
	// otherPattern matches names that people give to policies and schemas in other formats.
	otherPattern = regexp.MustCompile(`(?i)^(cedar[-_.]?)?(policy|policies|policy[-_.]?sets?|schemas?|templates?|template[-_.]?links?)\.(json|ya?ml|txt)$`)
)

const formsHint = "policies end in .cedar or .cedar.json, schemas in .cedarschema or .cedarschema.json, in small letters; rename it, or begin its name with a dot to keep it out"

// classify returns the kind of a file from its path alone. It returns a problem for a
// file that would be ignored although its author probably wants it to be read: to ignore
// a catalogue or a forbid is worse than an error.
func classify(name string) (kind, *Problem) {
	base := path.Base(name)
	if hidden(name) {
		if isPolicyName(base) { // in an upload only: a walk of a folder skips hidden files
			return kindIgnored, &Problem{File: name, Message: "would not be read", Hint: "names that start with a dot are left out of a bundle"}
		}
		return kindIgnored, nil
	}
	for dir := path.Dir(name); dir != "."; dir = path.Dir(dir) {
		if p := folderProblem(dir); p != nil {
			return kindIgnored, p
		}
	}
	top := base == name
	switch {
	case policyPattern.MatchString(base):
		return kindPolicy, nil
	case schemaPattern.MatchString(base):
		return kindSchema, nil
	case cedarPattern.MatchString(base) || otherPattern.MatchString(base):
		return kindIgnored, &Problem{File: name, Message: "would not be read", Hint: formsHint}
	case strings.HasPrefix(strings.ToUpper(base), "README"):
		return kindIgnored, nil
	case slices.Contains(known, base) && top:
		return kindKnown, nil
	case slices.Contains(known, base):
		return kindIgnored, &Problem{File: name, Message: base + " belongs at the top of the bundle"}
	}
	switch strings.ToLower(path.Ext(base)) {
	case ".yaml", ".yml", ".json":
		if top {
			return kindIgnored, &Problem{File: name, Message: "a bundle knows no file of this name",
				Hint: "known are " + strings.Join(known, ", ")}
		}
	}
	return kindIgnored, nil
}

// CheckPath reports whether a file is part of a bundle, from its path alone. It returns a problem for
// a path that no file of a bundle may have, and for a file that would be ignored although its author
// probably wants it to be read.
func CheckPath(name string) (part bool, problem *Problem) {
	if !validFilePath(name) {
		return false, notAPath(name)
	}
	kind, problem := classify(name)
	return kind != kindIgnored, problem
}

func notAPath(name string) *Problem {
	return &Problem{File: fmt.Sprintf("%.100q", name), Message: "is not a path inside a bundle", Hint: "relative, with forward slashes, without .. and ."}
}

// known are the names of files at the top of a bundle, except policies and schemas.
var known = []string{ManifestName, FieldsName, EntitiesName, TestsName}

// hidden reports whether a name in the path starts with a dot.
func hidden(name string) bool {
	return name != "." && (strings.HasPrefix(name, ".") || strings.Contains(name, "/."))
}

// isPolicyName reports whether a name is that of a policy file or looks like one:
// "A.CEDAR", or a name with a space or a dot at its end, which not every system shows.
func isPolicyName(base string) bool {
	return strings.HasSuffix(strings.TrimSuffix(strings.ToLower(strings.TrimRight(base, ". \t\r\n")), ".json"), ".cedar")
}

// folderProblem refuses a folder with the name of a file. Container engines make such a
// folder if a file to mount does not exist.
func folderProblem(name string) *Problem {
	if base := path.Base(name); isPolicyName(base) || slices.Contains(known, name) || name == SchemaName {
		return &Problem{File: name, Message: "is a folder, and its name is that of a file", Hint: "was a file to be mounted here that does not exist?"}
	}
	return nil
}

// build makes the bundle of files whose paths are valid.
func build(name string, files []File, probs Problems) (*Bundle, error) {
	files = slices.Clone(files)
	slices.SortFunc(files, func(a, b File) int { return cmp.Compare(a.Path, b.Path) })
	b := &Bundle{Name: name, OnForbidError: Deny, Files: files}
	var hasSchema bool
	for _, f := range files {
		kind, _ := classify(f.Path)
		hasSchema = hasSchema || kind == kindSchema
		if p := checkText(f); p != nil {
			probs.add(*p)
			continue
		}
		switch {
		case f.Path == ManifestName:
			readManifest(f, b, &probs)
		case f.Path == FieldsName:
			b.Fields = readFields(f, &probs)
		case f.Path == EntitiesName:
			b.Entities = f.Content
		case f.Path == TestsName:
			b.Tests = readTests(f, &probs)
		case kind == kindSchema:
			b.Schemas = append(b.Schemas, f)
		default:
			if len(bytes.TrimSpace(f.Content)) == 0 {
				probs.add(Problem{File: f.Path, Message: "is empty", Hint: "remove the file if it is to have no policies"})
			}
			b.Policies = append(b.Policies, f)
		}
	}
	if !hasSchema {
		probs.add(Problem{File: SchemaName, Message: "is missing", Hint: "a bundle has a schema: a file that ends in .cedarschema or .cedarschema.json"})
	}
	if b.Name == name && !validName(name) {
		probs.add(Problem{File: ManifestName, Message: fmt.Sprintf("%.100q cannot be a bundle's name: %s", name, nameRule),
			Hint: "give a name in " + ManifestName})
	}
	if len(probs) > 0 {
		return nil, probs
	}
	return b, nil
}

// checkText refuses text that no file of a bundle may have.
func checkText(f File) *Problem {
	at := -1
	var msg, hint string
	if i := bytes.IndexByte(f.Content, 0); i >= 0 {
		at, msg = i, "holds a NUL byte"
	} else if !utf8.Valid(f.Content) {
		at, msg = 0, "is not UTF-8"
		for at < len(f.Content) {
			r, n := utf8.DecodeRune(f.Content[at:])
			if r == utf8.RuneError && n == 1 {
				break
			}
			at += n
		}
	} else if bytes.HasPrefix(f.Content, []byte("\ufeff")) {
		at, msg, hint = 0, "starts with a byte order mark", "save it as UTF-8 without one"
	}
	if at < 0 {
		return nil
	}
	before := f.Content[:at]
	return &Problem{File: f.Path, Line: bytes.Count(before, []byte("\n")) + 1,
		Column: at - bytes.LastIndexByte(before, '\n'), Message: msg, Hint: hint}
}

// WriteDir writes files into a folder, which it makes if necessary. The folder must be
// empty, because an old file would become part of the bundle.
func WriteDir(dir string, files []File) (err error) {
	for _, f := range files {
		if !validFilePath(f.Path) {
			return fmt.Errorf("write bundle: %q is not a path inside a bundle", f.Path)
		}
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("write bundle: %w", err)
	}
	if old, err := os.ReadDir(dir); err != nil {
		return fmt.Errorf("write bundle: %w", err)
	} else if len(old) > 0 {
		return fmt.Errorf("write bundle: %s is not empty", dir)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("write bundle: %w", err)
	}
	defer root.Close()
	for _, f := range files {
		if err := root.MkdirAll(path.Dir(f.Path), 0o755); err != nil {
			return fmt.Errorf("write bundle: %w", err)
		}
		if err := writeNew(root, f); err != nil {
			return fmt.Errorf("write bundle: %w", err)
		}
	}
	return nil
}

// writeNew fails if there is a file of that name. On some systems that is also a file
// whose name differs in case only.
func writeNew(root *os.Root, f File) error {
	out, err := root.OpenFile(f.Path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	_, err = out.Write(f.Content)
	return errors.Join(err, out.Close())
}
