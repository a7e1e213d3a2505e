package bench

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/store/storetest"
)

const policiesInFile = 1000

// TestPolicies prints the table of docs/benchmarks.md about bundles with many policies: how long it takes to
// list them, and to check, compare and publish an edit of one of them.
func TestPolicies(t *testing.T) {
	if os.Getenv("CEDARPOST_BENCH") == "" {
		t.Skip("set CEDARPOST_BENCH=1 to run")
	}
	n, err := strconv.Atoi(os.Getenv("POLICIES"))
	if err != nil {
		n = 100_000
	}
	n = max(n-n%policiesInFile, policiesInFile)
	pg := storetest.NewServer(t)
	s := newTarget(t, database(t, pg.URL(), "policies"), cacheBytes)
	files := []string{"schema.cedarschema", schema}
	for at := 0; at < n; at += policiesInFile {
		files = append(files, fmt.Sprintf("teams/%03d.cedar", at/policiesInFile), teamPolicies(at, min(policiesInFile, n-at), 0))
	}
	fmt.Printf("\n%d policies\n\n| step | time | heap at most |\n|---|---:|---:|\n", n)
	step := func(name string, do func() error) {
		t.Helper()
		runtime.GC()
		stop, most := make(chan struct{}), make(chan float64)
		go func() { most <- highest(stop) }()
		began := time.Now()
		err := do()
		took := time.Since(began)
		close(stop)
		heap := <-most
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		fmt.Printf("| %s | %.2f s | %.0f MiB |\n", name, took.Seconds(), heap)
	}
	step("apply the first time", func() error { s.MustApply("files", files...); return nil })
	edited := append([]string(nil), files...)
	last := len(edited) - 1
	edited[last] = teamPolicies(n-policiesInFile, policiesInFile, 1)
	var change *cedarpostv1.BundleChange
	step("change create, with an edit of one file", func() error {
		res, err := s.Policies.CreateChange(t.Context(), &cedarpostv1.CreateChangeRequest{
			Bundle: "files", Title: "one edit", BaseVersion: proto.Int64(1),
			Edits: []*cedarpostv1.FileEdit{{Path: edited[last-1], Edit: &cedarpostv1.FileEdit_Content{Content: []byte(edited[last])}}},
		})
		change = res.GetChange()
		return err
	})
	step("change check, with the differences in text and in meaning", func() error {
		res, err := s.Policies.CheckChange(t.Context(), &cedarpostv1.CheckChangeRequest{Id: change.GetId()})
		if err == nil && !res.GetOk() {
			err = fmt.Errorf("%v", res)
		}
		return err
	})
	step("change publish", func() error {
		_, err := s.Policies.PublishChange(t.Context(), &cedarpostv1.PublishChangeRequest{Id: change.GetId(), Digest: change.GetDigest()})
		return err
	})
	step("diff of two versions", func() error {
		_, err := s.Policies.DiffVersions(t.Context(), &cedarpostv1.DiffVersionsRequest{Bundle: "files", From: 1, To: 2})
		return err
	})
	step("list a page", func() error {
		_, err := s.Policies.ListPolicies(t.Context(), &cedarpostv1.ListPoliciesRequest{Bundle: "files"})
		return err
	})
	step("list those that concern one principal", func() error {
		res, err := s.Policies.ListPolicies(t.Context(), &cedarpostv1.ListPoliciesRequest{Bundle: "files", Principal: uid("Group", "team-", 77), PageSize: 1000})
		if err == nil && len(res.GetPolicies()) == 0 {
			err = errors.New("none")
		}
		return err
	})
	step("list all, page by page", func() error {
		for token, seen := "", 0; ; {
			res, err := s.Policies.ListPolicies(t.Context(), &cedarpostv1.ListPoliciesRequest{Bundle: "files", PageToken: token, PageSize: 1000})
			if err != nil {
				return err
			}
			seen += len(res.GetPolicies())
			if token = res.GetNextPageToken(); token == "" {
				if seen != n {
					return fmt.Errorf("%d policies", seen)
				}
				return nil
			}
		}
	})
	edited[last] = teamPolicies(n-policiesInFile, policiesInFile, 2)
	step("apply the whole folder, with an edit of one file", func() error { s.MustApply("files", edited...); return nil })
}

// teamPolicies returns policies by which teams may read documents. The first one has the number in its condition.
func teamPolicies(first, n, number int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "@id(\"team-%d\") permit (principal in Files::Group::\"team-%d\", action == Files::Action::\"Read\", resource) when { resource.size > %d };\n",
			first+i, first+i, number)
		number = 0
	}
	return b.String()
}

// highest returns the most memory that the heap takes, in MiB, until stop is closed.
func highest(stop <-chan struct{}) (most float64) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		most = max(most, float64(m.HeapInuse)/(1<<20))
		select {
		case <-stop:
			return most
		case <-tick.C:
		}
	}
}
