package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"connectrpc.com/connect/v2"

	"github.com/cedarpost/cedarpost/bundle"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

type versionsCmd struct {
	outputFlags
	Bundle string `arg:"" help:"Name of the bundle."`
	Limit  int    `help:"At most so many (default ${default}; 0: all)." default:"100" placeholder:"N"`
	afterFlag
	adminFlags
}

// Run lists the versions. As JSON, each version is a line.
func (v *versionsCmd) Run(ctx context.Context, c *console) error {
	if v.Limit < 0 {
		return misuse("--limit must not be negative")
	}
	admin, err := v.dial()
	if err != nil {
		return err
	}
	rows := [][]string{{"VERSION", "PUBLISHED", "BY", "POLICIES", "APPROVED BY", "APPLIED BY", "WHY"}}
	req := &cedarpostv1.ListVersionsRequest{Bundle: v.Bundle}
	req.PageToken = v.After
	for left := v.Limit; ; {
		if v.Limit > 0 {
			req.PageSize = int32(min(left, 1000))
		}
		res, err := call(ctx, admin, admin.policies().ListVersions, req)
		if err != nil {
			return err
		}
		for _, one := range res.GetVersions() {
			if v.json() {
				if err := c.message(one); err != nil {
					return err
				}
				continue
			}
			rows = append(rows, versionRow(one))
		}
		left -= len(res.GetVersions())
		if req.PageToken = res.GetNextPageToken(); req.PageToken == "" || v.Limit > 0 && left <= 0 {
			break
		}
	}
	if !v.json() {
		c.table(rows)
	}
	c.more(req.GetPageToken())
	return nil
}

func versionRow(v *cedarpostv1.BundleVersion) []string {
	number := fmt.Sprint(v.GetVersion())
	if v.GetLive() {
		number += " live"
	}
	if v.GetDeletedBy() != "" {
		number += " deleted"
	}
	why := v.GetMessage()
	if v.GetChange() != "" {
		why = v.GetChange() + ": " + why
	}
	if v.GetRollbackOf() > 0 {
		why = fmt.Sprintf("rollback to %d: %s", v.GetRollbackOf(), why)
	}
	if v.GetBreakGlass() != "" {
		why = strings.TrimSuffix("BREAK-GLASS: "+v.GetBreakGlass()+"; "+why, "; ")
	}
	return []string{number, localTime(v.GetPublishedAt()), v.GetPublishedBy(), fmt.Sprint(v.GetPolicies()), callersOf(v.GetApprovedBy()), strings.TrimPrefix(appliedBy(v.GetServers()), "applied by "), why}
}

func callersOf(list []*cedarpostv1.Verdict) string {
	names := make([]string, len(list))
	for i, v := range list {
		names[i] = v.GetCaller()
	}
	return strings.Join(names, ", ")
}

// knows returns an error if no bundle has a name, and none ever had it.
func (p *peer) knows(ctx context.Context, name string) error {
	_, err := p.policies().ListVersions(ctx, &cedarpostv1.ListVersionsRequest{Bundle: name, PageSize: 1})
	if connect.CodeOf(err) != connect.CodeNotFound {
		return nil // it exists, or the caller may not know
	}
	return p.explain(err)
}

// filesStream receives a bundle and its files.
type filesStream[R any] interface {
	Receive() (R, error)
	Close() error
}

// receiveBundle reads the files of a stream. about gets each message that has none.
func receiveBundle[R interface{ GetFile() *cedarpostv1.FilePart }](stream filesStream[R], about func(R)) (files []bundle.File, err error) {
	defer func() { _ = stream.Close() }()
	for {
		res, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			return files, nil
		}
		if err != nil {
			return nil, err
		}
		part := res.GetFile()
		if part == nil {
			about(res)
			continue
		}
		if n := len(files); n > 0 && files[n-1].Path == part.GetPath() {
			files[n-1].Content = append(files[n-1].Content, part.GetData()...)
		} else {
			files = append(files, bundle.File{Path: part.GetPath(), Content: part.GetData()})
		}
	}
}

// liveBundle fetches the live version of a bundle. The error is as the server sent it.
func liveBundle(ctx context.Context, admin *peer, name string) (about *cedarpostv1.Bundle, files []bundle.File, err error) {
	stream, err := admin.policies().GetBundle(ctx, &cedarpostv1.GetBundleRequest{Name: name})
	if err != nil {
		return nil, nil, err
	}
	files, err = receiveBundle(stream, func(res *cedarpostv1.GetBundleResponse) { about = res.GetBundle() })
	return about, files, err
}

