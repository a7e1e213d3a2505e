package main

import (
	"bytes"
	"os"
	"testing"
)

// TestFresh fails if the committed entities differ from what the generator makes.
func TestFresh(t *testing.T) {
	want, err := generate()
	if err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile("../shop/entities.json")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Error("entities.json is stale: run go generate ./policies")
	}
}
