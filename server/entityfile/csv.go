package entityfile

import (
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"
	"google.golang.org/protobuf/types/known/structpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// Mapping says which columns of a CSV file are the id, the parents and the attributes of
// an entity. All entities are of one type.
type Mapping struct {
	entityType string
	id         string // its column
	parents    []cellRule
	attrs      []cellRule
	columns    []string // all columns that are read, each once
}

// cellRule says how the cells of a column are read.
type cellRule struct {
	attr   string // empty for a parent
	column string
	as     string // text, long or bool
	entity string // the type, if the cell names an entity
	split  string // the separator of the values in a cell; empty: a cell is one value
}

// ReadCSV reads a CSV file with a header. An empty cell has no value, so that an optional
// attribute is absent. In a cell that is split, spaces around a value and empty values
// are ignored.
func ReadCSV(r io.Reader, m *Mapping) *Reader {
	text := &entityText{r: withoutMark(r)}
	rows := csv.NewReader(text)
	rows.ReuseRecord = true
	var columns map[string]int
	line := 0
	read := func() ([]string, error) {
		text.left = maxEntityText
		row, err := rows.Read()
		if err == nil {
			line, _ = rows.FieldPos(0)
		}
		return row, csvError(err, line, len(row), rows.FieldsPerRecord)
	}
	return newReader(func() (*cedarpostv1.Entity, int, error) {
		if columns == nil {
			header, err := read()
			if errors.Is(err, io.EOF) {
				return nil, 0, errors.New("line 1: no header with the names of the columns")
			}
			if err != nil {
				return nil, 0, err
			}
			if columns, err = m.find(header); err != nil {
				return nil, 0, fmt.Errorf("line %d: %w", line, err)
			}
		}
		row, err := read()
		if err != nil {
			return nil, 0, err
		}
		e, err := m.readRow(func(column string) string { return row[columns[column]] })
		if err != nil {
			return nil, 0, fmt.Errorf("line %d: %w", line, err)
		}
		return e, line, nil
	})
}

// csvError writes the message for an error of package csv. The line is that of the last
// valid row.
func csvError(err error, line, fields, want int) error {
	var bad *csv.ParseError
	switch {
	case err == nil, errors.Is(err, io.EOF):
		return err
	case errors.Is(err, csv.ErrFieldCount) && errors.As(err, &bad):
		return fmt.Errorf("line %d: %d cells, the header has %d", bad.StartLine, fields, want)
	case errors.As(err, &bad):
		return fmt.Errorf("line %d: %w", bad.Line, bad.Err)
	}
	return fmt.Errorf("after line %d: %w", line, err)
}

// find returns the index of each column that the mapping names.
func (m *Mapping) find(header []string) (map[string]int, error) {
	columns := map[string]int{}
	var missing []string
	for _, name := range m.columns {
		i := slices.Index(header, name)
		if i < 0 {
			missing = append(missing, strconv.Quote(name))
			continue
		}
		if slices.Contains(header[i+1:], name) {
			return nil, fmt.Errorf("two columns %q", name)
		}
		columns[name] = i
	}
	if missing != nil {
		return nil, fmt.Errorf("no column %s; there are %q", strings.Join(missing, ", "), header)
	}
	return columns, nil
}

// readRow makes the entity of a row.
func (m *Mapping) readRow(cell func(column string) string) (*cedarpostv1.Entity, error) {
	for _, column := range m.columns {
		if !utf8.ValidString(cell(column)) {
			return nil, fmt.Errorf("column %q: not valid UTF-8", column)
		}
	}
	if cell(m.id) == "" {
		return nil, fmt.Errorf("column %q: the id is empty", m.id)
	}
	e := &cedarpostv1.Entity{Uid: &cedarpostv1.EntityUid{Type: m.entityType, Id: cell(m.id)}}
	for _, rule := range m.parents {
		for _, id := range rule.values(cell(rule.column)) {
			e.Parents = append(e.Parents, &cedarpostv1.EntityUid{Type: rule.entity, Id: id})
		}
	}
	for _, rule := range m.attrs {
		text := cell(rule.column)
		if text == "" {
			continue
		}
		value, err := rule.read(text)
		if err != nil {
			return nil, fmt.Errorf("column %q: %w", rule.column, err)
		}
		if e.Attrs == nil {
			e.Attrs = &structpb.Struct{Fields: map[string]*structpb.Value{}}
		}
		e.Attrs.Fields[rule.attr] = value
	}
	return e, nil
}

// values returns the texts in a cell.
func (c cellRule) values(text string) []string {
	if text == "" {
		return nil
	}
	if c.split == "" {
		return []string{text}
	}
	var list []string
	for value := range strings.SplitSeq(text, c.split) {
		if value = strings.TrimSpace(value); value != "" {
			list = append(list, value)
		}
	}
	return list
}

// read returns the value of a cell in the wire format.
func (c cellRule) read(text string) (*structpb.Value, error) {
	if c.split == "" {
		return c.readValue(text)
	}
	set := &structpb.ListValue{}
	for _, text := range c.values(text) {
		value, err := c.readValue(text)
		if err != nil {
			return nil, err
		}
		set.Values = append(set.Values, value)
	}
	return structpb.NewListValue(set), nil
}

func (c cellRule) readValue(text string) (*structpb.Value, error) {
	switch {
	case c.entity != "":
		return structpb.NewStructValue(&structpb.Struct{Fields: map[string]*structpb.Value{
			"type": structpb.NewStringValue(c.entity), "id": structpb.NewStringValue(text),
		}}), nil
	case c.as == "long":
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("%.100q is not a whole number of 64 bits", text)
		}
		return structpb.NewValue(exactLong(n))
	case c.as == "bool":
		if !strings.EqualFold(text, "true") && !strings.EqualFold(text, "false") {
			return nil, fmt.Errorf("%.100q is neither true nor false", text)
		}
		return structpb.NewBoolValue(strings.EqualFold(text, "true")), nil
	}
	return structpb.NewStringValue(text), nil
}

