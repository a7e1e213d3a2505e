package cedarposttest_test

import (
	"testing"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/cedarposttest"
)

const shop = "../../../policies/shop"

func user(id string) cedarpost.EntityUID  { return cedarpost.UID("Shop::User", id) }
func role(id string) cedarpost.EntityUID  { return cedarpost.UID("Shop::Role", id) }
func order(id string) cedarpost.EntityUID { return cedarpost.UID("Shop::Order", id) }

func view(who, id string) cedarpost.Check {
	return cedarpost.Check{
		Principal: user(who), Action: cedarpost.UID("Shop::Action", "ViewOrder"), Resource: order(id),
		Context: map[string]any{"mfa": false},
	}
}

func TestAnswers(t *testing.T) {
	svc := cedarposttest.New(t, shop)
	client := svc.Client()
	for _, c := range []struct {
		who, id string
		want    bool
	}{{"bob", "42", true}, {"bob", "99", false}, {"carol", "99", true}, {"mallory", "42", false}} {
		r, err := client.Authorize(t.Context(), view(c.who, c.id))
		if err != nil {
			t.Fatal(err)
		}
		if r.Allowed() != c.want {
			t.Errorf("%s %s: %v", c.who, c.id, r.Allowed())
		}
	}
	if got := svc.Decisions()[1].String(); got != `Shop::User::"bob" Shop::Action::"ViewOrder" Shop::Order::"99": deny at OBJECT` {
		t.Error(got)
	}
}
