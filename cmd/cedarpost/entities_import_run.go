package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/proto"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/entityfile"
)

// The server bounds the bytes, the time and the pauses of a stream.
const (
	streamEntities = 200_000
	streamBytes    = 200 << 20
	streamTime     = 5 * time.Minute
	streamPause    = 10 * time.Second
)

// patience is how long an import without progress waits for a lost server. The others are the
// pauses between two attempts, and the time limit of the question for advice after a failure.
const (
	patience     = 30 * time.Second
	firstWait    = 250 * time.Millisecond
	longestWait  = 4 * time.Second
	adviceWithin = 5 * time.Second
)

// importer sends entities in as many streams as it takes. It asks the server how much is stored,
// because sent entities may not have arrived, and entities without an answer may be stored.
type importer struct {
	admin    *peer
	in       *input
	progress *progress
	id       string // "" if the import cannot be resumed
	atomic   bool

	perStream int64         // entities
	patience  time.Duration // how long a lost server is waited for without progress

	// Numbers of entities, from the start of the import.
	from   int64 // stored by an earlier run
	stored int64 // known to be stored
	sent   int64
	reach  int64 // the most that any stream can have stored

	broken bool // a stream broke off, and the server may still receive entities of it

	old    *cedarpostv1.GetImportResponse // the unfinished import that this one replaces
	ending bool                           // all entities are stored, only the end is missing
	total  *cedarpostv1.ImportEntitiesResponse
	unsure bool // a stream gave no answer, so total lacks what it changed

	until time.Time // when to give up on a lost server; zero if it is not lost
	wait  time.Duration
}

func newImporter(admin *peer, in *input, p *progress) *importer {
	return &importer{admin: admin, in: in, progress: p, perStream: streamEntities, patience: patience, total: &cedarpostv1.ImportEntitiesResponse{}}
}

var (
	errOthers = errors.New("another process continues this import, or has ended it")
	errNone   = errors.New("no unfinished import")
)

// begin checks whether an earlier import with the same id was cut off.
func (i *importer) begin(ctx context.Context, resume bool) error {
	if i.id == "" {
		return nil
	}
	old, err := i.ask(ctx)
	switch {
	case errors.Is(err, errNone) && resume:
		return fmt.Errorf("%s: there is no unfinished import to resume: it has ended, or never began, or the file or its mapping has changed since\nwithout --resume the import starts from the beginning", i.in.name)
	case errors.Is(err, errNone):
		return nil
	case err != nil:
		return err
	case resume:
		i.from, i.stored, i.sent = old.GetEntities(), old.GetEntities(), old.GetEntities()
		// The earlier run may have ended just now, and the server may still receive its
		// entities.
		i.broken, i.reach = true, math.MaxInt64
		i.progress.note("continuing after %s that are stored", entities(i.stored))
	default:
		i.old = old
		i.progress.note("an earlier import with this id was cut off after %s; this one starts from the beginning (--resume continues)", entities(old.GetEntities()))
	}
	return nil
}

// ask asks the server how much of the import is stored.
func (i *importer) ask(ctx context.Context) (*cedarpostv1.GetImportResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	res, err := i.admin.entities().GetImport(ctx, &cedarpostv1.GetImportRequest{ImportId: i.id})
	if err != nil && connect.CodeOf(err) == connect.CodeNotFound {
		return nil, errNone
	}
	if err == nil && i.old != nil && proto.Equal(res.GetUpdatedAt(), i.old.GetUpdatedAt()) {
		return nil, errNone // the old import: nothing of this one is stored yet
	}
	return res, err
}

// run sends all entities. After a loss of the server it continues after the stored ones.
func (i *importer) run(ctx context.Context) error {
	for {
		err := i.attempt(ctx)
		if err == nil {
			return nil
		}
		ended, err := i.again(ctx, err)
		if ended || err != nil {
			return err
		}
	}
}

