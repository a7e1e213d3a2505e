package cedarposttest

import (
	"crypto/rand"

	"connectrpc.com/connect/v2"
	"google.golang.org/protobuf/types/known/structpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
)

// meaning is what a token of a Service stands for.
type meaning struct {
	principal *cedarpostv1.EntityUid
	context   *structpb.Struct // nil: none
}

// PrincipalToken returns the text of an access token that this service accepts: it stands for a principal and
// fills attributes of the context, as principal_tokens in bundle.yaml says in production. The service has no
// issuer, so it refuses all other tokens. Values of context are those of
// [cedarpost.Check].
func (s *Service) PrincipalToken(principal cedarpost.EntityUID, context map[string]any) string {
	s.t.Helper()
	e, err := cedarpost.Entity{UID: principal, Attrs: context}.Proto()
	if err != nil {
		s.t.Fatalf("cedarposttest: the context of a token: %v", err)
	}
	text := "cedarposttest." + rand.Text() + ".unsigned"
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.tokens == nil {
		s.tokens = map[string]meaning{}
	}
	s.tokens[text] = meaning{e.GetUid(), e.GetAttrs()}
	return text
}

// readToken rewrites a question that has a token. The caller holds mu.
func (s *Service) readToken(req *cedarpostv1.AuthorizeRequest) error {
	text := req.GetPrincipalToken()
	if text == "" {
		return nil
	}
	req.PrincipalToken = ""
	m, ok := s.tokens[text]
	if !ok {
		return connect.NewError(connect.CodeInvalidArgument, "principal_token: the access token is not accepted; no decision was given")
	}
	req.Principal = m.principal
	for name, value := range m.context.GetFields() {
		if _, sent := req.GetContext().GetFields()[name]; sent {
			return connect.Errorf(connect.CodeInvalidArgument, "context.%s is filled from the principal_token and cannot be sent with one", name)
		}
		if req.GetContext().GetFields() == nil {
			req.Context = &structpb.Struct{Fields: map[string]*structpb.Value{}}
		}
		req.Context.Fields[name] = value
	}
	return nil
}
