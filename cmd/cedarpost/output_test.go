package main

import (
	"testing"
)

func TestWhatATerminalWouldObeyIsShown(t *testing.T) {
	if got, want := clean("a\x1b[31mb\nc\u202e"), `a\u{1b}[31mb\u{a}c\u{202e}`; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got, want := quoteShell("it's $HOME"), `'it'\''s $HOME'`; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}
