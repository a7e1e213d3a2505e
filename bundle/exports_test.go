package bundle_test

import (
	"reflect"
	"testing"

	"github.com/cedarpost/cedarpost/bundle"
)

// The exports of a published bundle.yaml are read alone. A list that cannot be read exports nothing.
func TestReadExports(t *testing.T) {
	for text, want := range map[string][]bundle.Export{
		"":                                   nil,
		"name: a\n":                          nil,
		"exports: []\n":                      nil,
		"exports: [User, A::B]\nlater: {}\n": {{Type: "User", Line: 1, Column: 11}, {Type: "A::B", Line: 1, Column: 17}},
		"exports: '*'\n":                     {{Type: "*", Line: 1, Column: 10}},
		"exports:\n  - \"*\"\n":              {{Type: "*", Line: 2, Column: 5}},
		"exports: ['*', User]\n":             nil,
		"exports: {User: true}\n":            nil,
		"exports: [":                         nil,
		"[exports]":                          nil,
	} {
		if got := bundle.ReadExports([]byte(text)); !reflect.DeepEqual(got, want) {
			t.Errorf("%q: %v, want %v", text, got, want)
		}
	}
}
