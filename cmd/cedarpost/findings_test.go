package main

import (
	"strings"
	"testing"
)

// A finding about a whole bundle has no file, and the same finding is printed once.
func TestPrintFindings(t *testing.T) {
	var out strings.Builder
	c := &console{out: &out}
	whole := finding{Severity: severityError, Message: "uses a type", Bundle: "lab"}
	c.printFindings(&out, "shop", []finding{whole, whole, {Severity: severityError, Message: "is missing", Bundle: "lab", File: "a.cedar", Line: 2}, {Severity: severityWarning, Message: "has no tests"}})
	if want := "bundle lab: error: uses a type\nbundle lab: a.cedar:2: error: is missing\nshop: warning: has no tests\n"; out.String() != want {
		t.Errorf("%s", out.String())
	}
}
