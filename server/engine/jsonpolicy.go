package engine

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/ast"
	xast "github.com/cedar-policy/cedar-go/x/exp/ast"
)

// This file reads policies in Cedar's JSON format (https://docs.cedarpolicy.com/policies/json-format.html).
// They become Cedar text here, so that what is checked, stored, recorded and shown is the same for both
// forms. The text is parsed again and compared with what the JSON says; a policy whose text says something
// else is refused.

const (
	// MaxPolicyJSONBytes caps one policy in JSON. Its text is held to [MaxPolicyBytes] besides.
	MaxPolicyJSONBytes = 1 << 20
	// MaxJSONNesting caps the nesting of policies and schemas in JSON. An operator takes two levels, so a
	// chain of ||, which is flat as text, may have about 240 parts.
	MaxJSONNesting = 500
)

// jsonError is a problem in a JSON text, at a byte of it.
type jsonError struct {
	at        int
	msg, hint string
}

// jsonMember is a member of a JSON object: its key, and its value as text that begins at a byte.
type jsonMember struct {
	key, text string
	at        int
}

// policySetParts are the members of a policy set.
var policySetParts = []string{"staticPolicies", "templates", "templateLinks"}

// splitJSON makes statements of the policies in a text: one policy, or a policy set. Their places are those
// of the policies in the JSON. It stops early if stopped returns true.
func splitJSON(src string, stopped func() bool) (out []statement, errs []textError) {
	lines := lineCounter{text: src, line: 1, column: 1}
	fail := func(e *jsonError) {
		line, column := lines.at(e.at)
		errs = append(errs, textError{line, column, e.msg, e.hint})
	}
	list, err := policiesInJSON(src)
	if err != nil {
		fail(err)
		return nil, errs
	}
	for _, m := range list {
		if stopped() {
			break
		}
		line, column := lines.at(m.at)
		text, err := policyFromJSON(m.text, m.key)
		if err != nil {
			err.at += m.at
			fail(err)
			continue
		}
		found, bad := split(text, false)
		for _, e := range bad {
			errs = append(errs, textError{line, column, e.msg, e.hint})
		}
		for _, st := range found {
			out = append(out, statement{st.text, line, column})
		}
	}
	return out, errs
}

// policiesInJSON finds the policies in a JSON text. The key of a policy is "" if it stands alone.
func policiesInJSON(src string) ([]jsonMember, *jsonError) {
	if err := checkJSON(src); err != nil {
		return nil, err
	}
	start := jsonSpace(src, 0)
	top, err := jsonMembers(src, start, "a policy or a policy set")
	if err != nil {
		return nil, err
	}
	of := func(parts []string) (jsonMember, bool) {
		i := slices.IndexFunc(top, func(m jsonMember) bool { return slices.Contains(parts, m.key) })
		if i < 0 {
			return jsonMember{}, false
		}
		return top[i], true
	}
	first, set := of(policySetParts)
	other, one := of([]string{"effect", "principal", "action", "resource", "conditions", "annotations"})
	switch {
	case set && one:
		return nil, &jsonError{at: max(first.at, other.at), msg: fmt.Sprintf("has members of a policy (%s) and of a policy set (%s)", other.key, first.key), hint: "put the policy into staticPolicies"}
	case one:
		return []jsonMember{{text: src[start:], at: start}}, nil
	case !set:
		return nil, &jsonError{at: start, msg: "is neither a policy nor a policy set", hint: `a policy has an "effect", a policy set has "staticPolicies"`}
	}
	var policies []jsonMember
	found := false
	for _, m := range top {
		switch m.key {
		case "staticPolicies":
			found = true
			if policies, err = jsonMembers(src, m.at, "staticPolicies"); err != nil {
				return nil, err
			}
		case "templates", "templateLinks":
			if empty := map[string]string{"templates": "{}", "templateLinks": "[]"}[m.key]; strings.Join(strings.Fields(m.text), "") != empty {
				return nil, &jsonError{at: m.at, msg: m.key + " is not empty, and templates are not supported", hint: "write each policy out in staticPolicies"}
			}
		default:
			return nil, &jsonError{at: m.at, msg: fmt.Sprintf("unknown member %s", quote(m.key)), hint: "a policy set has " + strings.Join(policySetParts, ", ")}
		}
	}
	if !found {
		return nil, &jsonError{at: start, msg: "has no staticPolicies", hint: `write "staticPolicies": {} in a set without policies`}
	}
	return policies, nil
}

