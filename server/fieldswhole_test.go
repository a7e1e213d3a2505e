package server_test

import (
	"slices"
	"testing"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/sdk/go/fields"
	"github.com/cedarpost/cedarpost/server/servertest"
)

// A patch that replaces a record as a whole removes members that are in no catalogue, too, so it is
// denied to a user who may change every field of the record.
func TestAttackReplacedRecord(t *testing.T) {
	s := servertest.New(t)
	s.MustLoadShop()
	write := func(paths ...string) *cedarpostv1.AuthorizeResponse {
		t.Helper()
		req := servertest.AskShop("dave", "EditOrder", "42", true)
		req.Fields = &cedarpostv1.FieldSelection{Paths: paths, RequireAll: true}
		res, err := s.Authorization.Authorize(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		return res
	}
	if res := write("shipping.address", "customer.name", "customer.email", "status"); res.Decision != cedarpostv1.Decision_ALLOW {
		t.Fatalf("each field alone: %v", res)
	}
	patches := []string{`{"shipping":null}`, `{"shipping":"gone"}`, `{"shipping":[]}`, `{"shipping":[{"address":"x"}]}`, `{"shipping":{}}`, `{"status":"paid","customer":null}`}
	denied := 0
	for _, patch := range patches {
		paths, err := fields.MergePatch([]byte(patch))
		if err != nil {
			t.Fatal(err)
		}
		res := write(paths...)
		if res.Decision == cedarpostv1.Decision_DENY && res.GetDeniedAt() == cedarpostv1.DeniedAt_FIELD &&
			slices.ContainsFunc(res.GetFields().GetDenied(), func(path string) bool { return path == "shipping.*" || path == "customer.*" }) {
			denied++
		} else {
			t.Errorf("%s: %v", patch, res)
		}
	}
	for _, patch := range []string{`[{"op":"remove","path":"/shipping"}]`, `[{"op":"replace","path":"/shipping","value":{"address":"x"}}]`} {
		paths, err := fields.JSONPatch([]byte(patch))
		if err != nil {
			t.Fatal(err)
		}
		if res := write(paths...); res.Decision != cedarpostv1.Decision_DENY {
			t.Errorf("%s: %v", patch, res)
		}
	}
	// Changed knows the members.
	address := map[string]any{"shipping": map[string]any{"address": "x"}}
	more := map[string]any{"shipping": map[string]any{"address": "x", "carrier": "c"}}
	gone := map[string]any{"shipping": nil}
	for _, c := range []struct {
		before map[string]any
		want   cedarpostv1.Decision
	}{{address, cedarpostv1.Decision_ALLOW}, {more, cedarpostv1.Decision_DENY}} {
		paths, err := fields.Changed(c.before, gone)
		if err != nil {
			t.Fatal(err)
		}
		if res := write(paths...); res.Decision != c.want {
			t.Errorf("%v removed: %v", c.before, res)
		}
	}
	t.Logf("attack: %d of %d merge patches that replace a whole record are denied", denied, len(patches))
}
