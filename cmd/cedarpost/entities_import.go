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
	Format   string `help:"json, ndjson or csv (default: what the name of the file says, else json)." enum:",json,ndjson,csv" default:"" placeholder:"FORMAT"`
	Map      string `help:"YAML file that says which columns of a CSV file make up an entity." type:"path" placeholder:"FILE"`
	Atomic   bool   `help:"All in one revision, or nothing; at most 10,000 entities, since every other writer waits meanwhile."`
	ImportID string `name:"import-id" help:"Names the import, so that it can go on after it was cut off (default for a file: from its content)." placeholder:"ID"`
	Resume   bool   `help:"Go on after the entities that are stored."`
	DryRun   bool   `help:"Read and count everything, send nothing."`
	adminFlags
}

// Help is the long help of import.
func (*importCmd) Help() string {
	return `Each entity is created, or replaced whole. They are committed 1,000 at a time, each lot as a revision of its own, so that other writers never wait for long; when one is refused, the lots before it stay.

An entity that stands twice in the file is refused, with both lines; so is a member that stands twice in a JSON object. Of more than 1,000,000 entities, the later ones are compared with the first 1,000,000 and with those that they are committed with; beyond that, the last one counts.

An import that was cut off goes on with --resume: what is stored is not sent again, so that nothing that was changed meanwhile is changed back. When the server is lost, the import of a file waits for it up to 30 seconds, and goes on by itself.

json is an array in Cedar's entity format (.json), ndjson the same entities without the array, one on a line (.ndjson, .jsonl):

  [{"uid": {"type": "Shop::User", "id": "ann"}, "attrs": {"region": "eu"}, "parents": [{"type": "Shop::Role", "id": "admin"}]}]

csv is a table with a header (.csv), of which --map makes entities of one type:

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

as is text, long, bool, decimal, ipaddr, datetime or duration. An empty cell is no value: no parent, or an attribute that is absent. split makes several values of a cell; spaces around them do not count.

With -o json, the ImportEntitiesResponse of the API.`
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
		return misuse("--resume needs --import-id: %s cannot be read twice, so its content does not name it", i.File)
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
	fmt.Fprintf(c.out, "dry run: %s read, nothing was sent; whether they fit the schema, only the server can tell\n", entities(n))
	return nil
}

// open looks at the flags and opens the file.
func (i *importCmd) open(c *console) (*input, error) {
	in := &input{name: i.File, format: i.Format, r: c.in}
	if in.format == "" {
		in.format = formatOf(i.File)
	}
	switch {
	case i.Atomic && (i.Resume || i.ImportID != ""):
		return nil, misuse("--atomic stores all or nothing, so there is nothing to go on with: leave --import-id and --resume away")
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

// entities is "1 entity" or "3,000 entities".
func entities(n int64) string {
	if n == 1 {
		return "1 entity"
	}
	return thousands(n) + " entities"
}
