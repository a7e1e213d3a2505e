package impact

import (
	"fmt"
	"testing"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/engine"
)

// A report stays small, whatever the decisions are: it has some samples, each of which names some policies,
// and some groups. The counts of the groups that are left out are summed up, also over several parts.
func TestReportStaysSmall(t *testing.T) {
	report := &cedarpostv1.ImpactReport{}
	const parts, decisions, policies = 3, 150, 50
	for part := range parts {
		var c counts
		c.load(report)
		for i := range decisions {
			var by []engine.PolicyRef
			for p := range policies {
				by = append(by, engine.PolicyRef{Bundle: "b", ID: fmt.Sprint("p", part, "-", i, "-", p)})
			}
			rec := &cedarpostv1.DecisionRecord{Caller: fmt.Sprint("c", i), Action: &cedarpostv1.EntityUid{Type: "Action", Id: "a"}}
			c.add(rec, outcome{res: &engine.Result{Allowed: true, Policies: by}}, outcome{res: &engine.Result{}})
		}
		c.save(report, true)
	}
	if report.Decisions != parts*decisions || report.AllowToDeny != parts*decisions || len(report.Samples) != maxSamples || len(report.ByPolicy) != maxGroups+1 || len(report.ByCaller) != maxGroups+1 {
		t.Errorf("%d decisions, %d denied, %d samples, %d policies, %d callers", report.Decisions, report.AllowToDeny, len(report.Samples), len(report.ByPolicy), len(report.ByCaller))
	}
	if named := report.Samples[0].LivePolicies; len(named) != maxNamed+1 || named[maxNamed] != "and 30 more" {
		t.Errorf("a sample names %v", named)
	}
	sum := func(list []*cedarpostv1.ImpactGroup) (n int32) {
		for _, g := range list {
			n += g.AllowToDeny
		}
		return n
	}
	if byCaller, byPolicy := sum(report.ByCaller), sum(report.ByPolicy); byCaller != parts*decisions || byPolicy != parts*decisions*policies {
		t.Errorf("groups count %d decisions by caller and %d by policy", byCaller, byPolicy)
	}
	if last := report.ByCaller[maxGroups]; last.Name != otherGroups {
		t.Errorf("the groups that are left out are %v", last)
	}
}