// positional matches the keys that Cedar's tools give to policies without a name: they count them.
var positional = regexp.MustCompile(`^policy[0-9]+$`)

// policyFromJSON returns the Cedar text of a policy in JSON. key is its key in staticPolicies, "" if it stands
// alone. The text has an annotation id, and is the same at each call.
func policyFromJSON(src, key string) (string, *jsonError) {
	if len(src) > MaxPolicyJSONBytes {
		return "", &jsonError{msg: fmt.Sprintf("policy of %d bytes of JSON, the limit is %d", len(src), MaxPolicyJSONBytes), hint: "put the members of a long list into a group entity, and ask with in; or split the policy"}
	}
	var p cedar.Policy
	if err := p.UnmarshalJSON([]byte(src)); err != nil {
		return "", explainJSON(src, err)
	}
	tree, err := readTree([]byte(src))
	if err != nil {
		return "", &jsonError{msg: err.Error()}
	}
	if path, msg := oddJSON(tree, ""); msg != "" {
		return "", &jsonError{at: jsonPlace(src, path), msg: msg}
	}
	if path, msg := oddScopes(tree); msg != "" {
		return "", &jsonError{at: jsonPlace(src, path), msg: msg}
	}
	source := (*xast.Policy)(p.AST())
	if err := nameFromKey(source, key); err != nil {
		return "", err
	}
	inOrder(source)
	named := cedar.NewPolicyFromAST((*ast.Policy)(source))
	text := named.MarshalCedar()
	if !sameMeaning(named, text) {
		return "", &jsonError{msg: "cannot be written as Cedar text", hint: "look at its names of types, entities and attributes"}
	}
	return string(text), nil
}

// nameFromKey makes the key of a policy in staticPolicies its id. An annotation id goes before a key that
// counts policies, as in Cedar's command line. Keys that count are no ids: a policy that is put before
// others would take their names over, in the log, too.
func nameFromKey(p *xast.Policy, key string) *jsonError {
	i := slices.IndexFunc(p.Annotations, func(a xast.AnnotationType) bool { return a.Key == "id" && a.Value != "" })
	switch {
	case key == "" && i < 0:
		return &jsonError{msg: "policy without an id", hint: `give each policy a name of its own: "annotations": {"id": "…"}`}
	case i < 0 && positional.MatchString(key):
		return &jsonError{msg: fmt.Sprintf("policy without an id: its key %s only counts the policies", quote(key)), hint: `give it a name of its own: "annotations": {"id": "…"}`}
	case i < 0:
		p.Annotations = slices.DeleteFunc(p.Annotations, func(a xast.AnnotationType) bool { return a.Key == "id" })
		p.Annotations = append(p.Annotations, xast.AnnotationType{Key: "id", Value: cedar.String(key)})
	case key != "" && string(p.Annotations[i].Value) != key && !positional.MatchString(key):
		return &jsonError{msg: fmt.Sprintf("its key is %s and its annotation id %s", quote(key), quote(string(p.Annotations[i].Value))), hint: "make the two equal, or leave the annotation out"}
	}
	return nil
}

// inOrder puts annotations and the members of records in the order of their names: JSON objects have no
// order. Cedar evaluates the members of a record in this order.
func inOrder(p *xast.Policy) {
	slices.SortFunc(p.Annotations, func(a, b xast.AnnotationType) int { return strings.Compare(string(a.Key), string(b.Key)) })
	for _, c := range p.Conditions {
		xast.Inspect(xast.NewNode(c.Body), func(n xast.IsNode) bool {
			if r, ok := n.(xast.NodeTypeRecord); ok {
				slices.SortFunc(r.Elements, func(a, b xast.RecordElementNode) int { return strings.Compare(string(a.Key), string(b.Key)) })
			}
			return true
		})
	}
}

