package engine

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/cedar-policy/cedar-go"
)

// valueTypes are the extension types, with texts that are values, that are at a
// limit, or that look like values.
var valueTypes = []struct {
	typ, fn string
	texts   string // separated by white space
}{
	{"datetime", "datetime", `
2024-02-29 2023-02-29 2100-02-29 2000-02-29 0000-02-29 0000-01-01 9999-12-31 10000-01-01 999-01-01 02024-01-01 2024-1-1
2024-00-01 2024-13-01 2024-01-00 2024-01-32 2024-04-31 2024/01/01 20240101 2024-01 2024 2024-01-01Z 2024-01-01T 2024-W01-1 2024-001
+999999999-12-31 -999999999-12-31 +000002024-01-01 -000002024-01-01 +2024-01-01 -2024-01-01 +292278994-08-17 +292278994-08-18
-292275055-05-16 +000009999-12-31T23:59:59Z -000000001-01-01 -000000000-01-01 +000000000-01-01 -001-01-01
2024-02-29T00:00:00Z 2024-02-29T00:00:00z 2024-02-29t00:00:00Z 2024-02-29T00:00:00 2024-02-29T00:00Z 2024-02-29T00Z
2024-02-29T24:00:00Z 2024-02-29T23:60:00Z 2024-02-29T23:59:60Z 2024-06-30T23:59:60Z 2024-02-29T23:59:59Z 2024-02-29T1:00:00Z
2024-02-29T00:00:00.0Z 2024-02-29T00:00:00.00Z 2024-02-29T00:00:00.000Z 2024-02-29T00:00:00.999Z 2024-02-29T00:00:00.0000Z
2024-02-29T00:00:00.Z 2024-02-29T00:00:00,000Z 2024-02-29T00:00:00.000 2024-02-29T00:00:00.+00Z 2024-02-29T00:00:00.-01Z
2024-02-29T00:00:00+0000 2024-02-29T00:00:00-0000 2024-02-29T00:00:00+2359 2024-02-29T00:00:00-2359 2024-02-29T00:00:00+2400
2024-02-29T00:00:00+0060 2024-02-29T00:00:00+01:00 2024-02-29T00:00:00+01 2024-02-29T00:00:00+1 2024-02-29T00:00:00+00000
2024-02-29T00:00:00.123+0130 2024-02-29T00:00:00.123-0130 2024-02-29T00:00:00Z+0100 2024-02-29T00:00:00ZZ 2024-02-29T00:00:00UTC
0000-01-01T00:00:00+2359 0000-01-01T00:00:00.000+0001 9999-12-31T23:59:59-2359 9999-12-31T23:59:59.999-0001 1969-12-31T23:59:59.999Z
٢٠٢٤-01-01 2024-01-01T٠0:00:00Z 2024‐01‐01 2O24-01-01 0x24-01-01 1_24-01-01 2024-0١-01 2024-+1-01 2024--1-01 now 0 1704067200000`},
	{"duration", "duration", `
1d 1h 1m 1s 1ms 1d2h3m4s5ms -1d2h3m4s5ms 0ms -0ms 0d 0001ms 00d 1d1d 1h1d 1ms1s 1m1ms 1s1m 1m1s 1ms1ms 1d1m 1D 1H 1MS 1Ms 1mS
1 d h ms - -- -d -ms --1d +1d 1.5h 1,5h 1e3ms 1w 1y 1us 1ns 1d- 1d-1h -1d-1h 1d+1h 1_000ms 0x1ms ٣ms １ms 1min 1sec 1hr P1D PT1H
9223372036854775807ms 9223372036854775808ms -9223372036854775807ms -9223372036854775808ms -9223372036854775809ms
-09223372036854775808ms 18446744073709551615ms 18446744073709551616ms 99999999999999999999999ms -99999999999999999999999ms
106751991167d 106751991168d -106751991167d -106751991168d 106751991167d7h12m55s807ms 106751991167d7h12m55s808ms
-106751991167d7h12m55s808ms -106751991167d7h12m55s809ms 9223372036854775s807ms 9223372036854775s808ms -9223372036854775s808ms
-9223372036854775s809ms 2562047788015h12m55s807ms -2562047788015h12m55s808ms 153722867280912m55s808ms -153722867280912m55s808ms
9223372036854775807d 9223372036854775808d 0d9223372036854775807ms -0d9223372036854775808ms -1ms9223372036854775807ms 0d0h0m0s0ms`},
	{"decimal", "decimal", `
0.0 -0.0 1.0 -1.0 +1.0 +0.0 -+1.0 +-1.0 1. .1 1 . -. -.1 1.-1 1.+1 --1.0 1..0 1.0.0 1,0 1.00000 1.0000 1.12345 1.99999 0.00001 0.0000
00001.0 -00001.0 0000000000000000000000001.0 1e3 1.0e3 1.e 1.f 0x1.0 1_0.0 1.0_0 ٣.0 1.٣ １.0 1.１ ∞ NaN inf -0.0001 0.9999
922337203685477.5807 922337203685477.5808 -922337203685477.5808 -922337203685477.5809 922337203685478.0 -922337203685478.0
922337203685477.58 922337203685477.6 -922337203685477.6 9223372036854775807.0 9223372036854775808.0 -9223372036854775808.0
-9223372036854775809.0 99999999999999999999999.9 1.65536 1.6553 0.0001 -922337203685477.0 12.5807 1/2 $1.00 1.0f`},
	{"ipaddr", "ip", `
0.0.0.0 255.255.255.255 256.0.0.0 1.2.3 1.2.3.4.5 1.2.3.4. .1.2.3.4 01.2.3.4 1.2.3.04 1.2.3.0x4 1.2.3.-4 1.2.3.+4 1..3.4 1.2.3.٤ 16909060
0.0.0.0/0 1.2.3.4/0 1.2.3.4/1 1.2.3.4/32 1.2.3.4/33 1.2.3.4/08 1.2.3.4/00 1.2.3.4/ 1.2.3.4/-1 1.2.3.4/+8 1.2.3.4/8/8 1.2.3.4/٨ 1.2.3.4/256
1.2.3.4/255.0.0.0 /8 / 1.2.3.4/1e1 1.2.3.4:80 1.2.3.4/8: 127.0.0.1 127.0.0.0/7 127.1 10.1 224.0.0.0/3 224.0.0.0/4 239.255.255.255
:: ::1 ::1/128 ::1/129 ::/0 ::/00 ::/-0 ::/ 1:: 1::2 1::2::3 ::: :1 1: :1: 1:2:3:4:5:6:7:8 1:2:3:4:5:6:7 1:2:3:4:5:6:7:8:9 1:2:3:4:5:6:7::
::2:3:4:5:6:7:8 1:2:3:4:5:6:7::8 1::3:4:5:6:7:8 ::1:2:3:4:5:6:7:8 1:2:3:4:5:6:7:8:: 0001::1 00001::1 12345::1 g::1 ABCD::ef aBcD::1
::ffff:1.2.3.4 ::1.2.3.4 1::1.2.3.4 1:2:3:4:5:6:1.2.3.4 ::ffff:102:304 ::ffff:102:304/96 ::ffff:102:304/128 ::ffff:0:0/95 64:ff9b::1.2.3.4
::ffff:7f00:1 ::1.2 1.2::3 :1.2.3.4 ::1%eth0 ::1%1 fe80::1%25eth0 ::1%/64 fe80::1%eth0/64 1.2.3.4%eth0 [::1] [::1]/64 [1.2.3.4] ff00::/8 ff00::/7
FF02::1 2001:db8::/32 2001:0db8:0000:0000:0000:0000:0000:0001 2001:0db8:0000:0000:0000:0000:0000:0001/128
0000:0000:0000:0000:0000:0000:0000:0000/000 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128 ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/0128 ::１ localhost 0`},
}

