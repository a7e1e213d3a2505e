package offline_test

import (
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
