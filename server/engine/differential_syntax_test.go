package engine

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
)

const syntaxSchema = `entity G in [G];
entity E enum ["x", "y"];
entity Alone;
entity U in [G, E] { a: Long, b?: { c: Long, "if"?: Bool }, s: String, l: Set<Long>, "if": Bool } tags String;
action "g";
action "act" in ["g"] appliesTo { principal: [U], resource: [U], context: { a: Long, s: String } };
`

// Odd spellings of conditions, one on a line.
const syntaxConditions = `
!!!!true
!!!!!true
! ! ! ! !true
!!!!(!true)
!!!!!!!!true
1 != 2 && !!!!true
1 != !!!!!true
principal.if == !!!!true
principal.if == !!!!!true
----1 == 1
-----1 == -1
- - - - - 1 == -1
1 - ----1 == 2
1 - -----1 == 2
1-----1 == 2
1------1 == 2
(1)-----1 == 2
principal.a-----1 == 2
principal["a"] -----1 == 2
principal["a"] ------1 == 2
if true then ----1 == 1 else true
if true then -----1 == 1 else true
[----1].isEmpty()
[-----1].isEmpty()
{a: -----1} has a
----1 < -----1
2 * -----1 == -2
2 * ----1 == 2
"-----" == "!!!!!"
"a\"-----" like "*!!!!!*"
E::"x" in G::"a"
E::"x" in E::"x"
E::"x" in E::"y"
E::"x" in [G::"a"]
E::"x" in principal
E::"x" in [E::"y", E::"x"]
E::"x" is E in G::"a"
E::"x" is E in E::"x"
E::"x" has a
E::"z" in E::"x"
principal in E::"x"
principal in E::"z"
(if true then E::"x" else E::"y") in E::"y"
1 < 2 < 3
1 == 1 == true
(1 == 1) == true
1 != 2
{a: 1, a: 2} has a
{a: 1, "a": 2} has a
{a: 1,} has a
{} has a
{"a b": 1} has "a b"
{if: 1} has a
[1, 2,].isEmpty()
[1, 1].containsAll([1])
[].isEmpty()
foo(1)
principal.foo()
principal.isEmpty
ip().isIpv4()
ip("1.2.3.4", "1.2.3.4").isIpv4()
[1].contains()
[1].contains(1, 2)
isEmpty([1])
contains([1], 1)
decimal("1.0") < decimal("2.0")
context.if
principal.if
principal["if"]
principal has if
principal has "if"
principal has b.if
principal has b."if"
principal has "b".c
principal has b.c.d.e
principal has b && principal.b["if"]
principal.in == 1
principal.like == 1
principal.is == 1
principal.has == 1
principal.then == 1
principal.true == 1
principal.principal == 1
principal.permit == 1
principal has principal
principal has true
{true: 1}.true == 1
{permit: 1}.permit == 1
{principal: 1}.principal == 1
{in: 1}["in"] == 1
context.__cedar == 1
context["__cedar"] == 1
__cedar::X::"a" == principal
__x::X::"a" == principal
principal == ?principal
principal == ?resource
"\q" == "q"
"\u{110000}" == ""
"\u{d800}" == ""
"\u{}" == ""
"\u{1234567}" == ""
"\u0041" == "A"
"\x41" == "A"
"\x80" == ""
"\x4" == ""
"\'" == "'"
"\"" == ""
"\0\t\r\n\\" == ""
"\*" == "*"
"*" like "\*"
"*" like "\u{2a}"
"ab" like "a**"
"a\\b" like "a\\*"
"ab" like "a" "b"
"ab" like principal.s
"ab" like "\q"
'a' == "a"
9223372036854775807 == 1
9223372036854775808 == 1
-9223372036854775808 == 1
- 9223372036854775808 == 1
-(9223372036854775808) == 1
(-9223372036854775808) == 1
--9223372036854775808 == 1
-9223372036854775809 == 1
0 - 9223372036854775808 == 1
1 + -9223372036854775808 < 0
01 == 1
00 == 0
1_000 == 1
0x10 == 16
1.0 == 1
1e3 == 1000
1 - -1 == 2
1 --1 == 2
2 * -3 == -6
2 * 3 * 4 == 24
1 + 2 * 3 - 4 == 3
5 / 2 == 2
5 % 2 == 1
9223372036854775807 + 1 - 1 == 9223372036854775807
principal.a * 9223372036854775807 * 0 == 0
true && /* c */ true
true /* c
true && true || false && false
true || if true then false else true
if true then true else false || true
if true then true
if true { true } else { false }
(if true then 1 else 2) == 1
if if true then true else false then true else false
principal in principal in principal
principal in [principal]
principal in []
principal in [[principal]]
principal in [U::"a", G::"b"]
principal in G::"a" && true
principal is U in G::"a"
principal is U in [G::"a"]
principal is U in principal
principal is U in resource
principal is (U)
principal is U::"a"
principal is "U"
principal is U == true
principal is U is U
principal is Action
action is Action
action is Action in Action::"g"
action in Action::"g"
action in [Action::"g"]
action in [Action::"g", U::"a"]
action in principal
principal in action
action == Action::"nowhere"
Action::"act" in Action::"g"
action.a == 1
action has a
action.hasTag("a")
context.hasTag("a")
principal.hasTag("a") && principal.getTag("a") == "x"
principal.hasTag("a") && principal.getTag("b") == "x"
principal.hasTag(context.s) && principal.getTag(context.s) == "x"
principal.hasTag("a" ) && resource.getTag("a") == "x"
principal.hasTag(1)
U::"a".a == 1
U::"a"["a"] == 1
U :: "a" == principal
U::a == principal
::U::"a" == principal
"a".isEmpty()
(1).isEmpty()
1.isEmpty()
context[0] == 1
context["a"] == 1
context['a'] == 1
context[principal.s] == 1
context.a.b == 1
context
1
"true"
true,
true; true
{true}
(true)
((true))
()

true true
let x = 1
null == null
True
TRUE
principal.a > 1 and true
principal.a > 1 & true
not true
principal.a = 1
principal.a === 1
principal.a <> 1
principal <= resource
true < false
"a" < "b"
1 < "b"
1 < datetime("2024-01-01")
duration("1h") < datetime("2024-01-01")
principal == resource
principal == context
principal == 1
principal.s == 1
"a" == 1
[1] == ["a"]
{a: 1} == {a: "x"}
{a: 1} == {b: 1}
principal.l.contains("a")
principal.l.containsAll(["a"])
principal.l.containsAll([])
principal.l == []
[1, "a"].contains(1)
[1, true].contains(1)
[[1], []].isEmpty()
[{a: 1}, {a: 1, b: 2}].isEmpty()
[principal, G::"a"].isEmpty()
[U::"a", U::"b"].contains(principal)
"é" == "e\u{301}"
"é" like "?"
"𝄞" like "*"
ip("10.0.0.1") == ip("10.0.0.1/32")
ip("10.0.0.1/8") == ip("10.0.0.0/8")
ip("::1") == ip("0:0:0:0:0:0:0:1")
ip("::ffff:10.0.0.1") == ip("10.0.0.1")
ip("10.0.0.1/08").isIpv4()
ip("10.0.0.1/").isIpv4()
ip("10.0.0.1/-1").isIpv4()
ip("10.0.0.1/+8").isIpv4()
ip("::1%eth0").isIpv6()
ip("1::2::3").isIpv6()
ip("ABCD::1").isIpv6()
ip("127.0.0.1/8").isLoopback()
ip("127.0.0.0/7").isLoopback()
ip("224.0.0.0/3").isMulticast()
ip("10.0.0.0/8").isInRange(ip("10.0.0.0/9"))
ip("10.0.0.1").isInRange(ip("::/0"))
decimal("1.0") == decimal("1.00")
decimal("-0.0") == decimal("0.0")
decimal("1.") == decimal("1.0")
decimal(".1") == decimal("0.1")
decimal("1.-1") == decimal("1.1")
decimal("1.+1") == decimal("1.1")
decimal("--1.0") == decimal("1.0")
decimal("٣.0") == decimal("3.0")
decimal("1.٣") == decimal("1.3")
decimal("1_0.0") == decimal("10.0")
decimal("00001.0") == decimal("1.0")
decimal(1) == decimal("1.0")
decimal(principal.s) == decimal("1.0")
decimal("922337203685477.5807").lessThan(decimal("-922337203685477.5808"))
datetime("2024-02-29") == datetime("2024-02-29T00:00:00Z")
datetime("2024-02-29T00:00:00+0000") == datetime("2024-02-29")
datetime("2024-02-29T00:00:00+0100") < datetime("2024-02-29")
datetime("2024-02-29T00:00:00-0000") == datetime("2024-02-29")
datetime("2024-02-29T00:00:00+2359") < datetime("2024-02-29")
datetime("2024-02-29T00:00:00+2400") < datetime("2024-02-29")
datetime("2024-02-29T00:00:00+0060") < datetime("2024-02-29")
datetime("2024-02-29T00:00:00+01:00") < datetime("2024-02-29")
datetime("2024-02-29T00:00:00z") == datetime("2024-02-29")
datetime("2024-02-29t00:00:00Z") == datetime("2024-02-29")
datetime("2024-02-29 00:00:00Z") == datetime("2024-02-29")
datetime("2024-02-29T00:00:00.000Z") == datetime("2024-02-29")
datetime("2024-02-29T00:00:00.1234Z") == datetime("2024-02-29")
datetime("2024-02-29T00:00Z") == datetime("2024-02-29")
datetime("2024-02-29Z") == datetime("2024-02-29")
datetime("0000-01-01") < datetime("2024-02-29")
datetime("0000-02-29") < datetime("2024-02-29")
datetime("-001-01-01") < datetime("2024-02-29")
datetime("+2024-01-01") < datetime("2024-02-29")
datetime("2024-00-01") < datetime("2024-02-29")
datetime("2024-01-00") < datetime("2024-02-29")
datetime("2100-02-29") < datetime("2024-02-29")
datetime("2024-01-01T23:59:60Z") < datetime("2024-02-29")
datetime("2024-01-01").offset(duration("1d")) == datetime("2024-01-02")
datetime("9999-12-31T23:59:59.999Z").offset(duration("106751991167d")) < datetime("2024-01-01")
datetime("9999-12-31").offset(duration("9223372036854775807ms")) < datetime("2024-01-01")
datetime("2024-01-02").durationSince(datetime("2024-01-01")) == duration("1d")
datetime("2024-01-02") - datetime("2024-01-01") == duration("1d")
datetime("1969-12-31T23:59:59.999Z").toDate() == datetime("1969-12-31")
datetime("1969-12-31T23:59:59.999Z").toTime() == duration("23h59m59s999ms")
datetime("1969-12-31").toTime() == duration("0ms")
datetime("0001-01-01T00:00:00.001Z").toDate() == datetime("0001-01-01")
datetime("0001-01-01T00:00:00.001Z").toTime() == duration("1ms")
datetime("2024-02-29T13:00:00Z").toDate().toDate() == datetime("2024-02-29")
datetime("1950-02-28T13:00:00Z").toDate().offset(datetime("1950-02-28T13:00:00Z").toTime()) == datetime("1950-02-28T13:00:00Z")
duration("1d") == duration("24h")
duration("-1d") == duration("-24h")
duration("1h1h") == duration("2h")
duration("0ms") == duration("-0ms")
duration("0001ms") == duration("1ms")
duration("1d1ms") == duration("86400001ms")
duration("1 d") == duration("1d")
duration("1D") == duration("1d")
duration("1s1m") == duration("61s")
duration("9223372036854775807ms") > duration("1d")
duration("9223372036854775808ms") > duration("1d")
duration("106751991167d7h12m55s808ms") > duration("1d")
duration("٣ms") == duration("3ms")
duration("1.5h") == duration("90m")
duration("-90m").toHours() == -1
duration("-9223372036854775808ms").toMilliseconds() == -9223372036854775808
duration("-9223372036854775808ms").toSeconds() == -9223372036854775
duration("-9223372036854775808ms").toDays() == -106751991167
duration("-9223372036854775808ms") < duration("-9223372036854775807ms")
duration("-9223372036854775808ms") == duration("-106751991167d7h12m55s808ms")
[duration("-9223372036854775808ms"), duration("0ms")].contains(duration("-106751991167d7h12m55s808ms"))
datetime("1970-01-01").offset(duration("-9223372036854775808ms")) < datetime("0000-01-01")
datetime("1969-12-31").offset(duration("-9223372036854775808ms")) < datetime("0000-01-01")
datetime("9999-12-31").offset(duration("-9223372036854775808ms")).durationSince(datetime("1970-01-01")) < duration("0ms")
datetime("1970-01-01").offset(duration("-9223372036854775808ms")).durationSince(datetime("1970-01-02")) < duration("0ms")
datetime("1970-01-01").durationSince(datetime("1970-01-01").offset(duration("-9223372036854775808ms"))) < duration("0ms")
datetime("+999999999-12-31") < datetime("2024-01-01")
datetime("+000002024-01-01") == datetime("2024-01-01")
datetime("9999-12-31T23:59:59-2359") > datetime("9999-12-31T23:59:59Z")
datetime("0000-01-01T00:00:00+2359") < datetime("0000-01-01")
datetime("9999-12-31T23:59:59-2359").toDate() == datetime("9999-12-31").offset(duration("1d"))
duration("-1ms").toSeconds() == 0
duration("1d").toMilliseconds() == 86400000
`