// drawText changes a text here and there, so that most come out as nearly a value.
func drawText(r *rand.Rand, texts []string) string {
	const alphabet = "0123456789012345678901234567890123456789--++..::/TZdhmsms abcdefx%_,[]٣１é"
	letters := []rune(alphabet)
	out := []rune(texts[r.IntN(len(texts))])
	kinds := 6
	if r.IntN(3) == 0 {
		kinds = 1
	}
	for range r.IntN(4) {
		i := r.IntN(len(out) + 1)
		switch j := min(len(out), i+1+r.IntN(3)); r.IntN(kinds) {
		case 0: // another digit
			if i < len(out) && out[i] >= '0' && out[i] <= '9' {
				out[i] = '0' + rune(r.IntN(10))
			}
		case 1: // some less
			out = append(out[:i:i], out[j:]...)
		case 2: // some twice
			out = append(out[:j:j], out[i:]...)
		case 3: // the end of another
			other := []rune(texts[r.IntN(len(texts))])
			out = append(out[:i:i], other[r.IntN(len(other)):]...)
		case 4: // another sign
			if i < len(out) {
				out[i] = letters[r.IntN(len(letters))]
			}
		default: // one more
			out = append(out[:i:i], append([]rune{letters[r.IntN(len(letters))]}, out[i:]...)...)
		}
	}
	return string(out)
}

