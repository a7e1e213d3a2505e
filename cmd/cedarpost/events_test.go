package main

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

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
