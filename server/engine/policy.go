package engine

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/cedar-policy/cedar-go"
	"github.com/cedar-policy/cedar-go/ast"
	xast "github.com/cedar-policy/cedar-go/x/exp/ast"
)

// Caps on policy text. cedar-go's parser, compiler and evaluator recurse without
// a limit, and a stack overflow cannot be recovered, so depth is bounded before
// a byte is parsed.
const (
	MaxPolicyBytes = 64 << 10
	MaxNesting     = 100
	// maxChain is how many attributes in a row an expression may have, as in a.b.c. cedar-go
	// compiles "x has a.b.c" to a list of all beginnings, so the memory grows with the square.
	maxChain = 100
)

// policy is one compiled policy, with what is known from its syntax tree alone. It is
// immutable, and shared by all Sets that have the same text.
type policy struct {
	ref          PolicyRef
	name         cedar.PolicyID
	file         string
	line, column int
	text         string

	source     *xast.Policy  // as written
	compiled   *cedar.Policy // as evaluated
	inOrder    *cedar.Policy // see recordsInOrder
	orderDepth int           // how deep records whose order matters are nested
	forbid     bool
	obligation string
	advice     string

	principal, resource scope
	action              actionScope

	// conjuncts are the top-level conjuncts of a permit that do not mention the
	// resource, each compiled as a policy of its own.
	conjuncts []*cedar.Policy
	// conjunctText is the text of conjuncts. Permits with equal texts are shut for the
	// same principals.
	conjunctText string
	// within is the X of a conjunct "principal in X". The permit is shut for principals
	// that are not in X.
	within *cedar.EntityUID
	// anyResource says that the policy does not depend on the resource: its scope names
	// at most a type, and no condition mentions the resource.
	anyResource bool
	// field says how the policy uses context.field.
	field fieldUse
	// level is how deep the policy dereferences entities, and cost is an upper bound of the
	// steps of one evaluation. They are computed with the schema.
	level int
	cost  int64
}

// scope is the part of a policy's scope that concerns its principal or resource.
type scope struct {
	hasType bool
	typ     cedar.EntityType
	hasUID  bool
	uid     cedar.EntityUID
	in      bool
}

func (s scope) couldBe(t cedar.EntityType) bool { return !s.hasType || s.typ == t }

// joinsAll reports whether every question about one of its actions evaluates the policy.
func (p *policy) joinsAll() bool {
	return !p.principal.hasUID && !p.principal.hasType && !p.resource.hasUID && !p.resource.hasType
}

// actionScope is the part of a policy's scope that concerns the action.
type actionScope struct {
	all  bool
	uids []cedar.EntityUID
	in   bool
}

// key is the same for scopes that match the same actions.
func (s actionScope) key() string {
	if s.all {
		return ""
	}
	names := make([]string, len(s.uids))
	for i, uid := range s.uids {
		names[i] = uid.String()
	}
	return fmt.Sprint(s.in, names)
}

// statement is one policy's text, cut out of its file.
type statement struct {
	text         string
	line, column int
}

// textError is a problem at a place in a text. Line and column count from 1.
type textError struct {
	line, column int
	msg, hint    string
}

