package server

import (
	"bytes"
	"errors"
	"testing"

	"github.com/cedar-policy/cedar-go"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/policies"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/offline"
	"github.com/cedarpost/cedarpost/server/wire"
)

// FuzzAuthorizeJSON feeds bodies to the codec and to the reader of questions. They do not panic,
// and a question that was read can be decided.
func FuzzAuthorizeJSON(f *testing.F) {
	b, err := bundle.Read(policies.Shop(), "shop")
	if err != nil {
		f.Fatal(err)
	}
	set, findings := engine.Compile([]engine.Source{offline.Source(b)}, nil)
	if set == nil {
		f.Fatal(findings)
	}
	const good = `{"principal":{"type":"Shop::User","id":"bob"},"action":{"type":"Shop::Action","id":"ViewOrder"},"resource":{"type":"Shop::Order","id":"42"},"context":{"mfa":true}`
	for _, seed := range []string{good + `}`, good + `,"fields":{"all":true}}`, good + `,"fields":{"paths":["customer","nope"],"requireAll":true}}`,
		good + `,"entities":[{"uid":{"type":"Shop::Order","id":"1"}}]}`, good + `,"consistency":{"fullyConsistent":true},"explain":true}`, `{`, `null`, `{"context":{"mfa":{"a":[[[]]]}}}`} {
		f.Add([]byte(seed))
	}
	codec := newStrictJSON()
	f.Fuzz(func(t *testing.T, body []byte) {
		req := &cedarpostv1.AuthorizeRequest{}
		if codec.UnmarshalRead(t.Context(), bytes.NewReader(body), req) != nil {
			return
		}
		pool := engine.NewPool()
		e, err := set.Prepare(wire.Ask(req, 0), pool, func(missing []cedar.EntityUID) error {
			pool.Add(missing, nil)
			return nil
		})
		if err != nil {
			return
		}
		if _, err := e.Decide(); err != nil {
			var bad *engine.RequestError
			if !errors.As(err, &bad) {
				t.Fatal(err)
			}
		}
	})
}