// sameMeaning reports whether a text is one policy that says what a policy says.
func sameMeaning(p *cedar.Policy, text []byte) bool {
	list, err := cedar.NewPolicyListFromBytes("", text)
	if err != nil || len(list) != 1 {
		return false
	}
	var trees [2]any
	for i, q := range []*cedar.Policy{p, list[0]} {
		written, err := q.MarshalJSON()
		if err != nil {
			return false
		}
		tree, err := readTree(written)
		if err != nil {
			return false
		}
		policy, _ := tree.(map[string]any)
		conditions, _ := policy["conditions"].([]any)
		for _, c := range conditions {
			if c, ok := c.(map[string]any); ok {
				c["body"] = expressionWritten(c["body"])
			}
		}
		trees[i] = tree
	}
	return reflect.DeepEqual(trees[0], trees[1])
}

// expressionWritten writes values out, as they are in text: {"Value": [1]} as {"Set": [{"Value": 1}]}. The
// elements of sets are sorted.
func expressionWritten(v any) any {
	m, _ := v.(map[string]any)
	for op, arg := range m { // one
		switch arg := arg.(type) {
		case []any:
			if op == "Value" {
				return valueWritten(arg)
			}
			list := make([]any, len(arg))
			for i := range arg {
				list[i] = expressionWritten(arg[i])
			}
			if op == "Set" {
				sortTrees(list)
			}
			return map[string]any{op: list}
		case map[string]any:
			if op == "Value" {
				return valueWritten(arg)
			}
			parts := make(map[string]any, len(arg))
			for name, part := range arg {
				if _, expression := part.(map[string]any); expression {
					part = expressionWritten(part)
				}
				parts[name] = part
			}
			return map[string]any{op: parts}
		}
	}
	return v
}

func valueWritten(v any) any {
	switch v := v.(type) {
	case []any:
		list := make([]any, len(v))
		for i := range v {
			list[i] = valueWritten(v[i])
		}
		sortTrees(list)
		return map[string]any{"Set": list}
	case map[string]any:
		if call, ok := v["__extn"].(map[string]any); ok {
			return map[string]any{fmt.Sprint(call["fn"]): []any{map[string]any{"Value": call["arg"]}}}
		}
		if _, entity := v["__entity"]; entity {
			break
		}
		members := make(map[string]any, len(v))
		for name, member := range v {
			members[name] = valueWritten(member)
		}
		return map[string]any{"Record": members}
	}
	return map[string]any{"Value": v}
}

func sortTrees(list []any) {
	text := func(v any) string {
		b, _ := json.Marshal(v)
		return string(b)
	}
	slices.SortFunc(list, func(a, b any) int { return strings.Compare(text(a), text(b)) })
}

// oddJSON finds what cedar-go accepts and leaves out: null, and other members beside those of an entity or
// an extension value. It returns the path of the value, and "" as msg if there is none.
func oddJSON(v any, path string) (at, msg string) {
	switch v := v.(type) {
	case nil:
		if !strings.HasPrefix(path, "/annotations/") { // there, it is an annotation without a value
			return path, "null says nothing here"
		}
	case []any:
		for i := range v {
			if at, msg = oddJSON(v[i], fmt.Sprintf("%s/%d", path, i)); msg != "" {
				return at, msg
			}
		}
	case map[string]any:
		for escape, parts := range map[string][]string{"__entity": {"id", "type"}, "__extn": {"arg", "fn"}} {
			if inner, there := v[escape]; there {
				if m, _ := inner.(map[string]any); len(v) > 1 || !slices.Equal(sortedKeys(m), parts) {
					return path, fmt.Sprintf("%s stands alone, and has %s and %s", escape, parts[1], parts[0])
				}
			}
		}
		for _, name := range sortedKeys(v) {
			if at, msg = oddJSON(v[name], path+"/"+pointerEscape.Replace(name)); msg != "" {
				return at, msg
			}
		}
	}
	return "", ""
}

// scopeForms are the members of each kind of scope.
var scopeForms = map[string][]string{
	"All": {"op"}, "==": {"entity op"}, "in": {"entity op", "entities op"}, "is": {"entity_type op", "entity_type in op"},
}

