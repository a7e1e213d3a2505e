package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"net/http"
	"slices"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
	"github.com/cedarpost/cedarpost/sdk/go/cedarposthttp"
	"github.com/cedarpost/cedarpost/sdk/go/enforce"
	"github.com/cedarpost/cedarpost/sdk/go/fields"
)

// service is the API. Only the handler of the list makes checks itself.
type service struct {
	client *cedarpost.Client
	orders *table
	// publish tells Cedarpost of a change of an order.
	publish func(context.Context, event, order) error

	guard *enforce.Guard
	mux   *cedarposthttp.Mux
}

func action(name string) cedarpost.EntityUID { return cedarpost.UID("Shop::Action", name) }

const (
	theStore = `Shop::Store::"main"`
	theOrder = `Shop::Order::"{id}"`
)

// handler is the whole API. Beside each pattern is what has to be allowed.
func (s *service) handler() (http.Handler, error) {
	var err error
	s.guard, err = enforce.New(enforce.Config{
		Client:    s.client,
		Principal: principal,
		Context:   factors,
		// Here, the advice of the policy means: sign in again with a second factor.
		StepUp: map[string]enforce.Challenge{"step_up_mfa": {ACRValues: []string{"mfa"}}},
		// Finance may refund, with the obligation to tell the customer.
		Obligations: map[string]func(context.Context, cedarpost.Result) error{"notify_customer": s.notify},
	})
	if err != nil {
		return nil, err
	}
	s.mux = cedarposthttp.NewMux(s.guard)
	s.mux.HandleFunc("GET /orders", cedarposthttp.Route{Action: action("ListOrders"), Resource: theStore}, s.list)
	s.mux.HandleFunc("POST /orders", cedarposthttp.Route{Action: action("CreateOrder"), Resource: theStore}, s.create)
	s.mux.HandleFunc("GET /orders/{id}", cedarposthttp.Route{Action: action("ViewOrder"), Resource: theOrder, Hide: true, Filter: true}, s.get)
	s.mux.HandleFunc("PATCH /orders/{id}", cedarposthttp.Route{Action: action("EditOrder"), Resource: theOrder, Hide: true, Changes: cedarposthttp.MergePatch}, s.patch)
	s.mux.HandleFunc("DELETE /orders/{id}", cedarposthttp.Route{Action: action("DeleteOrder"), Resource: theOrder, Hide: true}, s.remove)
	s.mux.HandleFunc("POST /orders/{id}/refund", cedarposthttp.Route{Action: action("RefundOrder"), Resource: theOrder, Hide: true}, s.refund)
	s.mux.HandleFunc("GET /health", cedarposthttp.Route{Public: "a load balancer asks, and has no user"}, func(http.ResponseWriter, *http.Request) {})
	return authenticate(s.mux), nil
}

// get answers with all fields of an order. The filter removes those that the user may not
// see.
func (s *service) get(w http.ResponseWriter, r *http.Request) {
	o, ok := s.orders.get(r.PathValue("id"))
	if !ok {
		cedarposthttp.NotFound(w, r)
		return
	}
	answer(w, http.StatusOK, o)
}

// list is for staff. One call asks which orders the user may see, and which of their fields.
func (s *service) list(w http.ResponseWriter, r *http.Request) {
	orders := s.orders.all()
	who, err := principal(r.Context())
	if err != nil {
		http.Error(w, "who are you?", http.StatusUnauthorized)
		return
	}
	attrs, err := factors(r.Context())
	if err != nil {
		http.Error(w, "a mistake of ours", http.StatusInternalServerError)
		return
	}
	checks := make([]cedarpost.Check, len(orders))
	for i, o := range orders {
		checks[i] = cedarpost.Check{
			Principal: who, Action: action("ViewOrder"), Resource: cedarpost.UID("Shop::Order", o.ID), Context: attrs, AllFields: true,
		}
	}
	shown := []json.RawMessage{}
	for i, a := range s.client.AuthorizeBatch(r.Context(), checks) {
		if a.Err != nil {
			http.Error(w, "try again", http.StatusServiceUnavailable)
			return
		}
		if !a.Allowed() || len(a.Obligations()) > 0 { // this handler cannot meet obligations
			continue
		}
		kept, _, err := fields.New(a.Fields().Permitted(), a.Fields().Denied()).Marshal(orders[i])
		if err != nil {
			http.Error(w, "a mistake of ours", http.StatusInternalServerError)
			return
		}
		shown = append(shown, kept)
	}
	answer(w, http.StatusOK, shown)
}

// create makes an order of the user, who owns it as soon as Cedarpost knows of it.
func (s *service) create(w http.ResponseWriter, r *http.Request) {
	var wish struct {
		Items   []string `json:"items"`
		Address string   `json:"address"`
	}
	who, err := principal(r.Context())
	if err != nil || json.NewDecoder(http.MaxBytesReader(w, r.Body, 64<<10)).Decode(&wish) != nil {
		http.Error(w, "not an order", http.StatusBadRequest)
		return
	}
	o := s.orders.add(order{Status: "open", Items: wish.Items, Shipping: shipping{wish.Address}, owner: who.ID})
	if err := s.publish(r.Context(), made, o); err != nil {
		log.Printf("order %s: %v", o.ID, err)
		s.orders.remove(o.ID)
		http.Error(w, "try again", http.StatusServiceUnavailable)
		return
	}
	answer(w, http.StatusCreated, map[string]string{"id": o.ID})
}

// patch applies the body. All of its paths are permitted, otherwise the route would have
// refused it. The answer has no body, because a field that may be written may still be one
// that must not be read.
func (s *service) patch(w http.ResponseWriter, r *http.Request) {
	found, err := s.orders.update(r.PathValue("id"), func(o *order) error {
		o.Items = slices.Clone(o.Items)
		if err := json.NewDecoder(r.Body).Decode(o); err != nil {
			return fmt.Errorf("%w: %w", errNoPatch, err)
		}
		return s.publish(r.Context(), changed, *o)
	})
	switch {
	case !found:
		cedarposthttp.NotFound(w, r)
	case errors.Is(err, errNoPatch):
		http.Error(w, errNoPatch.Error(), http.StatusBadRequest)
	case err != nil:
		log.Printf("patch: %v", err)
		http.Error(w, "try again", http.StatusServiceUnavailable)
	default:
		w.WriteHeader(http.StatusNoContent)
	}
}

var errNoPatch = errors.New("not a patch of an order")

func (s *service) remove(w http.ResponseWriter, r *http.Request) {
	o, ok := s.orders.get(r.PathValue("id"))
	if !ok {
		cedarposthttp.NotFound(w, r)
		return
	}
	if err := s.publish(r.Context(), gone, o); err != nil {
		log.Printf("order %s: %v", o.ID, err)
		http.Error(w, "try again", http.StatusServiceUnavailable)
		return
	}
	s.orders.remove(o.ID)
	w.WriteHeader(http.StatusNoContent)
}

func (s *service) refund(w http.ResponseWriter, r *http.Request) {
	o, ok := s.orders.get(r.PathValue("id"))
	if !ok {
		cedarposthttp.NotFound(w, r)
		return
	}
	log.Printf("order %s: money is on its way", o.ID)
	w.WriteHeader(http.StatusNoContent)
}

// notify meets the obligation to tell the customer, before the refund.
func (s *service) notify(_ context.Context, result cedarpost.Result) error {
	log.Printf("a letter to the customer, by decision %s", result.DecisionID())
	return nil
}

func answer(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // an error means that the client is gone
}
