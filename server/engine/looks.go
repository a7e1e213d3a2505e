package engine

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/cedar-policy/cedar-go"
)

// This file finds text that looks different from what it is. People review policies and read
// their names in the log, so a policy must not show them something else than it says
// (CVE-2021-42574, "Trojan Source").

// isInvisible reports whether a character is not shown, and is not one that changes the direction
// of text.
func isInvisible(r rune) bool {
	return !isBidi(r) && (unicode.In(r, unicode.Cf, unicode.Other_Default_Ignorable_Code_Point, unicode.Variation_Selector) || r == '\u2028' || r == '\u2029')
}

// isInvisibleInText is isInvisible for comments and strings, where some languages and emoji need
// joiners and variation selectors.
func isInvisibleInText(r rune) bool {
	return isInvisible(r) && r != '\u200c' && r != '\u200d' && !unicode.Is(unicode.Variation_Selector, r)
}

// isBidi reports whether a character changes the order in which text is shown.
func isBidi(r rune) bool { return unicode.Is(unicode.Bidi_Control, r) }

// isASCII reports whether a text has ASCII characters only. None of them is looked for here, and most
// texts of a large bundle have no others.
func isASCII(text string) bool {
	for i := range len(text) {
		if text[i] >= utf8.RuneSelf {
			return false
		}
	}
	return true
}

// mixesScripts reports whether a name has letters of alphabets that share the shapes of many
// letters: Latin, and Greek or Cyrillic.
func mixesScripts(name string) bool {
	latin, other := false, false
	for _, r := range name {
		latin = latin || unicode.Is(unicode.Latin, r)
		other = other || unicode.In(r, unicode.Cyrillic, unicode.Greek)
	}
	return latin && other
}

// lookalikes are Cyrillic and Greek letters that look like a Latin letter in most typefaces.
var lookalikes = map[rune]rune{
	'а': 'a', 'в': 'b', 'е': 'e', 'ё': 'e', 'к': 'k', 'м': 'm', 'н': 'h', 'о': 'o', 'р': 'p', 'с': 'c', 'т': 't', 'у': 'y', 'х': 'x',
	'ѕ': 's', 'і': 'i', 'ї': 'i', 'ј': 'j', 'ԁ': 'd', 'ԛ': 'q', 'ԝ': 'w', 'һ': 'h', 'ӏ': 'l', 'ɡ': 'g',
	'Α': 'A', 'Β': 'B', 'Ε': 'E', 'Ζ': 'Z', 'Η': 'H', 'Ι': 'l', 'Κ': 'K', 'Μ': 'M', 'Ν': 'N', 'Ο': 'O', 'Ρ': 'P', 'Τ': 'T', 'Υ': 'Y', 'Χ': 'X',
	'α': 'a', 'β': 'b', 'ε': 'e', 'η': 'n', 'ι': 'i', 'κ': 'k', 'μ': 'm', 'ν': 'v', 'ο': 'o', 'ρ': 'p', 'τ': 't', 'υ': 'u', 'χ': 'x', 'ζ': 'z',
}

// skeleton returns a text that is equal for names that look alike.
func skeleton(name string) string {
	return strings.Map(func(r rune) rune {
		if isInvisible(r) || isBidi(r) {
			return -1
		}
		if r >= '！' && r <= '～' { // full width
			r -= '！' - '!'
		}
		if l, ok := lookalikes[r]; ok {
			r = l
		} else if l, ok := lookalikes[unicode.ToLower(r)]; ok {
			r = unicode.ToUpper(l)
		}
		switch r {
		case 'I', '|', '1':
			return 'l'
		case '0':
			return 'O'
		}
		return r
	}, name)
}

// fileSuffix is the end of the names of files of policies and schemas.
var fileSuffix = regexp.MustCompile(`\.cedar(schema)?(\.json)?$`)