type pullCmd struct {
	outputFlags
	Bundle  string `arg:"" help:"Name of the bundle."`
	Dir     string `arg:"" help:"Folder to write." type:"path"`
	Version int64  `help:"This version (default: the live one)." placeholder:"N"`
	Force   bool   `help:"Also write into a folder with other files: those of the bundle are replaced, and files of a bundle that the version does not have are removed, and named on stderr."`
	adminFlags
}

// Help is the long help of pull.
func (*pullCmd) Help() string {
	return `Fetches a published bundle into a folder, byte for byte as it was published. A folder that has exactly these files already is left as it is. Files that are not part of a bundle, such as README.md, are never touched.`
}

// Run fetches the bundle. As JSON, it prints the description of the version.
func (p *pullCmd) Run(ctx context.Context, c *console) error {
	if p.Version < 0 {
		return misuse("--version must not be negative")
	}
	admin, err := p.dial()
	if err != nil {
		return err
	}
	about, files, err := p.fetch(ctx, admin)
	if err != nil {
		return admin.explain(err)
	}
	written, removed, err := p.write(files)
	for _, name := range removed {
		fmt.Fprintf(c.err, "removed %s\n", clean(filepath.Join(relative(p.Dir), name)))
	}
	if err != nil {
		return err
	}
	if p.json() {
		return c.message(about)
	}
	also := ""
	if len(removed) > 0 {
		also = fmt.Sprintf(", %d removed", len(removed))
	}
	fmt.Fprintf(c.out, "%s: version %d, %s in %s, %d written%s\n",
		clean(about.GetBundle()), about.GetVersion(), count(len(files), "file", "files"), clean(relative(p.Dir)), written, also)
	return nil
}

func (p *pullCmd) fetch(ctx context.Context, admin *peer) (about *cedarpostv1.BundleVersion, files []bundle.File, err error) {
	n := p.Version
	if n == 0 {
		list, err := admin.policies().ListVersions(ctx, &cedarpostv1.ListVersionsRequest{Bundle: p.Bundle, PageSize: 1})
		if err != nil {
			return nil, nil, err
		}
		last := list.GetVersions()[0]
		if n = last.GetVersion(); last.GetDeletedBy() != "" {
			return nil, nil, connect.Errorf(connect.CodeNotFound, "the bundle %s is deleted, so no version is live; --version %d is its last one", p.Bundle, n)
		}
	}
	stream, err := admin.policies().GetVersion(ctx, &cedarpostv1.GetVersionRequest{Bundle: p.Bundle, Version: n})
	if err != nil {
		return nil, nil, err
	}
	files, err = receiveBundle(stream, func(res *cedarpostv1.GetVersionResponse) { about = res.GetVersion() })
	return about, files, err
}

// write makes the bundle files in the folder equal to those that were fetched. It returns how many it wrote,
// and which it removed.
func (p *pullCmd) write(files []bundle.File) (written int, removed []string, err error) {
	before, err := partsOf(p.Dir)
	if err != nil {
		return 0, nil, err
	}
	if entries, err := os.ReadDir(p.Dir); errors.Is(err, os.ErrNotExist) || err == nil && len(entries) == 0 {
		return len(files), nil, bundle.WriteDir(p.Dir, files)
	}
	edits := bundle.Edits(before, files)
	if len(edits) > 0 && !p.Force {
		return 0, nil, fmt.Errorf("%s has other files than the bundle, such as %s; --force replaces them", relative(p.Dir), edits[0].Path)
	}
	root, err := os.OpenRoot(p.Dir)
	if err != nil {
		return 0, nil, err
	}
	defer root.Close()
	for _, e := range edits {
		if part, problem := bundle.CheckPath(e.Path); !part || problem != nil {
			return written, removed, fmt.Errorf("%q is not a path inside a bundle", e.Path)
		}
		path := filepath.FromSlash(e.Path)
		if e.Removed {
			err = root.Remove(path)
		} else if err = root.MkdirAll(filepath.Dir(path), 0o755); err == nil {
			err = root.WriteFile(path, e.Content, 0o644)
		}
		if err != nil {
			return written, removed, err
		}
		if e.Removed {
			removed = append(removed, e.Path)
		} else {
			written++
		}
	}
	return written, removed, nil
}

// partsOf reads the files in a folder that are part of a bundle, whether or not they are a valid one.
func partsOf(dir string) (files []bundle.File, err error) {
	root, err := os.OpenRoot(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer root.Close()
	err = fs.WalkDir(root.FS(), ".", func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case name != "." && strings.HasPrefix(d.Name(), "."):
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		case d.IsDir():
			return nil
		}
		if part, _ := bundle.CheckPath(name); !part {
			return nil
		}
		if !d.Type().IsRegular() {
			return fmt.Errorf("%s is not a regular file; fetch into another folder", name)
		}
		content, err := root.ReadFile(name)
		files = append(files, bundle.File{Path: name, Content: content})
		return err
	})
	return files, err
}