// ParseMapping reads a mapping, a YAML file like
//
//	type: Shop::User
//	id: employee_id
//	parents:
//	  - {type: Shop::Role, column: roles, split: ";"}
//	attrs:
//	  region: region
//	  level: {column: lvl, as: long}
//	  manager: {column: mgr, entity: Shop::User}
func ParseMapping(text []byte) (*Mapping, error) {
	loader, err := yaml.NewLoader(bytes.NewReader(text), yaml.WithV4Defaults())
	if err != nil {
		return nil, err
	}
	var doc yaml.Node
	if err := loader.Load(&doc); err != nil {
		return nil, yamlError(err)
	}
	if err := loader.Load(&yaml.Node{}); !errors.Is(err, io.EOF) {
		return nil, errors.New("more than one YAML document")
	}
	root := &doc
	if root.Kind == yaml.DocumentNode && len(root.Content) == 1 {
		root = root.Content[0]
	}
	m := &Mapping{}
	err = readKeys(root, "a mapping", map[string]func(*yaml.Node) error{
		"type":    intoText(&m.entityType),
		"id":      intoText(&m.id),
		"parents": m.readParents,
		"attrs":   m.readAttrs,
	})
	switch {
	case err != nil:
		return nil, err
	case m.entityType == "":
		return nil, errors.New("type is missing: the type of all entities of the file")
	case m.id == "":
		return nil, errors.New("id is missing: the column with the ids")
	}
	named := map[string]bool{m.id: true}
	for _, rule := range slices.Concat(m.parents, m.attrs) {
		named[rule.column] = true
	}
	m.columns = slices.Sorted(maps.Keys(named))
	return m, nil
}

