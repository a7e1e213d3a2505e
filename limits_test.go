package cedarpost

import (
	"fmt"
	"go/ast"
	"go/constant"
	"go/parser"
	"go/token"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"buf.build/gen/go/bufbuild/protovalidate/protocolbuffers/go/buf/validate"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	_ "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// limitMark is the comment behind a number of docs/limits.md. It says where the number is in the
// code: a constant, as in "server/engine.MaxLevel" or "server/engine.maxActionSteps/2", or a rule
// of the contract, as in "Entity.parents max_items".
var limitMark = regexp.MustCompile(`([0-9][0-9,]*)( KiB| MiB)?[a-z ]*((?: ?<!-- [^>]+ -->)+)`)

// The numbers in docs/limits.md are those of the code.
func TestLimitsAreThoseOfTheCode(t *testing.T) {
	text, err := os.ReadFile("docs/limits.md")
	if err != nil {
		t.Fatal(err)
	}
	marks := 0
	for i, line := range strings.Split(string(text), "\n") {
		for _, m := range limitMark.FindAllStringSubmatch(line, -1) {
			written, err := strconv.ParseInt(strings.ReplaceAll(m[1], ",", ""), 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			written <<= map[string]int{"": 0, " KiB": 10, " MiB": 20}[m[2]]
			for mark := range strings.SplitSeq(strings.Trim(m[3], " "), "-->") {
				where := strings.TrimSpace(strings.TrimPrefix(strings.TrimSpace(mark), "<!--"))
				if where == "" {
					continue
				}
				marks++
				if is, err := limitOf(where); err != nil || is != written {
					t.Errorf("docs/limits.md:%d: %s is written as %d, and is %d, %v", i+1, where, written, is, err)
				}
			}
		}
	}
	if all := strings.Count(string(text), "<!--"); marks != all {
		t.Errorf("read %d of %d marks", marks, all)
	}
}

// limitOf returns the number that a mark names.
func limitOf(where string) (int64, error) {
	if name, rule, ok := strings.Cut(where, " "); ok {
		return ruleOf(name, rule)
	}
	folder, expr, ok := strings.Cut(where, ".")
	if !ok {
		return 0, fmt.Errorf("%q names no package", where)
	}
	constants, err := constantsOf(folder)
	if err != nil {
		return 0, err
	}
	e, err := parser.ParseExpr(expr)
	if err != nil {
		return 0, err
	}
	v, err := constants.value(e)
	if err != nil {
		return 0, err
	}
	n, exact := constant.Int64Val(constant.ToInt(v))
	if !exact {
		return 0, fmt.Errorf("%s is no int64", where)
	}
	return n, nil
}

// sources are the expressions of the constants of one package, by name.
type sources map[string]ast.Expr

func constantsOf(folder string) (sources, error) {
	entries, err := os.ReadDir(folder)
	if err != nil {
		return nil, err
	}
	out := sources{}
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".go") || strings.HasSuffix(e.Name(), "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), folder+"/"+e.Name(), nil, parser.SkipObjectResolution)
		if err != nil {
			return nil, err
		}
		for _, d := range f.Decls {
			g, ok := d.(*ast.GenDecl)
			if !ok || g.Tok != token.CONST {
				continue
			}
			for _, s := range g.Specs {
				spec := s.(*ast.ValueSpec)
				for i, name := range spec.Names {
					if i < len(spec.Values) {
						out[name.Name] = spec.Values[i]
					}
				}
			}
		}
	}
	return out, nil
}

// value evaluates a constant expression of whole numbers.
func (s sources) value(e ast.Expr) (constant.Value, error) {
	switch e := e.(type) {
	case *ast.BasicLit:
		return constant.MakeFromLiteral(e.Value, e.Kind, 0), nil
	case *ast.ParenExpr:
		return s.value(e.X)
	case *ast.Ident:
		if of, ok := s[e.Name]; ok {
			return s.value(of)
		}
		return nil, fmt.Errorf("no constant %s", e.Name)
	case *ast.BinaryExpr:
		x, err := s.value(e.X)
		if err != nil {
			return nil, err
		}
		y, err := s.value(e.Y)
		if err != nil {
			return nil, err
		}
		switch e.Op {
		case token.SHL, token.SHR:
			n, _ := constant.Uint64Val(y)
			return constant.Shift(x, e.Op, uint(n)), nil
		case token.QUO:
			return constant.BinaryOp(x, token.QUO_ASSIGN, y), nil // of whole numbers
		}
		return constant.BinaryOp(x, e.Op, y), nil
	}
	return nil, fmt.Errorf("%T in a constant", e)
}

// ruleOf returns the number of a rule of a field, as in "Entity.parents" and "max_items".
func ruleOf(field, rule string) (int64, error) {
	message, name, _ := strings.Cut(field, ".")
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName("cedarpost.v1." + message))
	if err != nil {
		return 0, err
	}
	f := d.(protoreflect.MessageDescriptor).Fields().ByName(protoreflect.Name(name))
	if f == nil {
		return 0, fmt.Errorf("no field %s", field)
	}
	rules := proto.GetExtension(f.Options(), validate.E_Field).(*validate.FieldRules)
	switch rule {
	case "max_items":
		return int64(rules.GetRepeated().GetMaxItems()), nil
	case "max_bytes":
		return int64(rules.GetString().GetMaxBytes()), nil
	case "lte":
		return int64(rules.GetInt32().GetLte()), nil
	}
	return 0, fmt.Errorf("no rule %s", rule)
}
