package fields_test

import (
	"fmt"
	"os"
	"strings"

	"google.golang.org/protobuf/types/known/fieldmaskpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/sdk/go/fields"
)

// The lists are those of the answer: answer.Fields.Permitted, answer.Fields.Denied.
var answer = struct{ Permitted, Denied []string }{
	Permitted: []string{"id", "customer.name", "items.price"},
	Denied:    []string{"customer.email", "items.cost"},
}

func ExampleNew() {
	nothing := fields.New(nil, nil)
	out, dropped, err := nothing.Marshal(map[string]any{"id": 42})
	fmt.Println(string(out), dropped.Unknown, err)
	// Output: {} 1 <nil>
}

func ExampleFilter_JSON() {
	f := fields.New(answer.Permitted, answer.Denied)
	order := strings.NewReader(`{
		"id": 42, "customer": {"name": "Bob", "email": "bob@example.com"},
		"items": [{"price": 9.90, "cost": 4.10}], "fraudScore": 0.2}`)
	dropped, err := f.JSON(os.Stdout, order)
	fmt.Println()
	fmt.Println(dropped.Denied, dropped.Unknown, dropped.UnknownPaths, err)
	// Output:
	// {"id":42,"customer":{"name":"Bob"},"items":[{"price":9.90}]}
	// 2 1 [fraudScore] <nil>
}

func ExampleFilter_Marshal() {
	type Customer struct {
		Name  string `json:"name"`
		Email string `json:"email"`
	}
	type Order struct {
		ID       int      `json:"id"`
		Customer Customer `json:"customer"`
	}
	f := fields.New(answer.Permitted, answer.Denied)
	out, dropped, err := f.Marshal([]Order{{42, Customer{"Bob", "bob@example.com"}}})
	fmt.Println(string(out), dropped.Denied, err)
	// Output: [{"id":42,"customer":{"name":"Bob"}}] 1 <nil>
}

func ExampleFilter_Map() {
	f := fields.New(answer.Permitted, answer.Denied)
	order := map[string]any{"id": 42, "customer": map[string]any{"name": "Bob", "email": "bob@example.com"}}
	dropped := f.Map(order)
	fmt.Println(order, dropped.Denied)
	// Output: map[customer:map[name:Bob] id:42] 1
}

func ExampleFilter_Struct() {
	type Customer struct {
		Name  string `json:"name"`
		Email string `json:"email"`
	}
	type Order struct {
		ID       int       `json:"id"`
		Customer *Customer `json:"customer"`
	}
	f := fields.New(answer.Permitted, answer.Denied)
	order := Order{42, &Customer{"Bob", "bob@example.com"}}
	dropped, err := f.Struct(&order)
	fmt.Printf("%d %q %d %v\n", order.ID, *order.Customer, dropped.Denied, err)
	// Output: 42 {"Bob" ""} 1 <nil>
}

func ExampleFilter_Proto() {
	f := fields.New([]string{"principal.type"}, []string{"principal.id"})
	m := &cedarpostv1.AuthorizeRequest{
		Principal: &cedarpostv1.EntityUid{Type: "Shop::User", Id: "bob"},
		RequestId: "7",
	}
	dropped := f.Proto(m)
	fmt.Printf("%s %q %q %v\n", m.Principal.Type, m.Principal.Id, m.RequestId, dropped)
	// Output: Shop::User "" "" {1 1 [requestId]}
}

func ExampleMergePatch() {
	paths, err := fields.MergePatch([]byte(`{"status": "paid", "customer": {"email": null}, "items": []}`))
	fmt.Println(paths, err)
	// Now ask: AuthorizeRequest{Fields: &FieldSelection{Paths: paths, RequireAll: true}, …}.

	_, err = fields.MergePatch([]byte(`{"customer.email": null}`))
	fmt.Println(err)
	// Output:
	// [customer.email items status] <nil>
	// fields: the key "customer.email" cannot be in a path: it must have characters, and no dot
}

func ExampleJSONPatch() {
	paths, err := fields.JSONPatch([]byte(`[
		{"op": "replace", "path": "/items/0/price", "value": 1},
		{"op": "copy", "from": "/customer/email", "path": "/note"}]`))
	fmt.Println(paths, err)
	// Output: [customer.email items.price note] <nil>
}

func ExampleMask() {
	paths, err := fields.Mask(&fieldmaskpb.FieldMask{Paths: []string{"status", "customer.email"}})
	fmt.Println(paths, err)

	_, err = fields.Mask(nil)
	fmt.Println(err)
	// Output:
	// [customer.email status] <nil>
	// fields: an empty field mask means every field: name them
}

func ExampleChanged() {
	type Order struct {
		Status string   `json:"status"`
		Total  float64  `json:"total"`
		Tags   []string `json:"tags"`
	}
	paths, err := fields.Changed(Order{"open", 7, nil}, Order{"paid", 7, []string{"late"}})
	fmt.Println(paths, err)
	// Output: [status tags] <nil>
}
