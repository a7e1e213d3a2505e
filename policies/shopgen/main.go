// Command shopgen writes the entities of the example shop. They are generated, so that
// there are enough of them to search and page through. Every run writes the same file.
package main

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"strconv"
)

type uid struct {
	Type string `json:"type"`
	ID   string `json:"id"`
}

type entity struct {
	UID     uid            `json:"uid"`
	Attrs   map[string]any `json:"attrs"`
	Parents []uid          `json:"parents"`
}

// The people, with the roles of the staff. Tests, documents and demonstrations depend on
// these people and on the orders below.
var cast = []struct{ name, region, role string }{
	{"bob", "eu", ""},
	{"carol", "us", ""},
	{"alice", "eu", "support"},
	{"erin", "eu", "finance"},
	{"dave", "eu", "manager"},
	{"mallory", "eu", "support"}, // suspended
	{"grace", "us", "support"},
	{"heidi", "us", "finance"},
	{"judy", "us", "manager"},
}

// The orders of the tests and documents.
var told = map[int]struct {
	owner, region, status string
	total                 int
}{
	13: {"mallory", "eu", "open", 1999},
	42: {"bob", "eu", "open", 4999},
	43: {"bob", "eu", "shipped", 1250},
	44: {"bob", "eu", "archived", 800},
	99: {"carol", "us", "open", 12900},
}

const (
	users  = 50
	orders = 500
)

func main() {
	out := flag.String("o", "", "file to write")
	flag.Parse()
	text, err := generate()
	if err == nil && *out != "" {
		err = os.WriteFile(*out, text, 0o644)
	} else if err == nil {
		_, err = os.Stdout.Write(text)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "shopgen:", err)
		os.Exit(1)
	}
}

// generate returns Cedar entity JSON, one entity in a line.
func generate() ([]byte, error) {
	var all []entity
	add := func(typ, id string, attrs map[string]any, parents ...uid) {
		if parents == nil {
			parents = []uid{}
		}
		all = append(all, entity{uid{"Shop::" + typ, id}, attrs, parents})
	}

	add("Store", "main", map[string]any{"open": true})
	staff := uid{"Shop::Role", "staff"}
	add("Role", "staff", map[string]any{})
	for _, r := range []string{"support", "finance", "manager"} {
		add("Role", r, map[string]any{}, staff)
	}

	regions := []string{"eu", "us", "apac"}
	customers := []string{"bob", "carol"}
	for _, c := range cast {
		attrs := map[string]any{"region": c.region, "suspended": c.name == "mallory"}
		if c.role == "" {
			add("User", c.name, attrs)
			continue
		}
		add("User", c.name, attrs, uid{"Shop::Role", c.role})
	}
	for i := len(cast) + 1; i <= users; i++ {
		name := fmt.Sprintf("customer%02d", i)
		customers = append(customers, name)
		add("User", name, map[string]any{"region": regions[i%len(regions)], "suspended": i%25 == 0})
	}

	statuses := []string{"open", "shipped", "delivered", "delivered", "archived"}
	for n := 1; n <= orders; n++ {
		o, ok := told[n]
		if !ok {
			o.owner = customers[n*7%len(customers)]
			o.region = regions[n%len(regions)]
			o.status = statuses[n*3%len(statuses)]
			o.total = 500 + n*7919%50_000
		}
		add("Order", strconv.Itoa(n), map[string]any{
			"owner":  map[string]any{"__entity": uid{"Shop::User", o.owner}},
			"region": o.region,
			"status": o.status,
			"total":  o.total,
		}, uid{"Shop::Store", "main"})
	}

	var b bytes.Buffer
	for i, e := range all {
		b.WriteString(map[bool]string{true: "[\n", false: ",\n"}[i == 0])
		line, err := json.Marshal(e)
		if err != nil {
			return nil, err
		}
		b.Write(line)
	}
	b.WriteString("\n]\n")
	return b.Bytes(), nil
}
