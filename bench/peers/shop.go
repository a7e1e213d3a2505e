package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"

	"github.com/cedarpost/cedarpost/policies"
)

// question is whether the principal may view the order, and which of the fields, without a second
// factor.
type question struct{ principal, order string }

// fields are asked for in every question.
var fields = []string{"id", "status", "total", "internal.notes"}

// answer says what the principal may see. A server that answers for the object only has no fields.
type answer struct {
	allow     bool
	permitted []string
}

func (a answer) String() string { return fmt.Sprintf("allow=%t fields=%v", a.allow, a.permitted) }

const batchSize = 50

var (
	oneQuestion = question{"bob", "42"}
	// batchQuestions have one principal, because a batch of Cerbos has one.
	batchQuestions = func() (list []question) {
		for i := range batchSize {
			list = append(list, question{"alice", strconv.Itoa(i + 1)})
		}
		return list
	}()
)

// trials show that the forms of the shop agree, before anything is measured.
var trials = []question{oneQuestion, {"alice", "42"}, {"erin", "42"}, {"dave", "42"}, {"carol", "42"}, {"carol", "99"}, {"mallory", "42"}, {"nobody", "42"}}

// expected is the right answer.
func expected(q question) answer {
	switch q.principal {
	case "bob", "carol": // own orders 42 and 99
		if (q == question{"bob", "42"}) || (q == question{"carol", "99"}) {
			return answer{true, []string{"id", "status", "total"}}
		}
	case "alice": // support
		return answer{true, []string{"id", "status"}}
	case "erin": // finance
		return answer{true, []string{"id", "status", "total"}}
	case "dave": // manager
		return answer{true, fields}
	}
	return answer{} // mallory is suspended, nobody is not stored
}

var errWrong = errors.New("wrong answer")

// check compares answers with the expected ones. The error is errWrong.
func check(questions []question, answers []answer, objectOnly bool) error {
	if len(answers) != len(questions) {
		return fmt.Errorf("%w: %d answers to %d questions", errWrong, len(answers), len(questions))
	}
	for i, q := range questions {
		want := expected(q)
		same := objectOnly || slices.Equal(slices.Sorted(slices.Values(answers[i].permitted)), slices.Sorted(slices.Values(want.permitted)))
		if answers[i].allow != want.allow || !same {
			return fmt.Errorf("%w: %s views order %s: %v, expected %v", errWrong, q.principal, q.order, answers[i], want)
		}
	}
	return nil
}

// user and order are entities of the shop.
type user struct {
	Suspended bool     `json:"suspended"`
	Roles     []string `json:"roles"`
}

type order struct {
	Owner  string `json:"owner"`
	Region string `json:"region"`
	Status string `json:"status"`
	Total  int64  `json:"total"`
}

// shop is the data of the example, for servers that do not read Cedar's entities.
type shop struct {
	users  map[string]user
	orders map[string]order
}

func readShop() (*shop, error) {
	file, err := fs.ReadFile(policies.Shop(), "entities.json")
	if err != nil {
		return nil, err
	}
	type uid struct{ Type, ID string }
	var entities []struct {
		UID     uid
		Parents []uid
		Attrs   struct {
			Suspended      bool
			Region, Status string
			Total          int64
			Owner          struct {
				Entity uid `json:"__entity"`
			}
		}
	}
	if err := json.Unmarshal(file, &entities); err != nil {
		return nil, err
	}
	s := &shop{map[string]user{}, map[string]order{}}
	for _, e := range entities {
		switch e.UID.Type {
		case "Shop::User":
			u := user{e.Attrs.Suspended, []string{}}
			for _, parent := range e.Parents {
				u.Roles = append(u.Roles, parent.ID)
			}
			s.users[e.UID.ID] = u
		case "Shop::Order":
			s.orders[e.UID.ID] = order{e.Attrs.Owner.Entity.ID, e.Attrs.Region, e.Attrs.Status, e.Attrs.Total}
		}
	}
	if len(s.users) == 0 || len(s.orders) == 0 {
		return nil, errors.New("the example has no users or no orders")
	}
	return s, nil
}

// The rest is each server's form of questions and answers. A body is for JSON over HTTP; for gRPC it
// is the same message, and what differs is added.

type object = map[string]any

func cedarpostBody(questions []question, batch bool) any {
	var checks []object
	for _, q := range questions {
		checks = append(checks, object{
			"principal": object{"type": "Shop::User", "id": q.principal}, "action": object{"type": "Shop::Action", "id": "ViewOrder"},
			"resource": object{"type": "Shop::Order", "id": q.order}, "context": object{"mfa": false}, "fields": object{"paths": fields},
		})
	}
	if batch {
		return object{"checks": checks}
	}
	return checks[0]
}

