package offline_test

import (
	"errors"
	"testing"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/policies"
	"github.com/cedarpost/cedarpost/server/offline"
)

// The example bundle passes its own checks with the real engine.
func TestShopChecks(t *testing.T) {
	b, err := bundle.Read(policies.Shop(), "shop")
	if err != nil {
		t.Fatal(err)
	}
	report, set := offline.Check(b, nil, nil)
	for _, f := range report.Findings {
		t.Errorf("%s", f)
	}
	if set == nil {
		t.Fatal("does not compile")
	}
	if len(report.Tests) < 30 {
		t.Errorf("only %d tests", len(report.Tests))
	}
	for _, test := range report.Tests {
		for _, f := range test.Failures {
			t.Errorf("%s (line %d): %s", test.Name, test.Line, f)
		}
	}
}

// A check stops before the next policy or test when it is to end.
func TestCheckUntil(t *testing.T) {
	b, err := bundle.Read(policies.Shop(), "shop")
	if err != nil {
		t.Fatal(err)
	}
	calls := 0
	_, set, err := offline.CheckUntil(b, nil, nil, func() error { calls++; return nil })
	if err != nil || set == nil || calls < len(b.Tests)+2*len(set.Policies("shop")) {
		t.Fatalf("%d calls, %v", calls, err)
	}
	gone := errors.New("gone")
	for _, end := range []int{1, calls / 2, calls} {
		n := 0
		report, set, err := offline.CheckUntil(b, nil, nil, func() error {
			if n++; n == end {
				return gone
			}
			return nil
		})
		if !errors.Is(err, gone) || report != nil || set != nil || n != end {
			t.Errorf("ended at call %d of %d: %v after %d", end, calls, err, n)
		}
	}
}
