// Package cedarposttest is a Cedarpost service in the process of a test: the engine that
// decides in production, on a bundle from its folder, without a server and a database. A
// test asks it through a real [cedarpost.Client], changes its data, makes it fail, and
// looks at what it was asked.
//
// [TwoUsers] tries the routes of a program as one user on the objects of another.
package cedarposttest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectinprocess"
	"connectrpc.com/validate"
	"github.com/cedar-policy/cedar-go"
	"github.com/google/uuid"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/entityfile"
	"github.com/cedarpost/cedarpost/server/offline"
	"github.com/cedarpost/cedarpost/server/wire"
)

// Service is one Cedarpost service with its bundles and entities in memory. Its methods may
// be called concurrently.
type Service struct {
	t         testing.TB // or noTest
	set       *engine.Set
	database  uuid.UUID // in tokens
	transport connect.Transport

	watches sync.WaitGroup // calls of Watch under way

	mu       sync.RWMutex
	entities map[cedar.EntityUID]*engine.Entity // an entity is replaced, never changed
	number   int64                              // of the newest revision
	moved    chan struct{}                      // closed and replaced when number, failure or closed changes
	failure  error                              // every call returns it; nil: the service works
	closed   bool
	clients  []*cedarpost.Client
	tokens   map[string]meaning // by their text

	log journal
}

// New reads bundles from their folders, with their entities.json, and serves them until the
// test ends. A bundle that is not valid fails the test, and so does each later write that
// the schema refuses.
func New(t testing.TB, dirs ...string) *Service {
	t.Helper()
	return of(t)(Open(dirs...))
}

// NewFS is [New] for bundles at the root of file systems, such as embedded ones. The name of
// each bundle must be in its bundle.yaml.
func NewFS(t testing.TB, bundles ...fs.FS) *Service {
	t.Helper()
	return of(t)(OpenFS(bundles...))
}

// of makes a service fail and end with a test.
func of(t testing.TB) func(*Service, error) *Service {
	return func(s *Service, err error) *Service {
		t.Helper()
		if err != nil {
			t.Fatalf("cedarposttest: %v", err)
		}
		s.t = t
		t.Cleanup(s.Close)
		return s
	}
}

// Open is [New] without a test: it returns an error for a bundle that is not valid, a write
// that the schema refuses panics, and the caller has to close the service.
func Open(dirs ...string) (*Service, error) {
	bundles := make([]*bundle.Bundle, len(dirs))
	for i, dir := range dirs {
		var err error
		if bundles[i], err = bundle.ReadDir(filepath.FromSlash(dir)); err != nil {
			return nil, fmt.Errorf("%s: %w", dir, err)
		}
	}
	return open(bundles)
}

// OpenFS is [NewFS] without a test, as [Open] is [New] without one.
func OpenFS(fsys ...fs.FS) (*Service, error) {
	bundles := make([]*bundle.Bundle, len(fsys))
	for i, f := range fsys {
		var err error
		if bundles[i], err = bundle.Read(f, ""); err != nil {
			return nil, err
		}
	}
	return open(bundles)
}

func open(bundles []*bundle.Bundle) (*Service, error) {
	if len(bundles) == 0 {
		return nil, errors.New("no bundle given")
	}
	s := &Service{
		t: noTest{}, database: uuid.New(), entities: map[cedar.EntityUID]*engine.Entity{}, number: 1, moved: make(chan struct{}),
		log: journal{byID: map[string]int{}, reports: map[string]bool{}},
	}
	for i, b := range bundles {
		var others []engine.Source
		for j, o := range bundles {
			if j != i {
				others = append(others, offline.Source(o))
			}
		}
		report, set := offline.Check(b, others, s.set)
		if set == nil || !report.Valid() {
			return nil, refusal(b.Name, report)
		}
		s.set = set
	}
	for _, b := range bundles {
		if err := s.seed(b); err != nil {
			return nil, err
		}
	}
	server := connect.NewServer(s.guard, validate.NewServerInterceptor(validate.WithoutErrorDetails()))
	cedarpostv1connect.RegisterAuthorizationServiceHandler(server, s.handler())
	s.transport = connectinprocess.New(server, connectinprocess.WithCopyFunc(overTheWire))
	return s, nil
}

