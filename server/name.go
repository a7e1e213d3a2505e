package server

import (
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

const maxName = 255

// CheckName refuses a name of a server or a log that cannot stand in records, in lines
// of a log and in signed checkpoints: an empty one, one of more than 255 bytes, and one
// with line breaks, other control characters, or spaces at its ends.
func CheckName(name string) error {
	switch {
	case name == "":
		return errors.New("the name is empty")
	case len(name) > maxName:
		return fmt.Errorf("the name has %d bytes, more than %d", len(name), maxName)
	case !utf8.ValidString(name), strings.ContainsRune(name, utf8.RuneError):
		return fmt.Errorf("the name %q is not Unicode", name)
	case strings.TrimSpace(name) != name:
		return fmt.Errorf("the name %q begins or ends with a space", name)
	}
	for _, r := range name {
		if !unicode.IsPrint(r) { // of the spaces, only ' ' is
			return fmt.Errorf("the name %q has %q in it, which cannot be printed", name, r)
		}
	}
	return nil
}
