package main

import (
	"maps"
	"slices"
	"strconv"
	"sync"

	"github.com/cedarpost/cedarpost/sdk/go/cedarpost"
)

// order is what a handler answers with, with all its fields. The filter removes those that
// the user may not see. The names are those of policies/shop/fields.yaml.
type order struct {
	ID       string   `json:"id"`
	Status   string   `json:"status"`
	Items    []string `json:"items"`
	Total    int64    `json:"total"`
	Customer customer `json:"customer"`
	Shipping shipping `json:"shipping"`
	Internal internal `json:"internal"`

	owner string
}

type customer struct {
	Name  string `json:"name"`
	Email string `json:"email"`
}

type shipping struct {
	Address string `json:"address"`
}

type internal struct {
	Margin int64  `json:"margin"`
	Notes  string `json:"notes"`
}

// event is what can happen to an order.
type event uint8

const (
	made event = iota
	changed
	gone
)

// entity returns the attributes of an order that policies know; after a change, those that
// can change.
func entity(e event, o order) cedarpost.Entity {
	known := cedarpost.Entity{
		UID:     cedarpost.UID("Shop::Order", o.ID),
		Attrs:   map[string]any{"status": o.Status, "total": o.Total},
		Parents: []cedarpost.EntityUID{cedarpost.UID("Shop::Store", "main")},
	}
	if e == made {
		known.Attrs["owner"] = cedarpost.UID("Shop::User", o.owner)
		known.Attrs["region"] = "eu"
	}
	return known
}

// table keeps the orders in memory.
type table struct {
	mu     sync.Mutex
	orders map[string]order
	last   int
}

func someOrders() *table {
	t := &table{orders: map[string]order{}, last: 1000}
	for _, o := range []order{
		{
			ID: "42", Status: "open", Items: []string{"teapot"}, Total: 4999, owner: "bob",
			Customer: customer{"Bob", "bob@example.com"}, Shipping: shipping{"1 Elm Road"}, Internal: internal{1200, "pays late"},
		},
		{
			ID: "99", Status: "open", Items: []string{"kettle"}, Total: 12900, owner: "carol",
			Customer: customer{"Carol", "carol@example.com"}, Shipping: shipping{"7 Oak Street"}, Internal: internal{3100, "a friend of dave"},
		},
	} {
		t.orders[o.ID] = o
	}
	return t
}

func (t *table) get(id string) (order, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	o, ok := t.orders[id]
	return o, ok
}

func (t *table) all() []order {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []order
	for _, id := range slices.Sorted(maps.Keys(t.orders)) {
		out = append(out, t.orders[id])
	}
	return out
}

// add stores a new order under a new id.
func (t *table) add(o order) order {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.last++
	o.ID = strconv.Itoa(t.last)
	t.orders[o.ID] = o
	return o
}

// update changes an order if it exists. It holds the lock meanwhile, so that changes are
// published in the order in which they are made, as with a transaction of a database.
func (t *table) update(id string, change func(*order) error) (found bool, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	o, found := t.orders[id]
	if !found {
		return false, nil
	}
	if err := change(&o); err != nil {
		return true, err
	}
	o.ID = id // the check was about this id
	t.orders[id] = o
	return true, nil
}

func (t *table) remove(id string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.orders, id)
}
