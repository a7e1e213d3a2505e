package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/entityfile"
)

type importCmd struct {
	outputFlags
	File     string `arg:"" help:"The file, or - for stdin."`
	Format   string `help:"json, ndjson or csv (default: by the name of the file, else json)." enum:",json,ndjson,csv" default:"" placeholder:"FORMAT"`
	Map      string `help:"YAML file that says how the columns of a CSV file become entities." type:"path" placeholder:"FILE"`
	Atomic   bool   `help:"Store all entities in one revision, or nothing. At most 10,000 entities, because all other writers wait meanwhile."`
	ImportID string `name:"import-id" help:"Id of the import, with which --resume finds it (default for a file: a hash of its content)." placeholder:"ID"`
	Resume   bool   `help:"Continue an import that was cut off, after the entities that are stored."`
	DryRun   bool   `help:"Read and count the entities, and send nothing."`
	adminFlags
}

// Help is the long help of import.
func (*importCmd) Help() string {
	return `Creates or replaces each entity. Up to 1,000 entities are committed together, as one revision, so that other writers never wait for long. If an entity is refused, those committed before it stay.

An entity that is twice in the file is refused, with both line numbers, and so is a member that is twice in a JSON object. In a file of more than 1,000,000 entities, each later entity is compared only with the first 1,000,000 and with those committed together with it. Of duplicates that this does not find, the last one is stored.

--resume continues an import that was cut off. It does not send stored entities again, so that it does not undo changes made meanwhile. If the connection to the server is lost, the import of a file waits up to 30 seconds for the server, and continues by itself.

json is an array in Cedar's entity format (.json). ndjson has the same entities without the array, one on each line (.ndjson, .jsonl):

  [{"uid": {"type": "Shop::User", "id": "ann"}, "attrs": {"region": "eu"}, "parents": [{"type": "Shop::Role", "id": "admin"}]}]

csv is a table with a header (.csv). --map makes entities of one type from its rows:

  employee_id,roles,region,lvl,mgr,labels
  ann,admin;support,eu,3,bob,"new;remote"

With the mapping

  type: Shop::User            # every row's entity type
  id: employee_id             # the column with the id
  parents:
    - {type: Shop::Role, column: roles, split: ";"}
  attrs:
    region: region            # the column, as text
    level: {column: lvl, as: long}
    manager: {column: mgr, entity: Shop::User}
    labels: {column: labels, split: ";"}     # a set

"as" is text, long, bool, decimal, ipaddr, datetime or duration. An empty cell means that the entity has no such parent or attribute. "split" makes several values from a cell, and ignores spaces around them.

With -o json, prints the ImportEntitiesResponse of the API.`
}

// Run imports.
func (i *importCmd) Run(ctx context.Context, c *console) error {
	in, err := i.open(c)
	if err != nil {
		return err
	}
	if i.DryRun {
		return i.dryRun(ctx, c, in)
	}
	id := i.ImportID
	if id == "" && in.again && !i.Atomic {
		if id, err = in.fingerprint(); err != nil {
			return err
		}
	}
	if i.Resume && id == "" {
		return misuse("--resume needs --import-id: %s cannot be read twice, so no id can be computed from its content", i.File)
	}
	admin, err := i.dial()
	if err != nil {
		return err
	}
	im := newImporter(admin, in, newProgress(c))
	im.id, im.atomic = id, i.Atomic
	began := time.Now()
	err = im.begin(ctx, i.Resume)
	if err == nil {
		err = im.run(ctx)
	}
	im.progress.clear()
	if err != nil {
		return im.advise(err)
	}
	if i.json() {
		return c.message(im.total)
	}
	took := time.Since(began)
	atLeast := ""
	if im.unsure {
		atLeast = "at least "
	}
	fmt.Fprintf(c.out, "%s imported, %s%s new or changed in %s (%s/s)\n", entities(im.total.GetEntities()), atLeast,
		thousands(im.total.GetChanged()), seconds(took), thousands(int64(float64(im.total.GetEntities())/took.Seconds())))
	c.printRevision(im.total.GetRevision())
	return nil
}

func (i *importCmd) dryRun(ctx context.Context, c *console, in *input) error {
	r, err := in.entities()
	if err != nil {
		return err
	}
	n := int64(0)
	for ; ctx.Err() == nil; n++ {
		if _, err := r.Next(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return fmt.Errorf("%s: %w", in.name, err)
		}
	}
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case n == 0:
		return in.empty()
	case i.json():
		return c.message(&cedarpostv1.ImportEntitiesResponse{Entities: n})
	}
	fmt.Fprintf(c.out, "dry run: %s read, nothing was sent; only the server can check them against the schema\n", entities(n))
	return nil
}

// open checks the flags and opens the file.
func (i *importCmd) open(c *console) (*input, error) {
	in := &input{name: i.File, format: i.Format, r: c.in}
	if in.format == "" {
		in.format = formatOf(i.File)
	}
	switch {
	case i.Atomic && (i.Resume || i.ImportID != ""):
		return nil, misuse("--atomic stores all or nothing, so there is nothing to continue: leave --import-id and --resume away")
	case in.format == formatCSV && i.Map == "":
		return nil, misuse("a CSV file needs --map, a file that says what its columns mean\ntry: cedarpost entities import --help")
	case in.format != formatCSV && i.Map != "":
		return nil, misuse("--map is for CSV, and %s is read as %s (see --format)", i.File, in.format)
	}
	if i.Map != "" {
		var err error
		if in.mapText, err = os.ReadFile(i.Map); err != nil {
			return nil, err
		}
		if in.mapping, err = entityfile.ParseMapping(in.mapText); err != nil {
			return nil, fmt.Errorf("%s: %w", i.Map, err)
		}
	}
	if i.File == "-" {
		return in, nil
	}
	f, err := os.Open(i.File) // closed by the end of the command
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	in.r, in.again = f, info.Mode().IsRegular()
	if in.again {
		in.size = info.Size()
	}
	return in, nil
}

// entities returns "1 entity" or "3,000 entities".
func entities(n int64) string {
	if n == 1 {
		return "1 entity"
	}
	return thousands(n) + " entities"
}