type cedarpostAnswer struct {
	Decision string
	Fields   struct{ Permitted []string }
}

func readCedarpost(body []byte, batch bool) (answers []answer, err error) {
	var b struct {
		Results []struct{ Response cedarpostAnswer }
	}
	if batch {
		err = json.Unmarshal(body, &b)
	} else {
		b.Results = make([]struct{ Response cedarpostAnswer }, 1)
		err = json.Unmarshal(body, &b.Results[0].Response)
	}
	for _, r := range b.Results {
		answers = append(answers, answer{r.Response.Decision == "ALLOW", r.Response.Fields.Permitted})
	}
	return answers, err
}

func opaBody(questions []question, batch bool) any {
	var inputs []object
	for _, q := range questions {
		inputs = append(inputs, object{"principal": q.principal, "order": q.order, "mfa": false, "fields": fields})
	}
	if batch {
		return object{"input": object{"questions": inputs}}
	}
	return object{"input": inputs[0]}
}

type opaAnswer struct {
	Allow     bool
	Permitted []string
}

func readOPA(body []byte, batch bool) (answers []answer, err error) {
	var b struct{ Result json.RawMessage }
	if err := json.Unmarshal(body, &b); err != nil {
		return nil, err
	}
	list := make([]opaAnswer, 1)
	if batch {
		err = json.Unmarshal(b.Result, &list)
	} else {
		err = json.Unmarshal(b.Result, &list[0])
	}
	for _, a := range list {
		answers = append(answers, answer{a.Allow, a.Permitted})
	}
	return answers, err
}

// cerbosBody has the attributes that Cerbos decides by.
func cerbosBody(s *shop, questions []question) any {
	actions := []string{"view"}
	for _, f := range fields {
		actions = append(actions, "view:"+f)
	}
	var resources []object
	for _, q := range questions {
		o := s.orders[q.order]
		resources = append(resources, object{"actions": actions, "resource": object{"kind": "order", "id": q.order,
			"attr": object{"owner": o.Owner, "region": o.Region, "status": o.Status, "total": o.Total}}})
	}
	principal := questions[0].principal
	u, stored := s.users[principal]
	return object{"requestId": "bench", "resources": resources, "principal": object{"id": principal, "roles": append([]string{"user"}, u.Roles...),
		"attr": object{"suspended": u.Suspended || !stored, "mfa": false}}}
}

func readCerbos(body []byte) (answers []answer, err error) {
	var b struct {
		Results []struct{ Actions map[string]string }
	}
	err = json.Unmarshal(body, &b)
	for _, r := range b.Results {
		a := answer{allow: r.Actions["view"] == "EFFECT_ALLOW"}
		for _, f := range fields {
			if r.Actions["view:"+f] == "EFFECT_ALLOW" {
				a.permitted = append(a.permitted, f)
			}
		}
		answers = append(answers, a)
	}
	return answers, err
}

// openfgaBody asks for the order alone, as Check does, or with the fields too.
func openfgaBody(questions []question, withFields, batch bool) object {
	key := func(q question, relation string) object {
		return object{"user": "user:" + q.principal, "relation": relation, "object": "order:" + q.order}
	}
	if !withFields && !batch {
		return object{"tuple_key": key(questions[0], "view")}
	}
	var checks []object
	for i, q := range questions {
		checks = append(checks, object{"tuple_key": key(q, "view"), "correlation_id": fmt.Sprint(i, "-view")})
		for j, f := range fields {
			if withFields {
				checks = append(checks, object{"tuple_key": key(q, "view_"+strings.ReplaceAll(f, ".", "_")), "correlation_id": fmt.Sprint(i, "-", j)})
			}
		}
	}
	return object{"checks": checks}
}

func readOpenFGA(body []byte, withFields, batch bool) (answers []answer, err error) {
	var b struct {
		Allowed bool
		Result  map[string]struct {
			Allowed bool
			Error   json.RawMessage
		}
	}
	if err := json.Unmarshal(body, &b); err != nil {
		return nil, err
	}
	if !withFields && !batch {
		return []answer{{allow: b.Allowed}}, nil
	}
	for _, r := range b.Result {
		if r.Error != nil { // such as a check that took too long
			return nil, fmt.Errorf("a check has no answer: %s", r.Error)
		}
	}
	for i := 0; ; i++ {
		view, ok := b.Result[fmt.Sprint(i, "-view")]
		if !ok {
			return answers, nil
		}
		a := answer{allow: view.Allowed}
		for j, f := range fields {
			if b.Result[fmt.Sprint(i, "-", j)].Allowed {
				a.permitted = append(a.permitted, f)
			}
		}
		answers = append(answers, a)
	}
}
