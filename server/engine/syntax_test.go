package engine

import (
	"strings"
	"testing"
	"unicode/utf8"
)

// Common mistakes get a message in plain words at the wrong token.
func TestSyntaxErrors(t *testing.T) {
	const scope = "permit (principal, action, resource)"
	for _, c := range []struct{ text, msg, hint, at string }{
		{scope + ` when { principal.level = 3 };`, `expected "}" but found "="`, `did you mean "=="?`, "= 3"},
		{scope + ` when { principal.level === 3 };`, `expected a value but found "="`, `did you mean "=="?`, "= 3"},
		{`permit (principal = A::"x", action, resource);`, `expected "," but found "="`, `did you mean "=="?`, "= A"},
		{scope + ` when { principal.a and principal.b };`, `expected "}" but found "and"`, `did you mean "&&"?`, "and"},
		{scope + ` when { principal.a or principal.b };`, `expected "}" but found "or"`, `did you mean "||"?`, "or p"},
		{scope + ` when { not principal.a };`, `expected a value but found "not"`, `did you mean "!"?`, "not"},
		{scope + ` when { principal.a & principal.b };`, `expected "}" but found "&"`, `did you mean "&&"?`, "&"},
		{scope + ` when { principal.a | principal.b };`, `expected "}" but found "|"`, `did you mean "||"?`, "|"},
		{scope + ` when { principal.a <> 3 };`, `expected a value but found ">"`, `did you mean "!="?`, ">"},
		{`permit (principal == Clinic::Staff::ann, action, resource);`, "the id of an entity is in quotes", `did you mean Clinic::Staff::"ann"?`, "ann"},
		{`permit (principal in Clinic::Staff::ann, action, resource);`, "the id of an entity is in quotes", `did you mean Clinic::Staff::"ann"?`, "ann"},
		{`permit (principal, action in [Clinic::Action::Read, A::"x"], resource);`, "the id of an entity is in quotes", `did you mean Clinic::Action::"Read"?`, "Read"},
		{scope + ` when { principal == Clinic::Staff::ann };`, "the id of an entity is in quotes", `did you mean Clinic::Staff::"ann"?`, "ann"},
		{`permit (principal == ann, action, resource);`, `expected "::" but found ","`, `an entity is written as Type::"id"`, ", action"},
		{scope, "the policy has no end", `a policy ends with ";"`, ""},
		{scope + ` when { principal.active }`, "the policy has no end", `a policy ends with ";"`, ""},
		{scope + "\n@id(\"b\")\n" + scope + ";", `expected ";" but found "@"`, `a policy ends with ";"`, "@id(\"b\")"},
		{scope + ` when { principal.name == 'a' };`, `expected a value but found "'"`, `a text is in double quotes: "…"`, "'a"},
		{scope + ` when { principal.active ;`, `expected "}" but found ";"`, `a "}" is missing`, ";"},
		{scope + ` when { principal.active`, `expected "}" before the end of the policy`, `a "}" is missing`, ""},
		{scope + ` when { };`, `expected a value but found "}"`, "a condition must not be empty; to apply always, leave it out", "};"},
		{scope + ` when principal.active;`, `expected "{" but found "principal"`, "a condition is in braces: when { … }", "principal.active"},
		{scope + ` where { principal.a };`, `expected ";" but found "where"`, "a condition begins with when or unless", "where"},
		{`permit (principal, action) when { true };`, `expected "," but found ")"`, scopeHint, ") when"},
		{`permit (principal, action, resource when { true };`, `expected ")" but found "when"`, `a ")" is missing`, "when"},
		{`permit (action, principal, resource);`, `expected "principal" but found "action"`, scopeHint, "action"},
		{`permit principal, action, resource;`, `expected "(" but found "principal"`, scopeHint, "principal"},
		{`allow (principal, action, resource);`, `expected "permit" or "forbid" but found "allow"`, "did you mean permit?", "allow"},
		{scope + ` when { if principal.a then true };`, `expected "else" but found "}"`, "write if … then … else …", "};"},
		{scope + ` when { principal. };`, `expected a name but found "}"`, "", "};"},
		{scope + ` when { principal has };`, `expected the name of an attribute but found "}"`, "", "};"},
		{scope + ` when { principal.name like a };`, `expected a pattern in quotes but found "a"`, `a pattern is written as like "a*"`, "a };"},
		{scope + ` when { [1 2] == [1] };`, `expected "," but found "2"`, "", "2]"},
		{scope + ` when { {a: 1, a: 2} == {} };`, `the key "a" is in the record twice`, "", "a: 2"},
		{scope + ` when { foo(1) };`, "foo is not a function", "", "foo"},
		{scope + ` when { principal.foo(1) };`, "foo is not a method", "", "foo"},
		{scope + ` when { principal.a == null };`, `expected a value but found "null"`, "there is no null; ask with has whether an attribute is there: principal has name", "null"},
		{scope + ` when { TRUE };`, `expected a value but found "TRUE"`, "did you mean true?", "TRUE"},
		{scope + ` when { principal.a == 1.5 };`, `expected a name but found "5"`, `numbers are whole; decimal("1.5") makes a fraction`, "5 }"},
		{scope + ` when { principal.name == "a };`, "a text has no closing quote", `a text is in double quotes: "…"; a quote inside of it is written as \"`, `"a }`},
		{scope + ` when { principal.name == "\q" };`, "a text has an escape that Cedar does not know", `a backslash is written as \\`, `"\q"`},
		{scope + ` when { 99999999999999999999 == 1 };`, "99999999999999999999 is too large for a Long", "", "99999999999999999999"},
		{`permit (principal == ?principal, action, resource);`, "templates are not supported: ?principal and ?resource have no value", "write a policy for each principal or resource, or use a group", "?"},
	} {
		text := "@id(\"ä\") // first\n  " + c.text
		statements, errs := split(text, false)
		if len(errs) > 0 {
			t.Errorf("%s: %v", c.text, errs)
			continue
		}
		st := statements[0]
		st.line, st.column = 7, 3
		_, te := parsePolicy("b", "f.cedar", st)
		if te == nil {
			t.Errorf("%s: no error", c.text)
			continue
		}
		at := len(text)
		if c.at != "" {
			at = strings.LastIndex(text, c.at)
		}
		line, column := 7+strings.Count(text[:at], "\n"), utf8.RuneCountInString(text[strings.LastIndexByte(text[:at], '\n')+1:at])+1
		if te.msg != c.msg || te.hint != c.hint || te.line != line || te.column != column {
			t.Errorf("%s\n got %d:%d: %s (%s)\nwant %d:%d: %s (%s)", c.text, te.line, te.column, te.msg, te.hint, line, column, c.msg, c.hint)
		}
	}
}