type diffCmd struct {
	outputFlags
	Args     []string `arg:"" name:"what" help:"A bundle folder, or the name of a bundle and two version numbers."`
	Name     string   `help:"Name of the bundle, if bundle.yaml does not give it (default: the name of the folder)." placeholder:"NAME"`
	ExitCode bool     `help:"Exit with 1 if there are differences."`
	adminFlags
}

// Help is the long help of diff.
func (*diffCmd) Help() string {
	return `"diff DIR" compares the live version of a bundle with a folder. "diff BUNDLE V1 V2" compares two versions. The output is in the unified format; it is empty if there are no differences. As JSON, each file that differs is a line.`
}

// Run prints the differences.
func (d *diffCmd) Run(ctx context.Context, c *console) error {
	var files []*cedarpostv1.FileDiff
	var err error
	switch len(d.Args) {
	case 1:
		files, err = d.folder(ctx, c)
	case 3:
		files, err = d.versions(ctx)
	default:
		return misuse("give a folder, or the name of a bundle and two version numbers")
	}
	if err != nil {
		return err
	}
	if err := c.printDiff(files, d.json()); err != nil {
		return err
	}
	if d.ExitCode && len(files) > 0 {
		return exitWith(codeFailed)
	}
	return nil
}

func (d *diffCmd) versions(ctx context.Context) ([]*cedarpostv1.FileDiff, error) {
	req := &cedarpostv1.DiffVersionsRequest{Bundle: d.Args[0]}
	for i, into := range []*int64{&req.From, &req.To} {
		n, err := strconv.ParseInt(d.Args[i+1], 10, 64)
		if err != nil || n < 1 {
			return nil, misuse("%q is not the number of a version", d.Args[i+1])
		}
		*into = n
	}
	admin, err := d.dial()
	if err != nil {
		return nil, err
	}
	res, err := call(ctx, admin, admin.policies().DiffVersions, req)
	return res.GetFiles(), err
}

func (d *diffCmd) folder(ctx context.Context, c *console) ([]*cedarpostv1.FileDiff, error) {
	b, err := readBundle(d.Args[0], d.Name)
	if err != nil {
		return nil, c.refusedFolder(d.Args[0], err, d.json())
	}
	admin, err := d.dial()
	if err != nil {
		return nil, err
	}
	_, live, err := liveBundle(ctx, admin, b.Name)
	if err != nil {
		return nil, admin.explain(err)
	}
	var out []*cedarpostv1.FileDiff
	for _, f := range bundle.Diff(live, b.Files) {
		kind := cedarpostv1.FileDiff_CHANGED
		if f.Added {
			kind = cedarpostv1.FileDiff_ADDED
		} else if f.Removed {
			kind = cedarpostv1.FileDiff_REMOVED
		}
		out = append(out, &cedarpostv1.FileDiff{Path: f.Path, Kind: kind, Text: f.Text, Omitted: f.Omitted})
	}
	return out, nil
}

// printDiff prints files that differ, as text in the unified format.
func (c *console) printDiff(files []*cedarpostv1.FileDiff, asJSON bool) error {
	for _, f := range files {
		if asJSON {
			if err := c.message(f); err != nil {
				return err
			}
			continue
		}
		switch {
		case f.GetOmitted():
			fmt.Fprintf(c.out, "%s: %s, too large to show\n", clean(f.GetPath()), strings.ToLower(f.GetKind().String()))
		case f.GetText() == "":
			fmt.Fprintf(c.out, "%s: %s, an empty file\n", clean(f.GetPath()), strings.ToLower(f.GetKind().String()))
		default:
			c.printUnified(f.GetText())
		}
	}
	return nil
}

func (c *console) printUnified(text string) {
	for line := range strings.Lines(text) {
		color := ""
		switch {
		case strings.HasPrefix(line, "--- "), strings.HasPrefix(line, "+++ "), strings.HasPrefix(line, "@@"):
			color = bold
		case strings.HasPrefix(line, "+"):
			color = green
		case strings.HasPrefix(line, "-"):
			color = red
		}
		shown := cleanLine(line)
		if color != "" {
			shown = c.paint(color, shown)
		}
		fmt.Fprintln(c.out, shown)
	}
}

// printText prints a text of several lines.
func (c *console) printText(text string) {
	for line := range strings.Lines(text) {
		fmt.Fprintln(c.out, cleanLine(line))
	}
}

// cleanLine escapes the control characters of a line, except tabs, and drops its end.
func cleanLine(line string) string {
	parts := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
	for i, part := range parts {
		parts[i] = clean(part)
	}
	return strings.Join(parts, "\t")
}