// Odd policies, in full.
var syntaxPolicies = []string{
	`permit (principal, action, resource)`,
	`permit (principal, action, resource);;`,
	`permit (principal, action, resource); permit (principal, action, resource);`,
	`permit (principal, action, resource,);`,
	`permit (principal, action);`,
	`permit (action, principal, resource);`,
	`permit (principal, action, resource, context);`,
	`Permit (principal, action, resource);`,
	`permit(principal,action,resource)when{true}unless{false};`,
	`permit (principal, action, resource) when true;`,
	`permit (principal, action, resource) when {};`,
	`permit (principal, action, resource) if { true };`,
	`permit (principal, action, resource) advice { true };`,
	`permit (principal == U::"a", action == Action::"act", resource);`,
	`permit (U::"a" == principal, action, resource);`,
	`permit (principal == "a", action, resource);`,
	`permit (principal != U::"a", action, resource);`,
	`permit (principal in [U::"a"], action, resource);`,
	`permit (principal in G::"a", action in [], resource);`,
	`permit (principal, action == [Action::"act"], resource);`,
	`permit (principal, action in [Action::"act",], resource);`,
	`permit (principal, action is Action, resource);`,
	`permit (principal is U in [G::"a"], action, resource);`,
	`permit (principal is Nowhere, action, resource);`,
	`permit (principal is U in Nowhere::"a", action, resource);`,
	`permit (principal == ?principal, action, resource);`,
	`permit (principal in ?principal, action, resource == ?resource);`,
	`permit (principal: U, action, resource);`,
	`permit (principal is Alone, action, resource);`,
	`forbid (principal == Alone::"a", action, resource);`,
	`permit (principal is E, action, resource);`,
	`permit (principal == E::"x", action, resource);`,
	`permit (principal == E::"z", action, resource);`,
	`permit (principal in E::"x", action, resource);`,
	`permit (principal is G in E::"x", action, resource);`,
	`permit (principal is U in Alone::"x", action, resource);`,
	`permit (principal in Action::"g", action, resource);`,
	`permit (principal is Alone, action, resource) when { principal.nothing };`,
	`permit (principal is Alone, action, resource) when { 1 + "a" == [] };`,
	`permit (principal is Alone, action, resource) when { 1 };`,
	`permit (principal is Alone, action, resource) when { principal == Nowhere::"a" };`,
	`permit (principal is Alone, action, resource) when { principal is Nowhere };`,
	`permit (principal is Alone, action, resource) when { principal == E::"z" };`,
	`permit (principal is Alone, action, resource) when { action == Action::"nowhere" };`,
	`permit (principal is Alone, action, resource) when { [Nowhere::"a"] == [] };`,
	`permit (principal is Alone, action, resource) when { ip("x") == decimal("y") };`,
	`permit (principal is Alone, action, resource) when { datetime("+000002024-01-01") == decimal("+1.0") };`,
	`permit (principal is Alone, action, resource) when { 1 < datetime("2024-01-01") };`,
	`permit (principal is Alone, action, resource) when { "ab" like "a\u{2a}" };`,
	`permit (principal is Alone, action in [], resource);`,
	`permit (principal is Alone, action == Action::"nowhere", resource);`,
	`permit (principal is Alone, action == Action::"g", resource);`,
	"permit (principal, action, resource) when { !!!! // a comment\n !true };",
	"permit (principal, action, resource) when { !!! // a comment !!!\n !true };",
	`permit (principal : U, action: Action, resource: U);`,
	`permit (principal is Action, action, resource);`,
	`permit (principal == principal, action, resource);`,
	`permit (principal == resource, action, resource);`,
	`permit (principal, action, resource in principal);`,
	`@a("b") permit (principal, action, resource);`,
	`@a permit (principal, action, resource);`,
	`@a() permit (principal, action, resource);`,
	`@a("b", "c") permit (principal, action, resource);`,
	`@a("b") @a("c") permit (principal, action, resource);`,
	`@a("b") @b("b") permit (principal, action, resource);`,
	`@if("b") permit (principal, action, resource);`,
	`@"a"("b") permit (principal, action, resource);`,
	`@a(b) permit (principal, action, resource);`,
	`@a("\q") permit (principal, action, resource);`,
	`@a("\x41") permit (principal, action, resource);`,
	"// comment\npermit (principal, action, resource); // comment",
	`/* comment */ permit (principal, action, resource);`,
	"\ufeffpermit (principal, action, resource);",
	"permit (principal, action, resource) when { \"a\tb\" == \"\" };",
	"permit (principal, action, resource) when { \"\x7f\x01\" == \"\" };",
	"permit (principal, action, resource) when { principal.é == 1 };",
	`forbid (principal, action, resource);`,
	`forbid (principal, action == Action::"g", resource);`,
	`forbid (principal, action in Action::"g", resource) when { false };`,
	`forbid (principal, action in Action::"nowhere", resource);`,
	`permit (principal, action, resource) when { true } when { true } unless { false } unless { false };`,
}

