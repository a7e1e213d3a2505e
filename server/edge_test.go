package server

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/cedarpost/cedarpost/store"
	"github.com/cedarpost/cedarpost/store/storetest"
)

// newPair writes a self-signed certificate for a name.
func newPair(t *testing.T, dir, name string) (certFile, keyFile string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	secret, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	certFile, keyFile = filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	for file, block := range map[string]*pem.Block{certFile: {Type: "CERTIFICATE", Bytes: der}, keyFile: {Type: "PRIVATE KEY", Bytes: secret}} {
		if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return certFile, keyFile
}

func TestCertificateIsReplaced(t *testing.T) {
	dir := t.TempDir()
	certFile, keyFile := newPair(t, dir, "first")
	c, err := newCertificate(certFile, keyFile, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	serves := func(want string) {
		t.Helper()
		c.checked = time.Time{} // as if ten seconds had gone by
		pair, err := c.get(nil)
		if err != nil || pair.Leaf.Subject.CommonName != want {
			t.Errorf("serves %v %v, want %s", pair.Leaf.Subject, err, want)
		}
	}
	serves("first")
	newPair(t, dir, "second")
	serves("second")
	// A pair that does not load leaves the one that does.
	if err := os.WriteFile(keyFile, []byte("broken"), 0o600); err != nil {
		t.Fatal(err)
	}
	serves("second")
	newPair(t, dir, "third")
	serves("third")
}

func TestPlaintextOnlyOnLoopback(t *testing.T) {
	for addr, ok := range map[string]bool{
		"127.0.0.1:8080": true, "localhost:1": true, "[::1]:8080": true, "127.9.9.9:0": true,
		"0.0.0.0:8080": false, ":8080": false, "[::]:1": false, "10.0.0.1:1": false, "example.org:1": false, "nonsense": false,
	} {
		if err := checkPlaintext(addr); (err == nil) != ok {
			t.Errorf("%s: %v", addr, err)
		}
	}
}

func TestRateLimitIsPerCaller(t *testing.T) {
	l := &limits{perSecond: 100}
	taken := 0
	for range 1000 {
		if l.allow("a", 1) {
			taken++
		}
	}
	if taken < 100 || taken > 200 {
		t.Errorf("a burst of 1000 took %d tokens of 100", taken)
	}
	if !l.allow("b", 1) {
		t.Error("one caller's load refuses another")
	}
	if l.allow("b", 101) {
		t.Error("a batch larger than the bucket was let in")
	}
	if unlimited := (&limits{}); !unlimited.allow("a", 1_000_000) {
		t.Error("no limit should be no limit")
	}
}

func aDecision(t *testing.T) store.Decision {
	t.Helper()
	id, err := uuid.NewV7()
	if err != nil {
		t.Fatal(err)
	}
	return store.Decision{ID: id, Caller: "c", Principal: store.UID{Type: "T", ID: "p"}, Record: []byte("x")}
}

// Stopping commits what is queued and refuses what comes later, whatever the
// order; no caller waits for ever and none is told a lie.
func TestRecorderStops(t *testing.T) {
	db := storetest.Open(t)
	if err := db.EnsurePartitions(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	r := newRecorder(db, slog.New(slog.DiscardHandler), newMetrics())
	var wg sync.WaitGroup
	var mu sync.Mutex
	recorded := map[uuid.UUID]bool{}
	for range 20 {
		wg.Go(func() {
			for {
				d := aDecision(t)
				err := r.record(t.Context(), []store.Decision{d})
				if errors.Is(err, errRecorderDown) {
					return
				}
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				recorded[d.ID] = true
				mu.Unlock()
			}
		})
	}
	for {
		mu.Lock()
		n := len(recorded)
		mu.Unlock()
		if n > 500 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	r.close()
	wg.Wait()
	for id := range recorded {
		if _, err := db.GetDecision(t.Context(), id); err != nil {
			t.Fatalf("recorded and not there: %v", err)
		}
	}
}

// One row that Postgres refuses must not take others with it unnoticed: the
// whole commit fails, and everyone in it is told.
func TestRecorderTellsAllOfAFailedCommit(t *testing.T) {
	db := storetest.Open(t)
	if err := db.EnsurePartitions(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	r := newRecorder(db, slog.New(slog.DiscardHandler), newMetrics())
	defer r.close()
	bad := aDecision(t)
	bad.Principal.ID = "nul\x00"
	good := aDecision(t)
	if err := r.record(t.Context(), []store.Decision{good, bad}); err == nil {
		t.Fatal("a row that cannot be stored was reported as recorded")
	}
	if _, err := db.GetDecision(t.Context(), good.ID); !errors.Is(err, store.ErrNotFound) {
		t.Errorf("half a commit is there: %v", err)
	}
	if err := r.record(t.Context(), []store.Decision{good}); err != nil {
		t.Errorf("the recorder did not recover: %v", err)
	}
}