// split cuts a file into statements at their semicolons and checks size and
// nesting, without parsing. Texts that were published before are trusted: they are not held
// to [MaxPairs].
func split(src string, trusted bool) ([]statement, []textError) {
	var (
		out        []statement
		errs       []textError
		line, col  = 1, 1
		start      = -1
		sl, sc     int
		depth, pre int
		tooDeep    bool
		tooLong    bool // a text, or a chain of attributes
		outermost  byte // bracket: { is that of a condition
		chain      int  // attributes in a row, as in a.b.c
		afterDot   bool // the next word is the name of an attribute
		branches   ifCounter
		sets       setCounter
	)
	if !utf8.ValidString(src) {
		return nil, []textError{{1, 1, "not valid UTF-8", ""}}
	}
	step := func(i int) int { // moves on by one rune
		r, n := utf8.DecodeRuneInString(src[i:])
		if r == '\n' {
			line, col = line+1, 1
		} else {
			col++
		}
		return i + n
	}
	for i := 0; i < len(src); {
		c := src[i]
		switch {
		case c == ' ' || c == '\t' || c == '\r' || c == '\n':
			i = step(i)
			continue
		case c == '/' && i+1 < len(src) && src[i+1] == '/':
			for i < len(src) && src[i] != '\n' {
				if src[i] == '\r' && i+1 < len(src) && src[i+1] != '\n' {
					// Cedar ends the comment here, cedar-go does not: what follows could be a forbid.
					errs = append(errs, textError{line, col, "a carriage return without a line feed in a comment", "end lines with a line feed"})
					return out, errs
				}
				i = step(i)
			}
			continue
		}
		if c == '/' {
			// cedar-go takes block comments, Cedar does not.
			errs = append(errs, textError{line, col, `unexpected "/"`, "a comment begins with //"})
			return out, errs
		}
		if start < 0 {
			start, sl, sc = i, line, col
			depth, pre, tooDeep = 0, 0, false
			sets, chain, tooLong = setCounter{}, 0, false
			branches, afterDot = ifCounter{}, false
		}
		prefix := false
		switch c {
		case '"':
			literal := i + 1
			i = step(i)
			for i < len(src) && src[i] != '"' {
				if src[i] == '\\' && i+1 < len(src) {
					i = step(i)
				}
				i = step(i)
			}
			if literalBytes(src[literal:min(i, len(src))]) > MaxStringBytes && outermost == '{' && !trusted && !tooLong {
				tooLong = true
				errs = append(errs, textError{line, col, fmt.Sprintf("a text of more than %d bytes", MaxStringBytes), longHint})
			}
		case '(', '[', '{':
			if depth++; depth == 1 {
				outermost = c
			}
			sets.open(depth, c)
			branches.open()
		case ')', ']', '}':
			sets.shut(depth)
			branches.shut()
			depth--
		case ',':
			sets.comma(depth)
			branches.comma()
		case '!', '-':
			prefix = true
			pre++
		}
		if !prefix {
			pre = 0
		}
		switch {
		case wordByte(c):
			if i > 0 && wordByte(src[i-1]) {
				break // inside of a word
			}
			if !afterDot {
				chain = 0
				if !trusted {
					branches.word(src[i:])
				}
			}
			afterDot = false
		case c == '.':
			afterDot = true
			if chain++; chain > maxChain && !trusted && !tooLong {
				tooLong = true
				errs = append(errs, textError{line, col, fmt.Sprintf("more than %d attributes in a row", maxChain), "store the value nearer"})
			}
		default:
			chain, afterDot = 0, false
		}
		if depth+pre+branches.depth > MaxNesting && !tooDeep {
			tooDeep = true
			hint := "split the policy"
			if pre > depth+branches.depth {
				hint = "two of ! or - in a row are as good as none"
			}
			errs = append(errs, textError{line, col, fmt.Sprintf("nested deeper than %d", MaxNesting), hint})
		}
		if i < len(src) {
			i = step(i)
		}
		if c == ';' {
			switch {
			case i-start > MaxPolicyBytes:
				errs = append(errs, textError{sl, sc, fmt.Sprintf("policy of %d bytes, the limit is %d", i-start, MaxPolicyBytes), "put the members of a long list into a group entity, and ask with in; or split the policy"})
			case sets.pairs > MaxPairs && !trusted:
				errs = append(errs, textError{sl, sc, fmt.Sprintf("its sets of sets and of records have %d pairs of elements, the limit is %d", sets.pairs, MaxPairs), "compare fewer sets, or store them as entities"})
			case !tooDeep && !tooLong:
				out = append(out, statement{src[start:i], sl, sc})
			}
			start = -1
		}
	}
	if start >= 0 {
		if len(src)-start > MaxPolicyBytes || tooDeep || tooLong || sets.pairs > MaxPairs {
			errs = append(errs, textError{sl, sc, "policy does not end", `a policy ends with ";"`})
		} else {
			out = append(out, statement{src[start:], sl, sc})
		}
	}
	return out, errs
}

// longHint is the hint for a text of more than [MaxStringBytes].
var longHint = fmt.Sprintf("use at most %d bytes; of a longer text, compare a hash", MaxStringBytes)

// ifCounter counts how deep "if" is nested. An "if" ends where its brackets or its element end, or
// where the word comes that belongs to an "if" around it.
type ifCounter struct {
	stack []byte // the parts that are open: i, t and e of if, then and else; ( is a bracket
	depth int    // of if
}