// again waits for a lost server, and asks it how much is stored.
func (i *importer) again(ctx context.Context, failure error) (ended bool, err error) {
	if i.id == "" || !i.in.again || ctx.Err() != nil || !i.isLoss(failure) {
		return false, failure
	}
	if i.until.IsZero() {
		i.until, i.wait = time.Now().Add(i.patience), firstWait
		if connect.CodeOf(failure) != connect.CodeFailedPrecondition {
			i.progress.note("the connection to the server is lost; the import continues when the server is back")
		}
	}
	i.broken = true
	for time.Now().Before(i.until) {
		select {
		case <-ctx.Done():
			return false, ctx.Err()
		case <-time.After(i.wait):
		}
		i.wait = min(2*i.wait, longestWait)
		res, err := i.ask(ctx)
		switch stored := res.GetEntities(); {
		case errors.Is(err, errNone) && i.ending:
			return true, nil
		case errors.Is(err, errNone) && i.stored == 0:
			return false, nil
		case errors.Is(err, errNone), err == nil && (stored < i.stored || stored > i.reach):
			return false, errOthers
		case err != nil:
			continue
		case stored > i.stored:
			i.stored, i.until = stored, time.Now().Add(i.patience)
			i.total.Entities = i.stored - i.from
		}
		i.total.Revision = res.GetRevision()
		i.progress.note("continuing after %s that are stored", entities(i.stored))
		return false, nil
	}
	return false, failure
}

// isLoss reports whether an error means that the server is lost, rather than that it refuses.
// After a stream broke off, its last entities can still change the import, and the next stream
// then fails with failed_precondition: that is a loss too.
func (i *importer) isLoss(err error) bool {
	var e *connect.Error
	if !errors.As(err, &e) {
		return false
	}
	switch e.Code() {
	case connect.CodeUnavailable, connect.CodeDeadlineExceeded:
		return true
	case connect.CodeCanceled, connect.CodeUnknown, connect.CodeInternal:
		return !e.IsRemote()
	case connect.CodeFailedPrecondition:
		return i.broken
	}
	return false
}

