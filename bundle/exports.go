package bundle

import (
	"go.yaml.in/yaml/v4"

	"github.com/cedarpost/cedarpost/internal/entityuid"
)

// An Export is an entity type that other bundles may use, with its place in bundle.yaml:
//
//	exports: [User, Shop::Role]
//
// The list ["*"] stands for all types of the bundle.
type Export struct {
	// Type is the name, with its namespace or without, or [AllTypes].
	Type         string
	Line, Column int
}

// AllTypes is the one element of an exports list that stands for all types of the bundle.
const AllTypes = "*"

const (
	exportsKey = "exports"
	maxExports = 10_000
)

// ReadExports reads the exports of a bundle.yaml that was published. It does not look at the other
// settings. A list that it cannot read exports nothing: an earlier version of the service did not
// read it.
func ReadExports(manifest []byte) (list []Export) {
	var probs Problems
	y := yamlFile{path: ManifestName, probs: &probs}
	if root := y.load(manifest); root != nil {
		y.each(root, ManifestName, func(k, v *yaml.Node) {
			if k.Value == exportsKey {
				list = y.exports(v)
			}
		})
	}
	if len(probs) > 0 {
		return nil
	}
	return list
}

// exports reads the names of entity types: a list, or one name.
func (y yamlFile) exports(n *yaml.Node) (list []Export) {
	names := []*yaml.Node{n}
	if n.Kind == yaml.SequenceNode {
		names = n.Content
	} else if !isText(n) {
		y.fail(n, "such as [User, Role], or [\"*\"] for all types", "%s must be a list of entity types, not %s", exportsKey, kindName(n))
		return nil
	}
	if len(names) > maxExports {
		y.fail(n, `["*"] exports all types`, "%s has more than %d types", exportsKey, maxExports)
		return nil
	}
	seen := map[string]bool{}
	for _, e := range names {
		switch name := y.str(e, "each of "+exportsKey); {
		case !isText(e):
		case name == AllTypes && len(names) > 1:
			y.fail(e, "leave the other names out", `"*" exports all types`)
		case name != AllTypes && !entityuid.ValidType(name):
			y.fail(e, "such as User or Shop::User", "%.100q is not an entity type", name)
		case seen[name]:
			y.fail(e, "", "%.100q is listed twice", name)
		default:
			seen[name] = true
			list = append(list, Export{Type: name, Line: e.Line, Column: e.Column})
		}
	}
	return list
}
