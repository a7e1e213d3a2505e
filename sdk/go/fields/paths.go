package fields

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"google.golang.org/protobuf/types/known/fieldmaskpb"
)

// pathSet collects the paths of one write.
type pathSet map[string]bool

// add adds a path. It refuses a path that a question cannot have.
func (s pathSet) add(path string) error {
	if len(path) > maxPathBytes {
		return fmt.Errorf("fields: path %.60q... has more than %d bytes", path, maxPathBytes)
	}
	s[path] = true
	if len(s) > maxPathsListed {
		return fmt.Errorf("fields: more than %d paths change", maxPathsListed)
	}
	return nil
}

func (s pathSet) sorted() []string { return slices.Sorted(maps.Keys(s)) }

// join appends a segment to a path, which may be empty. It refuses an empty segment and one
// that could be mistaken for several.
func join(path, segment string) (string, error) {
	if segment == "" || strings.Contains(segment, ".") {
		below := ""
		if path != "" {
			below = fmt.Sprintf(" below %.60q", path)
		}
		return "", fmt.Errorf("fields: the key %.60q%s cannot be in a path: it must have characters, and no dot", segment, below)
	}
	if path == "" {
		return segment, nil
	}
	return path + "." + segment, nil
}

// Mask returns the paths of a field mask, sorted, each once. It fails on a mask that is nil
// or empty or contains "*", because it means all fields; on a segment that is not a name of
// letters, digits and "_"; on a path of more than 256 bytes; and on more than 1000 paths.
// Names are returned as they are in the mask, so the catalogue must have the same ones.
func Mask(m *fieldmaskpb.FieldMask) ([]string, error) {
	if len(m.GetPaths()) == 0 {
		return nil, errors.New("fields: an empty field mask means every field: name them")
	}
	set := pathSet{}
	for _, path := range m.GetPaths() {
		for segment := range strings.SplitSeq(path, ".") {
			if !isName(segment) {
				return nil, fmt.Errorf("fields: %.60q in a field mask: %.60q is not a name of a field", path, segment)
			}
		}
		if err := set.add(path); err != nil {
			return nil, err
		}
	}
	return set.sorted(), nil
}

func isName(s string) bool {
	for i, c := range []byte(s) {
		letter := c == '_' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z'
		if !letter && (i == 0 || c < '0' || c > '9') {
			return false
		}
	}
	return s != ""
}
