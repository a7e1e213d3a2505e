package main

import "regexp"

// secretWords are names of secrets, in settings, headers, JSON and URLs.
const secretWords = `(?:password|passwd|passphrase|secret|authorization|api[-_]?key|access[-_]?key|private[-_]?key)`

// secretText matches what looks like a secret. with replaces it; the first group stays.
type secretText struct {
	re   *regexp.Regexp
	with string
}

// secretTexts are a second line of defense: what a server gives has no secret. A word that is "token" with a
// colon is not one of them, because reasons of the log begin with it ("token: expired").
var secretTexts = []secretText{
	{regexp.MustCompile(`()cdp_[A-Za-z0-9_-]{8,}`), "${1}***"}, // an API key
	{regexp.MustCompile(`(?i)(\b(?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{8,}`), "${1}***"},
	{regexp.MustCompile(`()\beyJ[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]*`), "${1}***"}, // a JSON Web Token
	// A URL with a password, which may have an @ that is not escaped.
	{regexp.MustCompile(`(\b[a-z][a-z0-9+.-]*://[^\s:/@"']*:)[^\s"']+@`), "${1}***@"},
	{regexp.MustCompile(`(?i)([?&](?:sig|signature|sslkey|sslpassword)=)[^\s&"'\\]+`), "${1}***"},
	// A private key in PEM. In a line that was cut off it has no end; lines of JSON have \n for a new line.
	{regexp.MustCompile(`(-----BEGIN [A-Z ]*PRIVATE KEY-----)(?:[^"']*?-----END [A-Z ]*PRIVATE KEY-----|(?:[A-Za-z0-9+/=\\]|\r?\n[A-Za-z0-9+/=]{8,})*)`), "${1}***"},
	// In quotes: "token": "…", password='two words', and in a string of JSON \"token\":\"…\".
	{regexp.MustCompile(`(?i)((?:token|` + secretWords + `)\\+"\s*[=:]\s*\\+")(?:[^"\\]|\\+[^"\\])*`), "${1}***"},
	{regexp.MustCompile(`(?i)((?:token|` + secretWords + `)["']?\s*[=:]\s*")(?:[^"\\]|\\.)*`), "${1}***"},
	{regexp.MustCompile(`(?i)((?:token|` + secretWords + `)["']?\s*[=:]\s*')[^']*`), "${1}***"},
	// Without quotes: password=…, X-Api-Key: …
	{regexp.MustCompile(`(?i)((?:token\s*=|` + secretWords + `\s*[=:])\s*)[^\s"'&,;\\]{3,}`), "${1}***"},
}

// scrub replaces what looks like a secret by ***.
func scrub(text string) string {
	for _, s := range secretTexts {
		text = s.re.ReplaceAllString(text, s.with)
	}
	return text
}
