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

	"github.com/cedarpost/cedarpost/logformat"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// exportSync is the time between two syncs of received rows to disk.
const exportSync = time.Second

type exportDecisionsCmd struct {
	Format   string `help:"ndjson, csv or ocsf (default ${default})." enum:"ndjson,csv,ocsf" default:"ndjson" placeholder:"FORMAT"`
	FromLeaf int64  `name:"from-leaf" help:"Begin at the batch with this number in the log (default ${default}, the first one)." default:"0" placeholder:"N"`
	Since    moment `help:"Begin at this time: 2006-01-02T15:04:05Z, or 90m, 12h, 7d ago." placeholder:"TIME"`
	Until    moment `help:"End before this time." placeholder:"TIME"`
	Follow   bool   `help:"At the end of the log, wait for more, until interrupted."`
	To       string `help:"File to append to (default: stdout)." type:"path" placeholder:"FILE"`
	Resume   string `help:"File that keeps the progress of the export. If it exists, the export continues from there, and --from-leaf and --since are ignored." type:"path" placeholder:"FILE"`
	adminFlags
}

// Help is the long help of export.
func (*exportDecisionsCmd) Help() string {
	return `Exports decisions and events, batch by batch in the order of the commits. docs/audit.md describes the formats. --since and --until leave out whole batches, so some exported rows can be outside of that time.

With --follow, the file of --to may be rotated. If it is renamed or removed, the export continues in a new file of that name within a second, or at once on the signal SIGHUP. If it is cut off (copytruncate of logrotate), the export continues at its new end.

With --resume, an export that broke off or was killed continues after the last batch that is safe on disk, so each row comes at least once. With --to as well, rows of later batches are first removed from the file, so each row is in it exactly once. Only after a crash within a second of a rotation can some rows be in the rotated file and in the new one. File and progress are synced to disk each second. The export refuses to continue with another log.

With --follow, the export ends with exit code 1 when the server stops: start it again.`
}

// export calls each for every batch of an export, in order.
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
		// The last batch comes again, to check that this is the same log.
		req.FromLeaf, req.From = state.Leaf, nil
	}
	x := &exporter{format: e.Format, out: out, state: state, file: e.Resume, resumed: !state.begun(), reopen: reopen}
	if err := x.begin(); err != nil {
		return err
	}
	err = x.run(ctx, admin, req)
	if ctx.Err() != nil && e.Follow && x.failed == nil {
		return nil // the normal end
	}
	if err == nil && !x.resumed {
		err = errOtherLog(e.Resume)
	}
	return err
}

func errOtherLog(file string) error {
	return fmt.Errorf("%s belongs to another log, or the newest batches of this one were lost in a restore or a failover: begin again with new files for --to and --resume", file)
}

// exporter writes batches as lines, and keeps the progress of the export.
type exporter struct {
	format  string
	out     *sink
	state   *exportState // what is on disk, nil for nothing
	file    string       // of the state, "" if it is not kept
	resumed bool         // the batch of the state came again, or there was none
	reopen  <-chan os.Signal

	next   *exportState // the state after the next sync, nil if nothing is new
	failed error        // of writing
}

// begin writes the state before the first batch comes. After a crash, an export then knows that
// rows in the file are not safe.
func (x *exporter) begin() error {
	if x.file != "" && x.state == nil {
		x.state = &exportState{Leaf: -1, File: x.out.path}
		if err := x.state.write(x.file); err != nil {
			return err
		}
	}
	if x.format == "csv" {
		x.out.head = logformat.CSVHead()
	}
	x.out.moved = x.save
	return nil
}

// save writes the state, with the present end of the file.
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

// run receives batches in another goroutine, so that received rows are synced in time even if the
// next batch comes late.
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

// write adds the rows of a batch to the output. The next sync makes them durable.
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
	for i := range b.GetEntries() {
		line, err := x.line(b, i)
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

// line returns a row of a batch in the format of the export.
func (x *exporter) line(b *cedarpostv1.ExportDecisionsResponse, row int) (string, error) {
	switch x.format {
	case "csv":
		return logformat.CSV(b, row)
	case "ocsf":
		version, _ := buildVersion()
		return logformat.OCSF(b, row, version)
	}
	return logformat.NDJSON(b, row)
}

// sync syncs the output, and then saves the state.
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

// care syncs the output, and continues in the file at the path if the open file is no longer
// there, or if reopen is set.
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
