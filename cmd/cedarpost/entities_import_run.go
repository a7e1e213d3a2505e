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

// The server bounds each stream in bytes and in time, and the pauses in it.
const (
	streamEntities = 200_000
	streamBytes    = 200 << 20
	streamTime     = 5 * time.Minute
	streamPause    = 10 * time.Second
)

// How long a lost server is waited for, without any progress.
const (
	patience     = 30 * time.Second
	firstWait    = 250 * time.Millisecond
	longestWait  = 4 * time.Second
	adviceWithin = 5 * time.Second
)

// importer sends entities in as many streams as it takes. What it knows of the
// import it learns from the server: what was sent may never have arrived, and
// what arrived without an answer may be stored.
type importer struct {
	admin    *peer
	in       *input
	progress *progress
	id       string // empty: an import that cannot go on
	atomic   bool

	perStream int64         // entities
	patience  time.Duration // with a lost server, while nothing moves

	// These count entities from the start of the import.
	from   int64 // that an earlier run has stored
	stored int64 // as far as is known
	sent   int64 // stored or not
	reach  int64 // the most that any stream can have stored

	broken bool // a stream broke off, and what it sent may be on its way

	old    *cedarpostv1.GetImportResponse // of the import that this one forgets
	ending bool                           // all are stored, only the end is missing
	total  *cedarpostv1.ImportEntitiesResponse
	unsure bool // a stream gave no answer, so total lacks what it changed

	until time.Time // until when a lost server is waited for; zero: it is not lost
	wait  time.Duration
}

func newImporter(admin *peer, in *input, p *progress) *importer {
	return &importer{admin: admin, in: in, progress: p, perStream: streamEntities, patience: patience, total: &cedarpostv1.ImportEntitiesResponse{}}
}

var (
	errOthers = errors.New("somebody else continues this import, or has ended it")
	errNone   = errors.New("no unfinished import")
)

// begin looks whether an earlier import of the same id was cut off.
func (i *importer) begin(ctx context.Context, resume bool) error {
	if i.id == "" {
		return nil
	}
	old, err := i.ask(ctx)
	switch {
	case errors.Is(err, errNone) && resume:
		return fmt.Errorf("%s: there is no unfinished import to resume: it has ended, or never began, or the content or its mapping has changed since\nwithout --resume it starts from the beginning", i.in.name)
	case errors.Is(err, errNone):
		return nil
	case err != nil:
		return err
	case resume:
		i.from, i.stored, i.sent = old.GetEntities(), old.GetEntities(), old.GetEntities()
		// The earlier run may have ended just now, and what it sent be on its way.
		i.broken, i.reach = true, math.MaxInt64
		i.progress.note("going on after %s that are stored", entities(i.stored))
	default:
		i.old = old
		i.progress.note("an earlier import of this was cut off after %s; this one starts anew, --resume would go on", entities(old.GetEntities()))
	}
	return nil
}

// ask asks how far the import got.
func (i *importer) ask(ctx context.Context) (*cedarpostv1.GetImportResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	res, err := i.admin.entities().GetImport(ctx, &cedarpostv1.GetImportRequest{ImportId: i.id})
	if err != nil && connect.CodeOf(err) == connect.CodeNotFound {
		return nil, errNone
	}
	if err == nil && i.old != nil && proto.Equal(res.GetUpdatedAt(), i.old.GetUpdatedAt()) {
		return nil, errNone // of this one nothing is stored yet
	}
	return res, err
}

// run sends everything, and goes on where the server left off when it is lost.
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

// again waits for a lost server, and learns from it what is stored.
func (i *importer) again(ctx context.Context, failure error) (ended bool, err error) {
	if i.id == "" || !i.in.again || ctx.Err() != nil || !i.isLoss(failure) {
		return false, failure
	}
	if i.until.IsZero() {
		i.until, i.wait = time.Now().Add(i.patience), firstWait
		if connect.CodeOf(failure) != connect.CodeFailedPrecondition {
			i.progress.note("the server is lost; the import goes on when it is back")
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
		i.progress.note("going on after %s that are stored", entities(i.stored))
		return false, nil
	}
	return false, failure
}

// isLoss tells a server that is lost from one that refuses. After a stream broke
// off, what it had sent may move the import once more before the next one begins.
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

// attempt sends what is not stored yet.
func (i *importer) attempt(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // a stream that is given up is no end of the import
	r, err := i.in.entities()
	if err != nil {
		return err
	}
	lots := i.in.lots(ctx, r, i.stored)
	if i.in.again {
		defer func() {
			cancel()
			for range lots { // until nobody reads the file any more
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
	// The end has a stream of its own: when its answer is lost, the import is there
	// still or it is not, and either says what to do.
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

// options are those of the next stream. With more, the import goes on after it.
func (i *importer) options(more bool) *cedarpostv1.ImportOptions {
	if i.id == "" {
		return &cedarpostv1.ImportOptions{Atomic: i.atomic}
	}
	return &cedarpostv1.ImportOptions{ImportId: i.id, Skip: i.stored, More: more}
}

// stream sends as much as one stream may take, and reports whether that was all.
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
		i.reach = max(i.reach, i.sent) // whatever Send says, they may be stored
		failed := stream.Send(&cedarpostv1.ImportEntitiesRequest{Entities: l.entities, Options: options})
		if errors.Is(failed, io.EOF) {
			break // the server has answered already, see below
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
		return false, err // and nothing of an atomic import is stored
	}
	res, failed := stream.CloseAndReceive()
	if failed != nil {
		i.unsure = true
		return false, failed
	}
	i.stored += res.GetEntities()
	// Older streams have no part in the import any more.
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
		if !more { // given up
			return l, ctx.Err()
		}
		return l, l.err
	case <-pause:
		return lot{}, errPause
	case <-ctx.Done():
		return lot{}, ctx.Err()
	}
}

// advise adds to a failure what is stored in spite of it, and how to go on.
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
		return fmt.Errorf("%w\nwhat was sent may be stored; run the same command with --resume to go on", err)
	case inFile && errors.Is(failure, entityfile.ErrTwice):
		return fmt.Errorf("%w\n%s are stored; when the second of the two is corrected, --import-id %s --resume goes on after them; when the first is, import the file anew", err, entities(res.GetEntities()), i.id)
	case inFile || refused:
		return fmt.Errorf("%w\n%s are stored; when the cause is corrected, --import-id %s --resume goes on after them", err, entities(res.GetEntities()), i.id)
	default:
		return fmt.Errorf("%w\n%s are stored; run the same command with --resume to go on", err, entities(res.GetEntities()))
	}
}