const valuesSchema = `entity U { datetime?: datetime, duration?: duration, decimal?: decimal, ipaddr?: ipaddr };
action act appliesTo { principal: U, resource: U, context: { datetime?: datetime, duration?: duration, decimal?: decimal, ipaddr?: ipaddr } };
`

// quoteCedar quotes a text for a policy.
func quoteCedar(s string) string { return string(cedar.String(s).MarshalCedar()) }

// The texts of datetimes, durations, decimals and addresses, in policies, contexts
// and entities, are values to this engine and to the reference, and the same ones,
// or values to neither. What this engine writes, both read.
func TestDifferentialValues(t *testing.T) {
	seed := envUint(t, "CEDARPOST_SEED", rand.Uint64())
	cases := int(envUint(t, "CEDARPOST_DIFF_CASES", 250))
	t.Logf("CEDARPOST_SEED=%d", seed)
	r := rand.New(rand.NewPCG(seed, 2))
	ref := startReference(t, installReference(t))
	for _, vt := range valueTypes {
		t.Run(vt.typ, func(t *testing.T) {
			texts := strings.Fields(vt.texts)
			all := append([]string{"", " "}, texts...)
			for _, s := range texts[:10] {
				all = append(all, " "+s, s+" ", s+"\n", s+"\x01")
			}
			for range cases * 2 {
				all = append(all, drawText(r, texts))
			}
			d := &valueDiff{t: t, ref: ref, typ: vt.typ, fn: vt.fn}
			for len(all) > 0 {
				n := min(len(all), 400)
				d.compare(all[:n])
				all = all[n:]
				if t.Failed() {
					return
				}
			}
			t.Logf("%d texts: values to both %d, to neither %d", d.values+d.none, d.values, d.none)
			if d.values == 0 || d.none == 0 {
				t.Error("all of one kind were drawn")
			}
		})
	}
}

type valueDiff struct {
	t            *testing.T
	ref          *reference
	typ, fn      string
	values, none int
}

