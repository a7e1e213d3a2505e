package main

import (
	"context"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"
	"connectrpc.com/grpcreflect/v2"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
)

// constant answers each question alike, without a look at it. Its rate is what the socket, HTTP
// and the codec of Connect leave to a server in Go.
type constant struct {
	cedarpostv1connect.UnimplementedAuthorizationServiceHandler
	answer *cedarpostv1.AuthorizeResponse
	batch  *cedarpostv1.AuthorizeBatchResponse
}

func (c *constant) Authorize(context.Context, *cedarpostv1.AuthorizeRequest) (*cedarpostv1.AuthorizeResponse, error) {
	return c.answer, nil
}

func (c *constant) AuthorizeBatch(context.Context, *cedarpostv1.AuthorizeBatchRequest) (*cedarpostv1.AuthorizeBatchResponse, error) {
	return c.batch, nil
}

// constantAnswer has the shape and the size of what cedarpost answers.
func constantAnswer(policy string, fields *cedarpostv1.Fields) *cedarpostv1.AuthorizeResponse {
	return &cedarpostv1.AuthorizeResponse{
		Decision:            cedarpostv1.Decision_ALLOW,
		Fields:              fields,
		DeterminingPolicies: []*cedarpostv1.PolicyRef{{Bundle: "shop", Id: policy}},
		Revision:            &cedarpostv1.Revision{Token: strings.Repeat("A", 71), Number: 3},
		DecisionId:          "01a1b2c3-d4e5-7f60-8123-456789abcdef",
	}
}

// serveConstant serves on an address until the process is stopped.
func serveConstant(address string) error {
	c := &constant{
		answer: constantAnswer("owner-views", &cedarpostv1.Fields{Permitted: []string{"id", "status", "total"}, Denied: []string{"internal.notes"}}),
		batch:  &cedarpostv1.AuthorizeBatchResponse{},
	}
	one := constantAnswer("support-views", &cedarpostv1.Fields{Permitted: []string{"id", "status"}, Denied: []string{"total", "internal.notes"}})
	c.batch.Revision = one.Revision
	for range batchSize {
		c.batch.Results = append(c.batch.Results, &cedarpostv1.AuthorizeBatchResult{Result: &cedarpostv1.AuthorizeBatchResult_Response{Response: one}})
	}
	server := connect.NewServer()
	cedarpostv1connect.RegisterAuthorizationServiceHandler(server, c)
	grpcreflect.Register(server)
	mux := http.NewServeMux()
	connecthttp.Mount(mux, server, connecthttp.WithCompressors())
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	return (&http.Server{Addr: address, Handler: mux, Protocols: protocols, ReadHeaderTimeout: 10 * time.Second}).ListenAndServe()
}