// attempt sends the entities that are not stored yet.
func (i *importer) attempt(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends a stream without ending the import
	r, err := i.in.entities()
	if err != nil {
		return err
	}
	lots := i.in.lots(ctx, r, i.stored)
	if i.in.again {
		defer func() {
			cancel()
			for range lots { // until the goroutine stops reading the file
			}
		}()
	}
	for i.sent, i.ending = i.stored, false; !i.ending; {
		if i.ending, err = i.stream(ctx, lots); err != nil {
			return err
		}
	}
	if i.sent == 0 {
		return &inputError{i.in.empty()}
	}
	if i.id == "" {
		return nil
	}
	// The end has a stream of its own. If its answer is lost, the server still knows whether the
	// import is unfinished.
	stream, err := i.admin.entities().ImportEntities(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(&cedarpostv1.ImportEntitiesRequest{Options: i.options(false)}); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	_, err = stream.CloseAndReceive()
	return err
}

// options returns the options of the next stream. With more, other streams follow it.
func (i *importer) options(more bool) *cedarpostv1.ImportOptions {
	if i.id == "" {
		return &cedarpostv1.ImportOptions{Atomic: i.atomic}
	}
	return &cedarpostv1.ImportOptions{ImportId: i.id, Skip: i.stored, More: more}
}

// stream sends as many entities as one stream may have, and reports whether these were the last.
func (i *importer) stream(ctx context.Context, lots <-chan lot) (all bool, err error) {
	l, err := next(ctx, lots, nil)
	if err != nil {
		return errors.Is(err, io.EOF), notEOF(err)
	}
	stream, err := i.admin.entities().ImportEntities(ctx)
	if err != nil {
		return false, err
	}
	began, size, limit := time.Now(), 0, i.sent+i.perStream
	for options := i.options(true); err == nil; options = nil {
		i.sent += int64(len(l.entities))
		i.reach = max(i.reach, i.sent) // the server may store them even if Send fails
		failed := stream.Send(&cedarpostv1.ImportEntitiesRequest{Entities: l.entities, Options: options})
		if errors.Is(failed, io.EOF) {
			break // the server has answered, and CloseAndReceive returns its answer
		}
		if failed != nil {
			i.unsure = true
			return false, failed
		}
		i.progress.moved(i.sent, l.read, i.in.size)
		size += l.size
		var pause <-chan time.Time
		if !i.atomic {
			if i.sent >= limit || size >= streamBytes || time.Since(began) >= streamTime {
				break
			}
			pause = time.After(streamPause)
		}
		l, err = next(ctx, lots, pause)
	}
	if ctx.Err() != nil || (i.atomic && notEOF(err) != nil) {
		return false, err // nothing of an atomic import is stored
	}
	res, failed := stream.CloseAndReceive()
	if failed != nil {
		i.unsure = true
		return false, failed
	}
	i.stored += res.GetEntities()
	// Older streams cannot change the import any more.
	i.reach, i.broken, i.until = i.stored, false, time.Time{}
	i.total.Entities = i.stored - i.from
	i.total.Changed += res.GetChanged()
	i.total.Revision = res.GetRevision()
	if errors.Is(err, errPause) {
		err = nil
	}
	return errors.Is(err, io.EOF), notEOF(err)
}

func notEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

var errPause = errors.New("nothing to send for a while")

// next waits for a lot.
func next(ctx context.Context, lots <-chan lot, pause <-chan time.Time) (lot, error) {
	select {
	case l, more := <-lots:
		if !more { // the context has ended
			return l, ctx.Err()
		}
		return l, l.err
	case <-pause:
		return lot{}, errPause
	case <-ctx.Done():
		return lot{}, ctx.Err()
	}
}

// advise adds to a failure how much is stored, and how to continue.
func (i *importer) advise(failure error) error {
	err := i.admin.explain(failure)
	var bad *inputError
	inFile := errors.As(failure, &bad)
	switch {
	case errors.Is(failure, context.Canceled):
		err = errors.New("interrupted")
	case inFile:
		err = fmt.Errorf("%s: %w", i.in.name, err)
	}
	switch {
	case i.sent == 0 && inFile:
		return fmt.Errorf("%w\nnothing was sent", err)
	case i.sent == 0 || errors.Is(failure, errOthers):
		return err
	case i.atomic && inFile:
		return fmt.Errorf("%w\nnothing is stored", err)
	case i.atomic:
		return err
	case i.id == "" && inFile:
		return fmt.Errorf("%w\n%s are stored", err, entities(i.stored))
	case i.id == "" && i.stored > 0:
		return fmt.Errorf("%w\nthe %s before this stream are stored", err, entities(i.stored))
	case i.id == "":
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), adviceWithin)
	defer cancel()
	var e *connect.Error
	refused := errors.As(failure, &e) && e.Code() == connect.CodeInvalidArgument
	switch res, asked := i.ask(ctx); {
	case errors.Is(asked, errNone):
		return fmt.Errorf("%w\nnothing of it is stored", err)
	case asked != nil:
		return fmt.Errorf("%w\nthe entities sent may be stored; run the same command with --resume to continue", err)
	case inFile && errors.Is(failure, entityfile.ErrTwice):
		return fmt.Errorf("%w\n%s are stored; if you correct the second of the two, --import-id %s --resume continues after them; if you correct the first, import the file from the beginning", err, entities(res.GetEntities()), i.id)
	case inFile || refused:
		return fmt.Errorf("%w\n%s are stored; when the cause is corrected, --import-id %s --resume continues after them", err, entities(res.GetEntities()), i.id)
	default:
		return fmt.Errorf("%w\n%s are stored; run the same command with --resume to continue", err, entities(res.GetEntities()))
	}
}