// compare compares what becomes of texts.
func (d *valueDiff) compare(texts []string) {
	t := d.t
	static := map[string]string{}
	src := Source{Name: corpusBundle, SchemaFile: "schema", Schema: valuesSchema, SkipForbidErrors: true}
	for i, s := range texts {
		// A text that is a value here must be the same value there.
		this := fmt.Sprintf("%s(%s)", d.fn, quoteCedar(s))
		other := this
		v, err := extensions[d.typ].parse(s)
		if err == nil {
			other = cedarValue(v)
			if back, err := extensions[d.typ].parse(Plain(v).(map[string]any)["__extn"].(map[string]any)["arg"].(string)); err != nil || !back.Equal(v) {
				t.Errorf("%q is written as %v, and read back as %v, %v", s, Plain(v), back, err)
			}
		}
		condition := fmt.Sprintf("%s == %s", this, other)
		if err == nil {
			switch v := v.(type) {
			case cedar.Datetime:
				condition += fmt.Sprintf(" && %s.durationSince(datetime(\"1970-01-01\")).toMilliseconds() == %d", this, v.Milliseconds())
			case cedar.Duration:
				condition += fmt.Sprintf(" && %s.toMilliseconds() == %d", this, v.ToMilliseconds())
			case cedar.IPAddr:
				condition += fmt.Sprintf(" && %s.isIpv4() == %v && %s.isLoopback() == %v && %s.isMulticast() == %v", this, v.IsIPv4(), this, v.IsLoopback(), this, v.IsMulticast())
			}
		}
		static[policyID(i)] = fmt.Sprintf("forbid (principal, action, resource) when { %s };", condition)
		src.Policies = append(src.Policies, PolicyText{File: policyID(i), Text: fmt.Sprintf("@id(%q) %s", policyID(i), static[policyID(i)])})
	}
	u := [2]string{"U", "a"}
	calls := []refCall{
		call("isAuthorized", text(map[string]any{
			"principal": spellUID(u), "action": spellUID([2]string{"Action", "act"}), "resource": spellUID(u), "context": map[string]any{},
			"entities": []any{}, "policies": map[string]any{"staticPolicies": static},
		})),
		call("validate", text(map[string]any{"schema": valuesSchema, "policies": map[string]any{"staticPolicies": static}})),
	}
	spelled := make([]any, len(texts)) // of each, long or short
	asEntity := map[int]int{}          // the number of the call for a text
	for i, s := range texts {
		spelled[i] = spell(diffExt{d.fn, s}, i/8%2 == 0)
		// The reference takes milliseconds to read an entity.
		if i%8 != 0 {
			continue
		}
		entity := map[string]any{"uid": spellUID(u), "attrs": map[string]any{d.typ: spelled[i]}, "parents": []any{}}
		asEntity[i] = len(calls)
		calls = append(calls, call("checkParseEntities", text(map[string]any{"entities": []any{entity}, "schema": valuesSchema})))
	}
	answers, err := d.ref.ask(calls...)
	if err != nil {
		t.Fatal(err)
	}
	const satisfied, failed = "satisfied", "failed"
	want := map[string]string{}
	for _, id := range answers[0].Response.Diagnostics.Reason {
		want[id] = satisfied
	}
	for _, e := range answers[0].Response.Diagnostics.Errors {
		want[e.PolicyID] = failed
	}
	refused := map[string]bool{}
	for _, e := range answers[1].ValidationErrors {
		refused[e.PolicyID] = true
	}

	// Publishing refuses what is none, and what was published in spite of that fails.
	_, findings := Compile([]Source{src}, nil)
	ours := map[string]bool{}
	for _, f := range findings {
		if !f.Warning {
			ours[f.File] = true
		}
	}
	set, findings := Load([]Source{src}, nil)
	if set == nil {
		t.Fatal(findings)
	}
	ask := Ask{Principal: cedarUIDOf(u), Action: cedar.NewEntityUID("Action", "act"), Resource: cedarUIDOf(u)}
	q, err := set.read(ask)
	if err != nil {
		t.Fatal(err)
	}
	res, err := decideFrom(set, q, nil)
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]string{}
	for _, p := range res.Policies {
		got[p.ID] = satisfied
	}
	for _, e := range res.Errors {
		got[e.Policy.ID] = failed
	}
	for i, s := range texts {
		id := policyID(i)
		isValue := want[id] == satisfied
		if isValue {
			d.values++
		} else {
			d.none++
		}
		if want[id] == "" || got[id] != want[id] {
			t.Errorf("%q: evaluated ours %q, reference %q\n%s", s, got[id], want[id], static[id])
		}
		if ours[id] != refused[id] || ours[id] == isValue {
			t.Errorf("%q: published ours refused %v, reference refused %v\n%s", s, ours[id], refused[id], static[id])
		}
		if n, asked := asEntity[i]; asked && answers[n].ok() != isValue {
			t.Errorf("%q: the reference evaluates it as %q, and says of it as an entity's attribute: %s", s, want[id], answers[n])
		}
		// Values of contexts and entities.
		attrs := map[string]any{d.typ: plainJSON(t, spelled[i])}
		asked := ask
		asked.Context = attrs
		if _, err := set.read(asked); (err == nil) != isValue {
			t.Errorf("%q in a context: %v", s, err)
		}
		if _, err := set.ReadEntity(RawEntity{UID: cedarUIDOf(u), Attrs: attrs}); (err == nil) != isValue {
			t.Errorf("%q of an entity: %v", s, err)
		}
	}
}

// plainJSON is a value as it comes out of JSON.
func plainJSON(t *testing.T, v any) any {
	t.Helper()
	var out any
	if err := json.Unmarshal(text(v), &out); err != nil {
		t.Fatal(err)
	}
	return out
}
