package main

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"connectrpc.com/connect/v2"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/internal/pause"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// watchInterval is how often the folders are looked at. Unlike notifications, this works on every file system,
// and also if an editor replaces a file by another one.
const watchInterval = 300 * time.Millisecond

// watchPause is the time until a publish is tried again that failed for a reason that can pass.
const watchPause = 2 * time.Second

// devFolders publishes bundle folders to the server of dev.
type devFolders struct {
	dirs     []string
	admin    *peer
	console  *console
	entities map[string][]byte // of each folder, as they were read last
}

// publish publishes all folders. A bundle can need one that is published after it, so those that fail are
// tried again after the others. Errors are printed; the one that is returned is that of the last folder.
func (d *devFolders) publish(ctx context.Context) error {
	left := d.dirs
	for {
		failed := map[string]error{}
		for _, dir := range left {
			if err := d.publishOne(ctx, dir); err != nil {
				failed[dir] = err
			}
		}
		if len(failed) == 0 || ctx.Err() != nil {
			return ctx.Err()
		}
		if len(failed) == len(left) {
			var last error
			for _, dir := range left {
				last = d.explain(dir, failed[dir])
				fmt.Fprintln(d.console.err, last)
			}
			return last
		}
		left = slices.DeleteFunc(slices.Clone(left), func(dir string) bool { return failed[dir] == nil })
	}
}

// explain prints the findings of an error, and returns it in a sentence.
func (d *devFolders) explain(dir string, err error) error {
	if found := findingsFromError(err); len(found) > 0 {
		d.console.printFindings(d.console.err, relative(dir), found)
		return &exitError{codeInvalid, fmt.Errorf("%s cannot be read as a bundle; nothing was published", relative(dir))}
	}
	return d.console.refusedPublish(d.admin, err, relative(dir), false)
}

// publishOne publishes a folder, says so, and imports its entities if the bundle is new or they changed.
func (d *devFolders) publishOne(ctx context.Context, dir string) error {
	b, err := readBundle(dir, "")
	if err != nil {
		return err
	}
	c := d.console
	res, err := upload(ctx, d.admin, &cedarpostv1.BundleHeader{Name: b.Name, AllowBreaking: true}, b.Files)
	if err != nil {
		return err
	}
	c.printFindings(c.err, relative(dir), findingsFromProto(res.GetWarnings()))
	outcome := "is published as it is"
	if res.GetPublished() {
		outcome = fmt.Sprintf("published as version %d", res.GetBundle().GetVersion())
	}
	imported, err := d.importChanged(ctx, b, res.GetPublished() && res.GetBundle().GetVersion() == 1)
	if err != nil {
		return fmt.Errorf("%s: %w", bundle.EntitiesName, err)
	}
	if imported {
		outcome += ", and the entities of " + bundle.EntitiesName + " are stored"
	}
	fmt.Fprintf(c.err, "%s: %s\n", b.Name, outcome)
	return nil
}

// importChanged stores the entities of a bundle if it is new, if they have changed since they were read, or if
// no entity is stored because an earlier dev was stopped before it could. It reports whether it stored them.
func (d *devFolders) importChanged(ctx context.Context, b *bundle.Bundle, fresh bool) (bool, error) {
	before, known := d.entities[b.Name]
	switch {
	case len(b.Entities) == 0:
		return false, nil
	case known && !bytes.Equal(before, b.Entities):
		fresh = true
	case !known && !fresh:
		stored, err := call(ctx, d.admin, d.admin.entities().ListEntities, &cedarpostv1.ListEntitiesRequest{PageSize: 1})
		if err != nil {
			return false, err
		}
		fresh = len(stored.GetEntities()) == 0
	}
	if fresh {
		i := newImporter(d.admin, &input{name: bundle.EntitiesName, format: formatJSON, r: bytes.NewReader(b.Entities)}, nil)
		if err := i.run(ctx); err != nil {
			return false, err
		}
	}
	d.entities[b.Name] = b.Entities
	return fresh, nil
}

// watch publishes a folder again when its bundle has changed, until ctx ends. before is what its bundles were
// when they were published first. It waits until two looks are equal: a save can write several files.
func (d *devFolders) watch(ctx context.Context, before map[string]string) {
	done, last := maps.Clone(before), maps.Clone(before)
	for pause.For(ctx, watchInterval); ctx.Err() == nil; pause.For(ctx, watchInterval) {
		for _, dir := range d.dirs {
			now := look(dir)
			changed := now == last[dir] && now != done[dir]
			if last[dir] = now; !changed || ctx.Err() != nil {
				continue
			}
			err := d.publishOne(ctx, dir)
			if err != nil && ctx.Err() == nil {
				fmt.Fprintln(d.console.err, d.explain(dir, err))
			}
			if passes(err) {
				pause.For(ctx, watchPause) // and try again
			} else {
				done[dir] = now
			}
		}
	}
}

// looks returns what each bundle is now.
func (d *devFolders) looks() map[string]string {
	all := map[string]string{}
	for _, dir := range d.dirs {
		all[dir] = look(dir)
	}
	return all
}

// look returns a text that changes when the bundle in a folder does.
func look(dir string) string {
	b, err := readBundle(dir, "")
	if err != nil {
		return err.Error()
	}
	return b.Name + bundle.Digest(b.Files)
}

// passes reports whether the same call can succeed later.
func passes(err error) bool {
	switch connect.CodeOf(err) {
	case connect.CodeUnavailable, connect.CodeDeadlineExceeded, connect.CodeResourceExhausted, connect.CodeAborted:
		return err != nil
	}
	return false
}
