package impact_test

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/impact"
	"github.com/cedarpost/cedarpost/server/servertest"
	"github.com/cedarpost/cedarpost/store/storetest"
)

func TestMain(m *testing.M) { storetest.Main(m) }

// Each pair that is counted as tried was decided, also those before the limit, and the report says what was
// left out.
func TestWhoStopsAtItsLimit(t *testing.T) {
	const most = 70 // not a multiple of the pairs that are decided together
	impact.SetMostPairs(most)
	s := servertest.New(t)
	s.MustApply("doc", "schema.cedarschema", servertest.DocSchema, "policies.cedar", servertest.DocPolicies)
	var list []*cedarpostv1.Entity
	for i := range 12 {
		list = append(list, servertest.DocUser(t, fmt.Sprint("u", i)),
			servertest.Entity(t, fmt.Sprintf(`{"uid":{"type":"Doc::Paper","id":"p%d"},"attrs":{"readers":{"type":"Doc::Group","id":"g"}},"parents":[]}`, i)))
	}
	s.MustPut(list...)
	all := servertest.DocPolicies + "\n@id(\"all\") permit (principal, action == Doc::Action::\"Read\", resource);\n"
	stream, err := s.Policies.AnalyzeChange(t.Context(), &cedarpostv1.AnalyzeChangeRequest{
		Candidate: &cedarpostv1.AnalyzeChangeRequest_Edits{Edits: &cedarpostv1.AnalyzeChangeRequest_ProposedEdits{
			Bundle: "doc", BaseVersion: 1, Edits: []*cedarpostv1.FileEdit{{Path: "policies.cedar", Edit: &cedarpostv1.FileEdit_Content{Content: []byte(all)}}},
		}},
		Who: []*cedarpostv1.EntityUid{servertest.UID(`Doc::Action::"Read"`)},
	})
	if err != nil {
		t.Fatal(err)
	}
	var report *cedarpostv1.ImpactReport
	for {
		res, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		report = res.Report
	}
	gained := int32(0)
	for _, w := range report.Who {
		gained += w.Gained
	}
	if gained != most || report.WhoPairs != most || !strings.Contains(strings.Join(report.WhoLeftOut, "|"), "pairs beyond the first 70 of all") {
		t.Errorf("%d gain, %d pairs were tried, left out %v", gained, report.WhoPairs, report.WhoLeftOut)
	}
}
