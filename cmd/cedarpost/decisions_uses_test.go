package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"testing"
	"time"
)

// testUses sends a report as a caching client does. All outputs show it.
func testUses(sh *shell) func(*testing.T) {
	return func(t *testing.T) {
		r := sh.exits(t, 0, nil, "decisions", "--request-id", "req-1", "-o", "json")
		var row struct{ DecisionID string }
		if err := json.Unmarshal([]byte(r.out), &row); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(r.out, `"uses"`) {
			t.Errorf("unused: %s", r.out)
		}
		sh.exits(t, 0, says("no events"), "events", "--kind", "reuse")
		at := time.Now().UTC().Format(time.RFC3339)
		body := fmt.Sprintf(`{"reportId":"5d8b5c1e-0c3f-4a54-9d6a-0c3f0e6b8a11","lost":2,
			"reuses":[{"decisionId":%[1]q,"hits":7,"first":%[2]q,"last":%[2]q}],
			"failOpens":[{"principal":{"type":"Shop::User","id":"bob"},"action":{"type":"Shop::Action","id":"ViewOrder"},
				"resource":{"type":"Shop::Order","id":"42"},"reason":"catalogue","code":"unavailable","count":3,"first":%[2]q,"last":%[2]q}]}`, row.DecisionID, at)
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost,
			value(sh.env, "CEDARPOST_API_URL")+"/cedarpost.v1.AuthorizationService/ReportReuse", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Authorization", "Bearer "+value(sh.env, "CEDARPOST_TOKEN"))
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != http.StatusOK {
			t.Fatal(res.Status)
		}
		sh.exits(t, 0, says("REUSED", "  7       "+row.DecisionID), "decisions", "--request-id", "req-1")
		sh.exits(t, 0, says("used again   7 times, "), "decisions", "get", row.DecisionID)
		for _, args := range [][]string{{"decisions", "--request-id", "req-1"}, {"decisions", "get", row.DecisionID}} {
			r := sh.exits(t, 0, nil, append(args, "-o", "json")...)
			var got struct {
				DecisionID string
				Uses       struct{ Hits string }
			}
			if err := json.Unmarshal([]byte(r.out), &got); err != nil || got.Uses.Hits != "7" || got.DecisionID != row.DecisionID {
				t.Errorf("%v: %v, %s", args, err, r.out)
			}
		}
		sh.exits(t, 0, says("7 uses of 1 decision, 2 lost"), "events", "--kind", "reuse")
		sh.exits(t, 0, says("3 checks let through: catalogue (unavailable)"), "events", "--kind", "failed_open")
		sh.exits(t, 0, says(`"reuse":{"reportId":"5d8b5c1e-`), "decisions", "export")
		sh.exits(t, 0, says(`"event_code":"failed_open"`), "decisions", "export", "--format", "ocsf")
	}
}