// refusal is an error with all problems of a bundle.
func refusal(name string, report *offline.Report) error {
	var b strings.Builder
	fmt.Fprintf(&b, "bundle %s is not valid:", name)
	for _, f := range report.Findings {
		if !f.Warning {
			fmt.Fprintf(&b, "\n\t%s", f)
		}
	}
	return errors.New(b.String())
}

// seed stores the entities of a bundle, which are checked already. Of an entity that is in
// several bundles, the last one counts, as if they were imported one after another.
func (s *Service) seed(b *bundle.Bundle) error {
	if b.Entities == nil {
		return nil
	}
	list, err := entityfile.Parse(b.Entities)
	if err != nil {
		return err
	}
	for _, e := range list {
		entity, err := s.set.ReadEntity(wire.Entity(e))
		if err != nil {
			return err
		}
		s.entities[entity.UID] = entity
	}
	return nil
}

// Client returns a client of the service. It keeps no answers, so that every check reaches
// the service and is in [Service.Decisions]. An option may change its Config, all but
// Transports: CacheBytes 0 makes a client as in production. The client waits a minute for
// an answer, so that tests do not fail on a slow machine.
//
// The service closes the client, if the test has not done so before.
func (s *Service) Client(options ...func(*cedarpost.Config)) *cedarpost.Client {
	s.t.Helper()
	cfg := cedarpost.Config{CacheBytes: -1, Timeout: time.Minute, Log: slog.New(slog.NewTextHandler(s.t.Output(), nil))}
	for _, option := range options {
		option(&cfg)
	}
	cfg.Transports = []connect.Transport{s.transport}
	client, err := cedarpost.New(cfg)
	if err != nil {
		s.t.Fatalf("cedarposttest: %v", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.clients = append(s.clients, client)
	return client
}

// closeWait is how long the clients may take to report their uses.
const closeWait = time.Second

// Close closes all clients and ends the service. A service of [New] is closed when its
// test ends.
func (s *Service) Close() {
	s.mu.Lock()
	clients := s.clients
	s.clients = nil
	wait := closeWait
	if s.failure != nil {
		wait = 0 // a report would fail
	}
	s.mu.Unlock()
	for _, c := range clients {
		ctx, cancel := context.WithTimeout(context.Background(), wait)
		_ = c.Close(ctx) // the error lists unreported uses, which the test no longer needs
		cancel()
	}
	s.mu.Lock()
	s.closed = true
	s.signal()
	s.mu.Unlock()
	s.watches.Wait()
}

// Fail makes every call fail with an error, until Fail(nil). An error that is not a
// [connect.Error] becomes `unavailable`, after which clients ask again. After five failures
// in a row a client leaves the service alone for a second, as in production.
func (s *Service) Fail(err error) {
	if ce := (*connect.Error)(nil); err != nil && !errors.As(err, &ce) {
		err = connect.NewError(connect.CodeUnavailable, err.Error())
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failure = err
	s.signal()
}

var errAway = connect.NewError(connect.CodeResourceExhausted, "the test says that the service is away")

// Away makes the service refuse all questions, or answer them again, to test that a program
// fails closed. Clients get [cedarpost.ErrUnavailable] at once, as from an overloaded
// service, and get answers again right after Away(false). To simulate a service that cannot
// be reached, with attempts and waits, see [Service.Fail].
func (s *Service) Away(away bool) {
	if away {
		s.Fail(errAway)
	} else {
		s.Fail(nil)
	}
}

// signal wakes the watches. The caller holds mu.
func (s *Service) signal() {
	close(s.moved)
	s.moved = make(chan struct{})
}

// noTest takes the place of the test in a service without one.
type noTest struct{ testing.TB }

func (noTest) Helper()                           {}
func (noTest) Output() io.Writer                 { return os.Stderr }
func (noTest) Fatalf(format string, args ...any) { panic(fmt.Sprintf(format, args...)) }
