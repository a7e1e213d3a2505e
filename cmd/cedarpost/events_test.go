package main

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// The text of a probing event has an example of what was asked.
func TestProbingShowsAnExample(t *testing.T) {
	const asked = `Shop::Action::"ViewOrder" on Shop::Order::"42"`
	for n, want := range map[int64]string{1: "1 time: " + asked, 3: "3 times, such as " + asked} {
		got := eventDetail(&cedarpostv1.EventRecord{Detail: &cedarpostv1.EventRecord_Probing{Probing: &cedarpostv1.Probing{
			Reason: "invalid_question", Principal: `Shop::User::"bob"`, Example: asked, Count: n,
		}}})
		if got != `invalid_question about Shop::User::"bob", `+want {
			t.Error(got)
		}
	}
}

// A long text of a request does not make the table too wide.
func TestLongCellsAreCut(t *testing.T) {
	long := strings.Repeat("é", maxCell)
	if shortCell(long) != long || shortCell(long+"x") != long+"…" {
		t.Errorf("%q", shortCell(long+"x"))
	}
}

// --kind knows each kind of event.
func TestKindsOfEvents(t *testing.T) {
	field, _ := reflect.TypeFor[eventsCmd]().FieldByName("Kind")
	kinds := strings.Split(field.Tag.Get("enum"), ",")
	for n, name := range cedarpostv1.EventRecord_Kind_name {
		name = strings.ToLower(name)
		if n != 0 && (!slices.Contains(kinds, name) || !strings.Contains(field.Tag.Get("help"), name)) {
			t.Errorf("events --kind does not know %s", name)
		}
	}
}
