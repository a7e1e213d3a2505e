// Command orders is the API of a small shop. Each of its routes asks Cedarpost first. It is
// an example to read: README.md says in which order.
package main

import (
	"context"
	"errors"
	"log"
	"net/http"
	"os"
	"os/signal"
	"syscall"
	"time"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connecthttp"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/proto/cedarpost/v1/cedarpostv1connect"
	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
)

func main() {
	if err := run(); err != nil {
		log.Fatal(err)
	}
}

func run() error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	client, err := cedarpost.New(cedarpost.Config{}) // from the environment
	if err != nil {
		return err
	}
	defer func() {
		closing, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		if err := client.Close(closing); err != nil {
			log.Print(err)
		}
	}()
	api := &service{client: client, orders: someOrders(), publish: publishTo(entities(os.Getenv("CEDARPOST_ADMIN_URL"), os.Getenv("CEDARPOST_TOKEN")))}
	handler, err := api.handler()
	if err != nil {
		return err
	}
	server := &http.Server{Addr: "127.0.0.1:8000", Handler: handler, ReadHeaderTimeout: 5 * time.Second, ReadTimeout: 10 * time.Second, WriteTimeout: 10 * time.Second}
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		<-ctx.Done()
		closing, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		_ = server.Shutdown(closing)
	}()
	log.Printf("orders on http://%s", server.Addr)
	if err := server.ListenAndServe(); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	<-drained // requests under way still need the client
	return nil
}

// entities writes the data that policies use.
func entities(url, token string) cedarpostv1connect.EntityServiceClient {
	transport := connecthttp.NewTransport(&http.Client{Timeout: 5 * time.Second}, url)
	return cedarpostv1connect.NewEntityServiceClient(connect.NewClient(transport, func(next connect.ClientFunc) connect.ClientFunc {
		return func(ctx context.Context, spec connect.Spec) (connect.ClientStream, error) {
			if info, ok := connect.CallInfoForClientContext(ctx); ok {
				info.RequestHeader().Set("Authorization", "Bearer "+token)
			}
			return next(ctx, spec)
		}
	}))
}

// publishTo tells Cedarpost of a change of an order. Policies decide by its owner and its
// status.
func publishTo(client cedarpostv1connect.EntityServiceClient) func(context.Context, event, order) error {
	return func(ctx context.Context, e event, o order) error {
		known, err := entity(e, o).Proto()
		if err != nil {
			return err
		}
		op := &cedarpostv1.EntityOperation{}
		switch e {
		case made:
			op.Operation = &cedarpostv1.EntityOperation_Put{Put: known}
		case changed:
			op.Operation = &cedarpostv1.EntityOperation_SetAttributes{SetAttributes: &cedarpostv1.SetAttributes{Uid: known.Uid, Attrs: known.Attrs}}
		case gone:
			op.Operation = &cedarpostv1.EntityOperation_Delete{Delete: &cedarpostv1.DeleteEntity{Uid: known.Uid}}
		}
		_, err = client.WriteEntities(ctx, &cedarpostv1.WriteEntitiesRequest{Operations: []*cedarpostv1.EntityOperation{op}})
		return err
	}
}
