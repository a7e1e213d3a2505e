package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// exportSync is how often what was received is made durable.
const exportSync = time.Second

type exportDecisionsCmd struct {
	Format   string `help:"ndjson, csv or ocsf (default ${default})." enum:"ndjson,csv,ocsf" default:"ndjson" placeholder:"FORMAT"`
	FromLeaf int64  `name:"from-leaf" help:"Begin at this place in the log (default ${default}, the beginning)." default:"0" placeholder:"N"`
	Since    moment `help:"Begin at this time: 2006-01-02T15:04:05Z, or 90m, 12h, 7d ago." placeholder:"TIME"`
	Until    moment `help:"End before this time." placeholder:"TIME"`
	Follow   bool   `help:"At the end wait for more, until interrupted."`
	To       string `help:"File to append to (default: stdout)." type:"path" placeholder:"FILE"`
	Resume   string `help:"File to remember in how far the export is. When it is there, the export goes on behind what it has, and --from-leaf and --since do not count." type:"path" placeholder:"FILE"`
	adminFlags
}

// Help is the long help of export.
func (*exportDecisionsCmd) Help() string {
	return `The log comes whole, decisions and events, batch by batch in the order of the commits; docs/audit.md has the formats. What --since and --until leave out are whole batches, so some rows can lie outside.

The file of --to may be rotated while a follower writes it. When it was renamed or removed, the follower goes on with a new file of that name, within a second, or at once when it gets the signal SIGHUP. When it was cut off (logrotate's copytruncate), it goes on at the new end.

With --resume, an export that broke off or was killed goes on after the last batch that is safe on disk, so each row comes at least once. With --to as well, what had been written of later batches is cut off the file first, so each row is in it exactly once; after a crash within a second of a rotation, some rows can be in the rotated file and in the new one. Both are made durable each second. The export refuses to go on with another log.

A follower ends with exit code 1 when the server stops: start it again.`
}

// export calls each for the batches of an export, in order.
func (p *peer) export(ctx context.Context, req *cedarpostv1.ExportDecisionsRequest, each func(*cedarpostv1.ExportDecisionsResponse) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := p.audit().ExportDecisions(ctx, req)
	for err == nil {
		var b *cedarpostv1.ExportDecisionsResponse
		if b, err = stream.Receive(); err != nil {
			break
		}
		if err := each(b); err != nil {
			return err
		}
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return p.explain(err)
}

// Run exports.
func (e *exportDecisionsCmd) Run(ctx context.Context, c *console) (err error) {
	if e.FromLeaf < 0 {
		return misuse("--from-leaf must not be negative")
	}
	var reopen chan os.Signal
	if e.Follow && e.To != "" {
		reopen = make(chan os.Signal, 1)
		signal.Notify(reopen, syscall.SIGHUP)
		defer signal.Stop(reopen)
	}
	admin, err := e.dial()
	if err != nil {
		return err
	}
	state, err := readExportState(e.Resume)
	if err != nil {
		return err
	}
	out, err := openSink(e.To, c.out, state)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.close()) }()

	req := &cedarpostv1.ExportDecisionsRequest{FromLeaf: e.FromLeaf, From: e.Since.timestamp(), To: e.Until.timestamp(), Follow: e.Follow}
	if state.begun() {
		// The last batch comes again, to see that it is the same.
		req.FromLeaf, req.From = state.Leaf, nil
	}
	x := &exporter{format: e.Format, out: out, state: state, file: e.Resume, resumed: !state.begun(), reopen: reopen}
	if err := x.begin(); err != nil {
		return err
	}
	err = x.run(ctx, admin, req)
	if ctx.Err() != nil && e.Follow && x.failed == nil {
		return nil // that is how it ends
	}
	if err == nil && !x.resumed {
		err = errOtherLog(e.Resume)
	}
	return err
}

func errOtherLog(file string) error {
	return fmt.Errorf("this is not the log that %s is of, or its newest batches were lost in a restore or a failover: begin again with new files for --out and --resume", file)
}

