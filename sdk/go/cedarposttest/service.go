// Package cedarposttest is Cedarpost in the process of a test: the engine that
// decides in production, on a bundle from its folder, with no server and no database.
// A test asks it through a real [cedarpost.Client], changes its data, takes it away,
// and sees what it was asked.
//
// [TwoUsers] tries the routes of a program as one user on what is another's.
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

// Service is one Cedarpost with its bundles and entities in memory. All its methods
// may be called by many at once.
type Service struct {
	t         testing.TB // or noTest
	set       *engine.Set
	database  uuid.UUID // in tokens
	transport connect.Transport

	watches sync.WaitGroup // calls of Watch under way

	mu       sync.RWMutex
	entities map[cedar.EntityUID]*engine.Entity // each is replaced, never changed
	number   int64                              // of the newest revision
	moved    chan struct{}                      // closed, and made anew, when anything below or above changes
	failure  error                              // what every call gets; nil: it works
	closed   bool
	clients  []*cedarpost.Client

	log journal
}

// New reads bundles from their folders, with their entities.json, and serves them
// until the test ends. A bundle that does not validate fails the test, and so does
// later each write that the schema refuses.
func New(t testing.TB, dirs ...string) *Service {
	t.Helper()
	return of(t)(Open(dirs...))
}

// NewFS is [New] for bundles at the root of file systems, such as embedded ones. Each
// has its name in bundle.yaml.
func NewFS(t testing.TB, bundles ...fs.FS) *Service {
	t.Helper()
	return of(t)(OpenFS(bundles...))
}

// of ties a service to a test.
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

// Open is [New] without a test: mistakes in the bundles are its error, a write that
// the schema refuses panics, and whoever calls it closes it.
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

// OpenFS is [NewFS] as [Open] is New.
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

// refusal lists what is wrong with a bundle.
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

// seed stores the entities of a bundle. They were checked before. An entity that is
// in several bundles is as the last one has it, as if each had been imported.
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

// Client returns a client of the service. It keeps no answers, so that every check
// reaches the service and stands in [Service.Decisions]; an option can set CacheBytes
// to 0 for a client as it is in production, or anything else but Transports. It waits
// a minute for an answer, so that slow machines do not fail tests.
//
// It is closed with the service, if not before.
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

// closeWait is how long clients may take to report what they used.
const closeWait = time.Second

// Close closes all clients and ends the service. A service of [New] is closed when its
// test ends.
func (s *Service) Close() {
	s.mu.Lock()
	clients := s.clients
	s.clients = nil
	wait := closeWait
	if s.failure != nil {
		wait = 0 // they could try for ever
	}
	s.mu.Unlock()
	for _, c := range clients {
		ctx, cancel := context.WithTimeout(context.Background(), wait)
		_ = c.Close(ctx) // what it could not report, nobody looks for any more
		cancel()
	}
	s.mu.Lock()
	s.closed = true
	s.signal()
	s.mu.Unlock()
	s.watches.Wait()
}

// Fail makes every call fail with an error, until Fail(nil). One that is no
// [connect.Error] is `unavailable`, which clients ask again for; one that failed five
// times in a row is not asked for a second, as in production.
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

// Away makes the service give no answers, or give them again, to see that a program
// fails closed. Clients get [cedarpost.ErrUnavailable] at once, as from an overloaded
// service, and go on as soon as it is back; for a service that is not there, with
// attempts and waits, see [Service.Fail].
func (s *Service) Away(away bool) {
	if away {
		s.Fail(errAway)
	} else {
		s.Fail(nil)
	}
}

// signal tells watchers to look. Its caller holds mu.
func (s *Service) signal() {
	close(s.moved)
	s.moved = make(chan struct{})
}

// noTest stands for the test of a service that has none.
type noTest struct{ testing.TB }

func (noTest) Helper()                           {}
func (noTest) Output() io.Writer                 { return os.Stderr }
func (noTest) Fatalf(format string, args ...any) { panic(fmt.Sprintf(format, args...)) }
