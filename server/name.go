package server

import (
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

const maxName = 255

// CheckName returns an error if a server or a log cannot have this name, because it cannot be
// written into records, lines of a log and signed checkpoints: if it is empty, has more than
// 255 bytes, is not UTF-8, contains line breaks or other control characters, or begins or ends
// with a space.
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
		if !unicode.IsPrint(r) { // ' ' is the only space that is printable
			return fmt.Errorf("the name %q has %q in it, which cannot be printed", name, r)
		}
	}
	return nil
}