// Any text that does not parse gets a message at a place in the text.
func FuzzSyntaxErrors(f *testing.F) {
	f.Add(`permit (principal, action, resource) when { principal.level = 3 };`)
	f.Add("permit (principal == A::b, action\n, resource);")
	f.Add("= ä \"\\")
	f.Fuzz(func(t *testing.T, text string) {
		statements, _ := split(text, false)
		lines := strings.Count(text, "\n") + 1
		for _, st := range statements {
			if _, te := parsePolicy("b", "f.cedar", st); te != nil && (te.msg == "" || te.line < st.line || te.line > lines || te.column < 1) {
				t.Errorf("%q: %+v", text, te)
			}
		}
	})
}

// Nesting is counted, and the message says so. Branches beside each other are not nested.
func TestNestingOfIf(t *testing.T) {
	policy := func(body string) string {
		return `@id("a") permit (principal, action, resource) when { ` + body + ` };`
	}
	nested := func(n int) string {
		return strings.Repeat("if principal.active then ", n) + "true" + strings.Repeat(" else false", n)
	}
	deep := "nested deeper than 100"
	for _, c := range []struct{ name, body, msg, hint string }{
		{"in then", nested(300), deep, "split the policy"},
		{"in else", strings.Repeat("if principal.a == 1 then true else ", 300) + "false", deep, "split the policy"},
		{"in the condition", strings.Repeat("if ", 300) + "true" + strings.Repeat(" then true else false", 300), deep, "split the policy"},
		{"in brackets", strings.Repeat("if true then (", 60) + "true" + strings.Repeat(") else false", 60), deep, "split the policy"},
		{"signs", strings.Repeat("!", 300) + "true", deep, "two of ! or - in a row are as good as none"},
		{"attributes", "principal" + strings.Repeat(" . a", 101), "more than 100 attributes in a row", "store the value nearer"},
		{"99 in then", nested(99), "", ""},
		{"beside each other", strings.Repeat("("+nested(2)+") && ", 200) + "true", "", ""},
		{"elements", "[" + strings.Repeat(nested(1)+", ", 200) + "true].contains(true)", "", ""},
		{"then and else", "if true then " + nested(60) + " else " + nested(60), "", ""},
		{"attributes apart", strings.Repeat("principal.active && ", 200) + "principal has active", "", ""},
	} {
		_, errs := split(policy(c.body), false)
		switch {
		case c.msg == "" && len(errs) > 0:
			t.Errorf("%s: %v", c.name, errs)
		case c.msg != "" && (len(errs) == 0 || errs[0].msg != c.msg || errs[0].hint != c.hint):
			t.Errorf("%s: %v", c.name, errs)
		}
	}
	if _, errs := split(policy(strings.Repeat("if principal.a == 1 then true else ", 300)+"false"), true); len(errs) > 0 {
		t.Errorf("published before: %v", errs)
	}
}

// A type that no schema declares is found in the schema.
func TestUndefinedTypeHasAPlace(t *testing.T) {
	for text, want := range map[string]string{
		"namespace A {\n  entity U in [Grp];\n}":                                                 "s:2:16: entity \"A::U\": undefined entity type \"Grp\"",
		"namespace A {\n  // Grp\n  entity U { Grp: String, g?: Set<Grp> };\n}":                  "s:3:35: ",
		"namespace A {\n  entity U { Grp: String,\n    g?: Set<Other::Grp> };\n}":                "s:3:13: ",
		"namespace A {\n  action Read appliesTo { principal: [Nobody], resource: [Nobody] };\n}": "s:2:39: ",
	} {
		_, findings := Compile([]Source{{Name: "a", SchemaFile: "s", Schema: text}}, nil)
		if len(findings) != 1 || !strings.HasPrefix(findings[0].String(), want) {
			t.Errorf("%s\n%v, want %s", text, findings, want)
		}
	}
}