func (n *ifCounter) open() { n.stack = append(n.stack, '(') }

// comma ends an element of a list.
func (n *ifCounter) comma() {
	for len(n.stack) > 0 && n.stack[len(n.stack)-1] != '(' {
		n.pop()
	}
}

func (n *ifCounter) shut() {
	if n.comma(); len(n.stack) > 0 {
		n.stack = n.stack[:len(n.stack)-1]
	}
}

func (n *ifCounter) pop() {
	n.stack = n.stack[:len(n.stack)-1]
	n.depth--
}

// word takes the word at the beginning of a text.
func (n *ifCounter) word(text string) {
	for _, w := range [...]struct {
		word          string
		after, become byte
	}{{"if", 0, 'i'}, {"then", 'i', 't'}, {"else", 't', 'e'}} {
		if !strings.HasPrefix(text, w.word) || len(text) > len(w.word) && wordByte(text[len(w.word)]) {
			continue
		}
		if w.after == 0 {
			n.stack, n.depth = append(n.stack, w.become), n.depth+1
			return
		}
		// It belongs to the innermost part that waits for it. What is inside of that has ended.
		for len(n.stack) > 0 && n.stack[len(n.stack)-1] != '(' {
			if top := len(n.stack) - 1; n.stack[top] == w.after {
				n.stack[top] = w.become
				return
			}
			n.pop()
		}
	}
}

// literalBytes returns how many bytes the text of a literal has at least: an escape stands for one
// byte or more.
func literalBytes(text string) (n int) {
	for i := 0; i < len(text); i++ {
		n++
		if text[i] != '\\' || i+1 == len(text) {
			continue
		}
		i++
		switch text[i] {
		case 'x':
			i += 2
		case 'u':
			if end := strings.IndexByte(text[i:], '}'); end > 0 {
				i += end
			}
		}
	}
	return n
}

// setCounter counts the pairs of elements in the literals of a policy that are sets of sets or
// sets of records. cedar-go makes a constant set when it parses the policy, and may compare all
// pairs, see [MaxPairs].
type setCounter struct {
	levels [MaxNesting + 1]bracket
	pairs  int
}

type bracket struct {
	set      bool // else parentheses or a record
	compound bool // an element is a set or a record
	commas   int
}

func (s *setCounter) open(depth int, c byte) {
	if depth < 1 || depth > MaxNesting {
		return
	}
	s.levels[depth] = bracket{set: c == '['}
	if c == '(' {
		return
	}
	for d := depth - 1; d > 0; d-- {
		if s.levels[d].set {
			s.levels[d].compound = true
			return
		}
	}
}

func (s *setCounter) comma(depth int) {
	if depth >= 1 && depth <= MaxNesting {
		s.levels[depth].commas++
	}
}

func (s *setCounter) shut(depth int) {
	if depth < 1 || depth > MaxNesting {
		return
	}
	if l := s.levels[depth]; l.set && l.compound {
		s.pairs += l.commas * (l.commas + 1) / 2
	}
}

// parsePolicy parses one statement. Each policy must have an @id.
func parsePolicy(bundle, file string, st statement) (*policy, *textError) {
	list, err := cedar.NewPolicyListFromBytes(file, []byte(st.text))
	if err != nil {
		return nil, syntaxError(st, err)
	}
	if len(list) != 1 {
		return nil, &textError{st.line, st.column, fmt.Sprintf("%d policies in one statement", len(list)), ""}
	}
	compiled := list[0]
	tree := (*xast.Policy)(compiled.AST())
	notes := compiled.Annotations()
	id := string(notes["id"])
	if id == "" {
		return nil, &textError{st.line, st.column, "policy without @id", `give each policy a name of its own: @id("…")`}
	}
	if len(id) > 256 || strings.ContainsFunc(id, func(r rune) bool { return r < ' ' }) {
		return nil, &textError{st.line, st.column, "@id is longer than 256 bytes or has control characters", ""}
	}
	p := &policy{
		ref: PolicyRef{bundle, id}, name: cedar.PolicyID(bundle + "/" + id),
		file: file, line: st.line, column: st.column, text: st.text,
		source:     tree,
		compiled:   exact(compiled),
		forbid:     compiled.Effect() == cedar.Forbid,
		obligation: string(notes["obligation"]),
		advice:     string(notes["advice"]),
		principal:  scopeOf(tree.Principal),
		resource:   scopeOf(tree.Resource),
		action:     actionScopeOf(tree.Action),
	}
	if tooLong(tree) {
		return nil, &textError{st.line, st.column, fmt.Sprintf("has a text of more than %d bytes", MaxStringBytes), longHint}
	}
	p.inOrder, p.orderDepth = recordsInOrder(p.compiled)
	p.walk(tree)
	return p, nil
}