// oddScopes finds members of scopes that cedar-go leaves out, as the entity of {"op": "All", "entity": …}.
func oddScopes(tree any) (at, msg string) {
	policy, _ := tree.(map[string]any)
	for _, part := range []string{"principal", "action", "resource"} {
		scope, _ := policy[part].(map[string]any)
		op, _ := scope["op"].(string)
		if members := strings.Join(slices.Sorted(maps.Keys(scope)), " "); !slices.Contains(scopeForms[op], orderOp(members)) {
			return "/" + part, fmt.Sprintf("a scope of %s cannot have these members: %s", quote(op), strings.ReplaceAll(members, " ", ", "))
		}
		entities, _ := scope["entities"].([]any)
		in, _ := scope["in"].(map[string]any)
		for _, e := range append(entities, scope["entity"], in["entity"]) {
			if m, ok := e.(map[string]any); ok && m["__entity"] == nil && !slices.Equal(sortedKeys(m), []string{"id", "type"}) {
				return "/" + part, "an entity has type and id, and nothing else"
			}
		}
	}
	return "", ""
}

// orderOp puts op to the end of sorted names.
func orderOp(names string) string {
	list := slices.DeleteFunc(strings.Fields(names), func(s string) bool { return s == "op" })
	return strings.Join(append(list, "op"), " ")
}

// explainJSON returns the error for an error of cedar-go's JSON reader.
func explainJSON(src string, err error) *jsonError {
	msg := strings.TrimPrefix(err.Error(), "error unmarshalling json: ")
	e := &jsonError{}
	path, shown := "", ""                                   // the JSON pointer of the value at fault, and as it is shown
	if m := inNamespace.FindStringSubmatch(msg); m != nil { // of a schema: the pointer begins in the namespace
		if name, err := strconv.Unquote(m[1]); err == nil {
			path, shown, msg = "/"+pointerEscape.Replace(name), "/"+strings.Trim(m[1], `"`), strings.TrimPrefix(msg, m[0])
		}
	}
	if m := withinPath.FindStringSubmatch(msg); m != nil {
		if pointer, err := strconv.Unquote(m[1]); err == nil {
			path += pointer
		}
		shown, msg = shown+strings.Trim(m[1], `"`), strings.Replace(msg, m[0], "", 1)
	}
	if shown != "" {
		e.at = jsonPlace(src, path)
		shown += ": "
	}
	msg = afterOffset.ReplaceAllString(msg, "")
	if _, inner, ok := strings.Cut(msg, "error decoding json: "); ok {
		msg = inner
	}
	if m := goType.FindStringSubmatch(msg); m != nil {
		if msg = m[2]; msg == "" {
			msg = "unexpected " + cmp.Or(m[1], "value")
		}
	}
	msg = strings.TrimPrefix(strings.TrimPrefix(msg, "jsontext: "), "json: ")
	msg, _, _ = strings.Cut(msg, ": jsontext.")
	msg = strings.NewReplacer("object member name", "member", "object member", "member", "`", "").Replace(msg)
	e.msg = shorten(shown + msg)
	if strings.Contains(strings.ToLower(e.msg), "slot") {
		e.hint = "a policy with a slot is a template, and templates are not supported"
	}
	return e
}

var (
	inNamespace = regexp.MustCompile(`^namespace ("(?:[^"\\]|\\.)*"): `)
	withinPath  = regexp.MustCompile(` within ("(?:[^"\\]|\\.)*")`)
	afterOffset = regexp.MustCompile(` after offset [0-9]+`)
	// goType matches errors that name a type of Go. The library says "cannot" in one process and "unable to" in another.
	goType = regexp.MustCompile(`^json: (?:cannot|unable to) unmarshal ?((?:JSON [a-z]+)?).*?(?:into|from) Go [^ :]+:? ?(.*)$`)
)

