package entityfile

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/go-json-experiment/json/jsontext"
	"google.golang.org/protobuf/types/known/structpb"
)

// ErrTwice is wrapped by errors about a member of a JSON object or an entity of a file
// that is there twice. To use one of the two could be wrong.
var ErrTwice = errors.New("twice")

// DecodeJSON reads one JSON value like encoding/json, with numbers as [json.Number]. It
// refuses what readers of JSON read in different ways: a member that is twice in an
// object, and escapes that are not valid Unicode.
func DecodeJSON(text []byte) (any, error) {
	d := json.NewDecoder(bytes.NewReader(text))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		return nil, unexpected(err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("something follows the value")
	}
	_, err := jsontext.NewDecoder(bytes.NewBuffer(text)).ReadValue()
	grammar, _ := errors.AsType[*jsontext.SyntacticError](err)
	switch {
	case err == nil:
		return v, nil
	case errors.Is(err, jsontext.ErrDuplicateName):
		return nil, fmt.Errorf("member %.100q is %w in an object, at %.200s", grammar.JSONPointer.LastToken(), ErrTwice, grammar.JSONPointer)
	case grammar != nil:
		return nil, fmt.Errorf("not valid Unicode, at %.200s", grammar.JSONPointer)
	}
	return nil, err
}

// ParseRecord reads a JSON object of values in Cedar's format, such as a context.
func ParseRecord(text []byte) (*structpb.Struct, error) {
	v, err := DecodeJSON(text)
	if err != nil {
		return nil, err
	}
	return parseStruct(v)
}