func (m *Mapping) readParents(n *yaml.Node) error {
	if n.Kind != yaml.SequenceNode {
		return atNode(n, "parents is not a list")
	}
	for _, item := range n.Content {
		var rule cellRule
		err := readKeys(item, "a parent", map[string]func(*yaml.Node) error{
			"type": intoText(&rule.entity), "column": intoText(&rule.column), "split": intoText(&rule.split),
		})
		if err != nil {
			return err
		}
		if rule.entity == "" || rule.column == "" {
			return atNode(item, "a parent has a type and a column")
		}
		m.parents = append(m.parents, rule)
	}
	return nil
}

func (m *Mapping) readAttrs(n *yaml.Node) error {
	return eachKey(n, "attrs", func(key, value *yaml.Node) error {
		rule := cellRule{attr: key.Value}
		read := intoText(&rule.column) // the short form
		if value.Kind == yaml.MappingNode {
			read = func(n *yaml.Node) error {
				return readKeys(n, "an attribute", map[string]func(*yaml.Node) error{
					"column": intoText(&rule.column), "as": intoText(&rule.as), "entity": intoText(&rule.entity), "split": intoText(&rule.split),
				})
			}
		}
		switch err := read(value); {
		case err != nil:
			return err
		case rule.column == "":
			return atNode(value, "attribute %q has no column", rule.attr)
		case rule.as != "" && rule.entity != "":
			return atNode(value, "attribute %q has as and entity; give one", rule.attr)
		case rule.as != "" && !slices.Contains(cellTypes, rule.as):
			return atNode(value, "attribute %q: as %q is none of %s", rule.attr, rule.as, strings.Join(cellTypes, ", "))
		}
		m.attrs = append(m.attrs, rule)
		return nil
	})
}

// cellTypes are the types that a cell can be read as. Those after bool are text in the
// wire format, and the schema has their types.
var cellTypes = []string{"text", "long", "bool", "decimal", "ipaddr", "datetime", "duration"}

// readKeys reads a YAML mapping that has only these keys.
func readKeys(n *yaml.Node, what string, keys map[string]func(*yaml.Node) error) error {
	return eachKey(n, what, func(key, value *yaml.Node) error {
		read, known := keys[key.Value]
		if !known {
			return atNode(key, "%s has no key %q; there are %s", what, key.Value, strings.Join(slices.Sorted(maps.Keys(keys)), ", "))
		}
		return read(value)
	})
}

// eachKey calls f for each key of a YAML mapping, in order.
func eachKey(n *yaml.Node, what string, f func(key, value *yaml.Node) error) error {
	if n.Kind != yaml.MappingNode {
		return atNode(n, "%s is not written as keys and values", what)
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		var key string
		if err := intoText(&key)(n.Content[i]); err != nil {
			return err
		}
		if seen[key] {
			return atNode(n.Content[i], "key %q is given twice", key)
		}
		seen[key] = true
		if err := f(n.Content[i], n.Content[i+1]); err != nil {
			return err
		}
	}
	return nil
}

// intoText reads text that is not empty. It refuses a number or a bool, because YAML may
// have changed how it is written.
func intoText(into *string) func(*yaml.Node) error {
	return func(n *yaml.Node) error {
		switch {
		case n.Kind != yaml.ScalarNode:
			return atNode(n, "not a single text")
		case n.ShortTag() != "!!str" && n.ShortTag() != "!!timestamp":
			return atNode(n, "%.100q is not text to YAML: put it in quotes", n.Value)
		case n.Value == "":
			return atNode(n, "an empty text")
		}
		*into = n.Value
		return nil
	}
}

func atNode(n *yaml.Node, format string, args ...any) error {
	return fmt.Errorf("line %d: "+format, append([]any{n.Line}, args...)...)
}

// yamlError writes the message for an error of the parser.
func yamlError(err error) error {
	if errors.Is(err, io.EOF) {
		return errors.New("the file is empty")
	}
	if bad, ok := errors.AsType[*yaml.LoadError](err); ok && bad.Mark.Line > 0 {
		return fmt.Errorf("line %d: not valid YAML: %s", bad.Mark.Line, bad.Message)
	}
	return fmt.Errorf("not valid YAML: %w", err)
}