// checkJSON refuses text that is not one JSON value, and one that is nested too deep.
func checkJSON(src string) *jsonError {
	if !utf8.ValidString(src) {
		return &jsonError{msg: "not valid UTF-8"}
	}
	depth, inString := 0, false
	for i := 0; i < len(src); i++ {
		switch c := src[i]; {
		case inString && c == '\\':
			i++
		case c == '"':
			inString = !inString
		case inString:
		case c == '{' || c == '[':
			if depth++; depth > MaxJSONNesting {
				return &jsonError{at: i, msg: fmt.Sprintf("nested deeper than %d", MaxJSONNesting), hint: "split the policy, or write it as Cedar text, where a chain of && or || is not nested"}
			}
		case c == '}' || c == ']':
			depth--
		}
	}
	var whole json.RawMessage
	if err := json.Unmarshal([]byte(src), &whole); err != nil {
		e := &jsonError{msg: "is not valid JSON: " + err.Error()}
		if syntax, ok := errors.AsType[*json.SyntaxError](err); ok {
			e.at = max(int(syntax.Offset)-1, 0)
		}
		return e
	}
	return nil
}

// jsonMembers returns the members of the object that begins at a byte of a valid JSON text. A key that
// stands twice is an error.
func jsonMembers(src string, start int, what string) (list []jsonMember, _ *jsonError) {
	dec := json.NewDecoder(strings.NewReader(src[start:]))
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return nil, &jsonError{at: start, msg: what + " must be a JSON object"}
	}
	seen := map[string]bool{}
	for dec.More() {
		t, err := dec.Token()
		if err != nil {
			return nil, &jsonError{at: start, msg: err.Error()}
		}
		key, _ := t.(string)
		at := jsonSpace(src, start+int(dec.InputOffset()))
		var value json.RawMessage
		if err := dec.Decode(&value); err != nil {
			return nil, &jsonError{at: at, msg: err.Error()}
		}
		if seen[key] {
			return nil, &jsonError{at: at, msg: fmt.Sprintf("member %s stands twice", quote(key))}
		}
		seen[key] = true
		list = append(list, jsonMember{key: key, text: src[at : start+int(dec.InputOffset())], at: at})
	}
	return list, nil
}

// jsonSpace returns the first byte from a place on that is no space and no colon.
func jsonSpace(src string, at int) int {
	for at < len(src) && strings.IndexByte(" \t\r\n:", src[at]) >= 0 {
		at++
	}
	return at
}

var (
	pointerEscape   = strings.NewReplacer("~", "~0", "/", "~1")
	pointerUnescape = strings.NewReplacer("~1", "/", "~0", "~")
)

// jsonPlace returns the byte where the value of a JSON pointer (RFC 6901) begins, or of the last value on the
// way to it that is there.
func jsonPlace(src, pointer string) int {
	at := jsonSpace(src, 0)
	for _, name := range strings.Split(strings.TrimPrefix(pointer, "/"), "/") {
		dec := json.NewDecoder(strings.NewReader(src[at:]))
		t, err := dec.Token()
		if err != nil || t != json.Delim('{') && t != json.Delim('[') {
			return at
		}
		next := -1
		for i := 0; dec.More() && next < 0; i++ {
			here := fmt.Sprint(i)
			if t == json.Delim('{') {
				key, err := dec.Token()
				if err != nil {
					return at
				}
				here, _ = key.(string)
			}
			start := at + int(dec.InputOffset())
			for start < len(src) && strings.IndexByte(" \t\r\n:,", src[start]) >= 0 {
				start++
			}
			if here == pointerUnescape.Replace(name) {
				next = start
				break
			}
			var skipped json.RawMessage
			if dec.Decode(&skipped) != nil {
				return at
			}
		}
		if next < 0 {
			return at
		}
		at = next
	}
	return at
}

// readTree reads a JSON value; numbers stay as they are written.
func readTree(src []byte) (tree any, err error) {
	dec := json.NewDecoder(strings.NewReader(string(src)))
	dec.UseNumber()
	err = dec.Decode(&tree)
	return tree, err
}

// lineCounter finds the lines of places in a text. It is fast if the places are in order.
type lineCounter struct {
	text         string
	done         int
	line, column int
}

// at returns the line and column of a byte, from 1.
func (l *lineCounter) at(offset int) (line, column int) {
	offset = min(offset, len(l.text))
	if offset < l.done {
		*l = lineCounter{text: l.text, line: 1, column: 1}
	}
	for _, r := range l.text[l.done:offset] {
		if l.column++; r == '\n' {
			l.line, l.column = l.line+1, 1
		}
	}
	l.done = offset
	return l.line, l.column
}