// isSlot says whether a token at a place, in lines and columns from 1, is the name of
// a template's slot, ?principal or ?resource.
func isSlot(text string, line, column int, token string) bool {
	lines := strings.Split(text, "\n")
	if token != `"principal"` && token != `"resource"` || line > len(lines) {
		return false
	}
	before := []rune(lines[line-1])
	return column >= 2 && column-2 < len(before) && before[column-2] == '?'
}

// maxSigns is how many of ! or - Cedar takes in a row. cedar-go takes any number.
const maxSigns = 4

// tooManySigns finds more than maxSigns of ! or - in a row before an operand, and
// returns where they begin. It looks at the text, since the syntax tree is the same
// with parentheses between the signs, which Cedar allows.
func tooManySigns(text string) (at int, found bool) {
	var (
		sign    byte
		run     int
		operand bool // an operand comes before, so - is a subtraction
		dot     bool // a dot comes before, so a word is the name of an attribute
	)
	for i := 0; i < len(text); {
		c := text[i]
		switch {
		case c == ' ' || c == '\t' || c == '\r' || c == '\n':
			i++
			continue
		case strings.HasPrefix(text[i:], "//"):
			i += len(text[i:]) - len(strings.TrimLeftFunc(text[i:], func(r rune) bool { return r != '\n' }))
			continue
		case strings.HasPrefix(text[i:], "!="):
			operand, run = false, 0
			i += 2
		case c == '!' || c == '-' && !operand:
			if c != sign {
				sign, run = c, 0
			}
			if run++; run > maxSigns {
				return i, true
			}
			operand = false
			i++
		case c == '"':
			for i++; i < len(text) && text[i] != '"'; i++ {
				if text[i] == '\\' {
					i++
				}
			}
			operand, run = true, 0
			i++
		case wordByte(c):
			start := i
			for i < len(text) && wordByte(text[i]) {
				i++
			}
			operand, run = dot || !slices.Contains([]string{"if", "then", "else", "in", "has", "like", "is"}, text[start:i]), 0
		default:
			operand, run = c == ')' || c == ']' || c == '}', 0
			i++
		}
		dot = c == '.'
	}
	return 0, false
}

func wordByte(c byte) bool {
	return c == '_' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}

// escapedStar finds a star that is written as an escape sequence.
var escapedStar = regexp.MustCompile(`\\x2[aA]|\\u\{0*2[aA]\}`)

// tooLong finds text literals and patterns that are longer than the limit of strings.
// The time to match a pattern grows with its length times the length of the text.
func tooLong(tree *xast.Policy) bool {
	found := false
	for _, c := range tree.Conditions {
		xast.Inspect(xast.NewNode(c.Body), func(n xast.IsNode) bool {
			switch t := n.(type) {
			case xast.NodeTypeLike:
				found = found || len(t.Value.MarshalCedar()) > MaxStringBytes
			case xast.NodeValue:
				s, ok := t.Value.(cedar.String)
				found = found || ok && len(s) > MaxStringBytes
			}
			return !found
		})
	}
	return found
}

func scopeOf(n xast.IsScopeNode) scope {
	switch n := n.(type) {
	case xast.ScopeTypeEq:
		return scope{hasType: true, typ: n.Entity.Type, hasUID: true, uid: n.Entity}
	case xast.ScopeTypeIn:
		return scope{hasUID: true, uid: n.Entity, in: true}
	case xast.ScopeTypeIs:
		return scope{hasType: true, typ: n.Type}
	case xast.ScopeTypeIsIn:
		return scope{hasType: true, typ: n.Type, hasUID: true, uid: n.Entity, in: true}
	}
	return scope{}
}

