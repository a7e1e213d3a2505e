package engine

import (
	"strings"
	"testing"
)

// Cedar ends a comment at a carriage return, cedar-go only at a line feed: a policy after
// it would not be there.
func TestCarriageReturnInAComment(t *testing.T) {
	const policy = "@id(\"freeze\") forbid (principal, action, resource);\n"
	for text, bad := range map[string]bool{
		"// nobody may\r" + policy:                               true,
		policy + "// nobody may\r" + policy:                      true,
		"// nobody may\r\n" + policy:                             false,
		"// nobody may\n" + policy:                               false,
		policy + "// the end\r":                                  false,
		"@id(\"a//b\rc\") permit (principal, action, resource);": false,
	} {
		_, errs := split(text, false)
		got := len(errs) > 0 && strings.Contains(errs[0].msg, "carriage return")
		if got != bad {
			t.Errorf("%q: %v", text, errs)
		}
		if err := checkSchemaNesting(text); (err != nil) != bad {
			t.Errorf("schema %q: %v", text, err)
		}
	}
}