// exporter turns batches into lines.
type exporter struct {
	format  string
	out     *sink
	state   *exportState // what is safe, nil for nothing
	file    string       // of the state, "" for none
	resumed bool         // the batch of the state came, or there was none
	reopen  <-chan os.Signal

	next   *exportState // what will be safe when it is synced, nil if nothing is new
	failed error        // of writing
}

// begin says what there is before the first batch, so that what a crash leaves of it
// is known not to be safe.
func (x *exporter) begin() error {
	if x.file != "" && x.state == nil {
		x.state = &exportState{Leaf: -1, File: x.out.path}
		if err := x.state.write(x.file); err != nil {
			return err
		}
	}
	if x.format == "csv" {
		x.out.head = csvHead
	}
	x.out.moved = x.save
	return nil
}

// save writes what is safe into the state, with the end of the file as it is now.
func (x *exporter) save() (err error) {
	if x.file == "" {
		return nil
	}
	state := *x.state
	state.File = x.out.path
	if state.Size, state.Tail, err = x.out.mark(); err != nil {
		return err
	}
	x.state = &state
	return state.write(x.file)
}

// run receives in another goroutine, so that what came is made durable in time
// however long the next batch is in coming.
func (x *exporter) run(ctx context.Context, admin *peer, req *cedarpostv1.ExportDecisionsRequest) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	batches, ended := make(chan *cedarpostv1.ExportDecisionsResponse), make(chan error, 1)
	go func() {
		ended <- admin.export(ctx, req, func(b *cedarpostv1.ExportDecisionsResponse) error {
			select {
			case batches <- b:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
	}()
	tick := time.NewTicker(exportSync)
	defer tick.Stop()
	for {
		select {
		case b := <-batches:
			x.failed = x.write(b)
		case <-tick.C:
			x.failed = x.care(false)
		case <-x.reopen:
			x.failed = x.care(true)
		case err := <-ended:
			x.failed = x.sync()
			return errors.Join(err, x.failed)
		}
		if x.failed != nil {
			return x.failed
		}
	}
}

// write adds a batch to what is to be made durable.
func (x *exporter) write(b *cedarpostv1.ExportDecisionsResponse) error {
	sum := sha256.Sum256(b.GetHeader())
	header := hex.EncodeToString(sum[:])
	if !x.resumed {
		if b.GetLeaf() != x.state.Leaf || header != x.state.Header {
			return errOtherLog(x.file)
		}
		x.resumed = true
		return nil
	}
	for i, entry := range b.GetEntries() {
		line, err := x.line(b.GetLeaf(), i, entry)
		if err != nil {
			return fmt.Errorf("leaf %d: %w", b.GetLeaf(), err)
		}
		if err := x.out.line(line); err != nil {
			return err
		}
	}
	x.next = &exportState{Leaf: b.GetLeaf(), Header: header}
	return nil
}

func (x *exporter) line(leaf int64, row int, entry *cedarpostv1.LogEntry) (string, error) {
	switch x.format {
	case "csv":
		return csvLine(leaf, row, entry)
	case "ocsf":
		return ocsfLine(leaf, row, entry)
	}
	text, err := protoText(entry)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf(`{"leaf":%d,"row":%d,%s`, leaf, row, text[1:]) + "\n", nil
}

// sync makes durable what was written, and only then says so in the state.
func (x *exporter) sync() error {
	if x.next == nil {
		return nil
	}
	if err := x.out.sync(); err != nil {
		return err
	}
	x.state, x.next = x.next, nil
	return x.save()
}

// care makes durable what was written, and goes on with another file if the one that
// is written is not at its path any more, or if it is asked to.
func (x *exporter) care(reopen bool) error {
	if err := x.sync(); err != nil {
		return err
	}
	rotated, err := x.out.rotated()
	if err != nil || !rotated && !reopen {
		return err
	}
	return x.out.reopen()
}