// looks reports what the texts and names of a bundle hide.
func (c *compiler) looks(src Source, b *compiledBundle) {
	report := func(f Finding, warning bool) {
		f.Bundle, f.Warning = src.Name, warning
		c.report(f)
	}
	// text reports the first character of each kind in a text, which begins at a line of a file.
	text := func(file, text string, line int) {
		if isASCII(text) {
			return
		}
		if i, r := firstRune(text, isBidi); i >= 0 {
			f := Finding{File: file, Message: fmt.Sprintf("has the character %U, which changes the order in which text is shown", r), Hint: fmt.Sprintf(`people would read something else than the policy says; in a string, write \u{%X}`, r)}
			f.Line, f.Column = place(text, i, line)
			report(f, false)
		}
		if i, r := firstRune(text, isInvisibleInText); i >= 0 {
			f := Finding{File: file, Message: fmt.Sprintf("has the invisible character %U", r), Hint: fmt.Sprintf(`in a string, write \u{%X}`, r)}
			f.Line, f.Column = place(text, i, line)
			report(f, true)
		}
	}
	name := func(f Finding, what, name string, refuse bool) {
		if isASCII(name) {
			return
		}
		hasBidi := strings.ContainsFunc(name, isBidi)
		switch {
		case hasBidi:
			f.Message = fmt.Sprintf("%s %+q has a character that changes the order in which text is shown", what, name)
		case strings.ContainsFunc(name, isInvisible):
			f.Message = fmt.Sprintf("%s %+q has an invisible character", what, name)
		case slices.ContainsFunc(strings.Split(fileSuffix.ReplaceAllString(name, ""), "/"), mixesScripts):
			f.Message = fmt.Sprintf("%s %+q mixes Latin with Cyrillic or Greek letters, many of which look alike", what, name)
		default:
			return
		}
		report(f, !(hasBidi && refuse))
	}
	files := map[string]bool{}
	for _, f := range src.Schemas {
		text(f.File, f.Text, 1)
		if !files[f.File] {
			files[f.File] = true
			name(Finding{}, "the name of the file", f.File, true)
		}
	}
	if len(src.Schemas) == 0 {
		text(src.SchemaFile, src.Schema, 1)
	}
	for _, t := range src.Policies {
		text(t.File, t.Text, max(t.Line, 1))
		if !files[t.File] {
			files[t.File] = true
			name(Finding{}, "the name of the file", t.File, true)
		}
	}
	alike := map[string]*policy{}
	named := map[cedar.EntityUID]bool{}
	for _, p := range b.policies {
		name(finding(p, "", ""), "its @id", p.ref.ID, true)
		s := skeleton(p.ref.ID)
		if other := alike[s]; other != nil {
			report(finding(p, fmt.Sprintf("its @id %+q looks like %+q, at %s:%d", p.ref.ID, other.ref.ID, other.file, other.line), "give them names that people can tell apart"), true)
		} else {
			alike[s] = p
		}
		literals(p.tree(), func(uid cedar.EntityUID) {
			if !isASCII(string(uid.ID)) && !named[uid] {
				named[uid] = true
				name(finding(p, "", ""), fmt.Sprintf("the id of the %s", uid.Type), string(uid.ID), false)
			}
		})
	}
}

// firstRune returns the place and the first character of a text that is of a kind; -1 if there is
// none. A byte order mark at the beginning is none.
func firstRune(text string, of func(rune) bool) (int, rune) {
	i := strings.IndexFunc(strings.TrimPrefix(text, "\ufeff"), of)
	if i < 0 {
		return -1, 0
	}
	i += len(text) - len(strings.TrimPrefix(text, "\ufeff"))
	r, _ := utf8.DecodeRuneInString(text[i:])
	return i, r
}

// place returns the line and the column of a place in a text that begins at a line.
func place(text string, at, first int) (line, column int) {
	before := text[:at]
	return first + strings.Count(before, "\n"), utf8.RuneCountInString(before[strings.LastIndexByte(before, '\n')+1:]) + 1
}
