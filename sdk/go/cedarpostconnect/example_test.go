package cedarpostconnect_test

import (
	"context"
	"fmt"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectinprocess"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/cedarpostconnect"
	"github.com/cedarpost/cedarpost/sdk/go/cedarposttest"
	"github.com/cedarpost/cedarpost/sdk/go/enforce"
)

// entities is an example of a service. It happens to be one of Cedarpost.
type entities struct {
	cedarpostv1connect.UnimplementedEntityServiceHandler
}

func (entities) GetEntity(_ context.Context, req *cedarpostv1.GetEntityRequest) (*cedarpostv1.GetEntityResponse, error) {
	return &cedarpostv1.GetEntityResponse{Entity: &cedarpostv1.StoredEntity{Entity: &cedarpostv1.Entity{Uid: req.GetUid()}}}, nil
}

// Each procedure says what has to be allowed, with the fields of its request. A server
// with a forgotten procedure does not start.
func ExampleInterceptor() {
	svc, err := cedarposttest.Open("../../../policies/shop")
	if err != nil {
		panic(err)
	}
	defer svc.Close()
	guard, err := enforce.New(enforce.Config{
		Client:    svc.Client(),
		Principal: func(context.Context) (cedarpost.EntityUID, error) { return cedarpost.UID("Shop::User", "bob"), nil },
		Context:   func(context.Context) (map[string]any, error) { return map[string]any{"mfa": false}, nil },
	})
	if err != nil {
		panic(err)
	}
	interceptor, err := cedarpostconnect.New(guard, map[string]cedarpostconnect.Route{
		cedarpostv1connect.EntityServiceGetEntityProcedure: {
			Action: cedarpost.UID("Shop::Action", "ViewOrder"), Resource: `Shop::Order::"{uid.id}"`,
		},
		cedarpostv1connect.EntityServiceListEntitiesProcedure:       {Public: "it is not implemented"},
		cedarpostv1connect.EntityServiceImportEntitiesProcedure:     {Public: "it is not implemented"},
		cedarpostv1connect.EntityServiceGetImportProcedure:          {Public: "it is not implemented"},
		cedarpostv1connect.EntityServiceQueryEntityChangesProcedure: {Public: "it is not implemented"},
	})
	if err != nil {
		panic(err)
	}
	server := connect.NewServer(interceptor.Intercept)
	cedarpostv1connect.RegisterEntityServiceHandler(server, entities{})
	fmt.Println(interceptor.Verify(server))

	client := cedarpostv1connect.NewEntityServiceClient(connect.NewClient(connectinprocess.New(server)))
	for _, id := range []string{"42", "99"} {
		_, err := client.GetEntity(context.Background(), &cedarpostv1.GetEntityRequest{Uid: &cedarpostv1.EntityUid{Type: "Shop::Order", Id: id}})
		if err != nil {
			err = fmt.Errorf("%s", connect.CodeOf(err))
		}
		fmt.Println(id, err)
	}
	_, err = client.WriteEntities(context.Background(), &cedarpostv1.WriteEntitiesRequest{})
	fmt.Println("not mapped:", connect.CodeOf(err))
	// Output:
	// cedarpostconnect: /cedarpost.v1.EntityService/WriteEntities has no route; if it needs no check, say why in Public
	// 42 <nil>
	// 99 permission_denied
	// not mapped: permission_denied
}