func actionScopeOf(n xast.IsActionScopeNode) actionScope {
	switch n := n.(type) {
	case xast.ScopeTypeEq:
		return actionScope{uids: []cedar.EntityUID{n.Entity}}
	case xast.ScopeTypeIn:
		return actionScope{uids: []cedar.EntityUID{n.Entity}, in: true}
	case xast.ScopeTypeInSet:
		return actionScope{uids: n.Entities, in: true}
	}
	return actionScope{all: true}
}

// walk fills in what is known from the conditions alone.
func (p *policy) walk(tree *xast.Policy) {
	p.field = usesField(tree)
	p.field.split(tree, p.compiled)
	p.anyResource = !p.resource.hasUID
	var text strings.Builder
	for _, c := range tree.Conditions {
		if mentions(c.Body, "resource") {
			p.anyResource = false
		}
		if p.forbid {
			continue
		}
		for _, part := range conjuncts(c.Body, c.Condition == xast.ConditionUnless) {
			if mentions(part, "resource") {
				continue
			}
			one := &xast.Policy{
				Effect:     xast.EffectPermit,
				Principal:  xast.ScopeTypeAll{},
				Action:     xast.ScopeTypeAll{},
				Resource:   xast.ScopeTypeAll{},
				Conditions: []xast.ConditionType{{Condition: xast.ConditionWhen, Body: part}},
			}
			compiled := cedar.NewPolicyFromAST((*ast.Policy)(one))
			p.conjuncts = append(p.conjuncts, exact(compiled))
			text.Write(compiled.MarshalCedar())
			if in, ok := part.(xast.NodeTypeIn); ok && isPrincipal(in.Left) {
				if uid, ok := entityLiteral(in.Right); ok {
					p.within = &uid
				}
			}
		}
	}
	p.conjunctText = text.String()
}

// conjuncts returns expressions that must all be true for n (or !n, if negated) to be
// true. It splits a && b into a and b, and !(a || b) into !a and !b.
func conjuncts(n xast.IsNode, negated bool) []xast.IsNode {
	switch t := n.(type) {
	case xast.NodeTypeAnd:
		if !negated {
			return append(conjuncts(t.Left, false), conjuncts(t.Right, false)...)
		}
	case xast.NodeTypeOr:
		if negated {
			return append(conjuncts(t.Left, true), conjuncts(t.Right, true)...)
		}
	case xast.NodeTypeNot:
		return conjuncts(t.Arg, !negated)
	}
	if negated {
		n = xast.NodeTypeNot{UnaryNode: xast.UnaryNode{Arg: n}}
	}
	return []xast.IsNode{n}
}

// mentions reports whether a variable occurs in n.
func mentions(n xast.IsNode, variable string) bool {
	found := false
	xast.Inspect(xast.NewNode(n), func(n xast.IsNode) bool {
		if v, ok := n.(xast.NodeTypeVariable); ok && string(v.Name) == variable {
			found = true
		}
		return !found
	})
	return found
}

// literals calls fn for each entity that the policy names, in scope and
// conditions.
func literals(tree *xast.Policy, fn func(cedar.EntityUID)) {
	for _, s := range []scope{scopeOf(tree.Principal), scopeOf(tree.Resource)} {
		if s.hasUID {
			fn(s.uid)
		}
	}
	for _, uid := range actionScopeOf(tree.Action).uids {
		fn(uid)
	}
	for _, c := range tree.Conditions {
		xast.Inspect(xast.NewNode(c.Body), func(n xast.IsNode) bool {
			if v, ok := n.(xast.NodeValue); ok {
				entitiesIn(v.Value, fn)
			}
			return true
		})
	}
}

// typesAfterIs calls fn for each entity type that a condition tests for.
func typesAfterIs(tree *xast.Policy, fn func(cedar.EntityType)) {
	for _, c := range tree.Conditions {
		xast.Inspect(xast.NewNode(c.Body), func(n xast.IsNode) bool {
			switch t := n.(type) {
			case xast.NodeTypeIs:
				fn(t.EntityType)
			case xast.NodeTypeIsIn:
				fn(t.EntityType)
			}
			return true
		})
	}
}

// tree returns the policy's syntax tree.
func (p *policy) tree() *xast.Policy { return p.source }

func isPrincipal(n xast.IsNode) bool {
	v, ok := n.(xast.NodeTypeVariable)
	return ok && v.Name == "principal"
}