// syntaxGaps are the spellings that only one side takes, with what keeps it from
// doing harm.
var syntaxGaps = map[string]string{
	`permit (principal, action, resource) when { !-1 == 1 };`:            "refused as of a wrong type, which is so; the reference does not parse it",
	`permit (principal, action == U::"act", resource);`:                  "refused as of an unknown action; the reference does not parse it",
	"permit\u00a0(principal, action, resource);":                         "refused; the reference takes any white space of Unicode",
	"permit (principal, action, resource) when { \"a\nb\" == \"\" };":    "refused; the reference takes a line break in a string",
	`forbid (principal, action, resource) when { "ab" like "a\u{2a}" };`: "the reference takes an escaped * for a wildcard, cedar-go for the sign",
	`forbid (principal, action, resource) when { "ab" like "a\x2a" };`:   "the reference takes an escaped * for a wildcard, cedar-go for the sign",
}

// Odd spellings mean the same to this engine and to the reference, or nothing to
// both.
func TestDifferentialSyntax(t *testing.T) {
	c := diffCase{schema: syntaxSchema}
	// Forbids: those that are satisfied are all among the reasons.
	for line := range strings.SplitSeq(strings.TrimPrefix(syntaxConditions, "\n"), "\n") {
		c.policies = append(c.policies, fmt.Sprintf("forbid (principal, action, resource) when { %s };", line))
	}
	c.policies = append(c.policies, syntaxPolicies...)
	u := func(id string) [2]string { return [2]string{"U", id} }
	n := func(s string) any { return json.Number(s) }
	attrs := map[string]any{"a": n("1"), "b": map[string]any{"c": n("1")}, "s": "a", "l": []any{n("1"), n("2")}, "if": true}
	c.entities = []diffEntity{
		{typ: "U", id: "a", attrs: attrs, tags: map[string]any{"a": "x"}, parents: [][2]string{{"G", "a"}}},
		{typ: "U", id: "b", attrs: map[string]any{"a": n("-5"), "s": "1.0", "l": []any{}, "if": false}, tags: map[string]any{}},
	}
	for _, p := range []string{"a", "b", "nobody"} {
		c.requests = append(c.requests, diffRequest{u(p), [2]string{"Action", "act"}, u("a"), map[string]any{"a": n("1"), "s": "a"}})
	}
	count := &tally{counts: map[string]int{}}
	ref := startReference(t, installReference(t))
	d := &diff{count: count, ref: ref, c: c}
	if err := d.run(); err != nil {
		t.Error(err)
	}
	for _, f := range count.failed {
		t.Error(f)
	}
	for policy, why := range syntaxGaps {
		count := &tally{counts: map[string]int{}}
		d := &diff{count: count, ref: ref, c: c}
		d.c.policies = []string{policy}
		if err := d.run(); err != nil {
			t.Error(err)
		}
		if len(count.failed) == 0 {
			t.Errorf("agreed by now, so it is no gap: %s (%s)", policy, why)
		}
	}
}
