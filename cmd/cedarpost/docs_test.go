package main

import (
	"os"
	"regexp"
	"strings"
	"testing"
)

// testDocumentedCommands runs the commands of docs/lifecycle.md. Most of their changes and versions do not exist
// here, but none is wrong usage. It runs at the end, because it deletes the bundle shop.
func testDocumentedCommands(sh *shell) func(*testing.T) {
	return func(t *testing.T) {
		shop := shopCopy(t, nil)
		for _, command := range documentedCommands(t) {
			var args []string
			for _, word := range regexp.MustCompile(`'[^']*'|[^\s']+`).FindAllString(command, -1) {
				word = strings.Trim(word, "'")
				if word == "policies/shop" || word == "DIR" {
					word = shop
				}
				args = append(args, word)
			}
			if r := sh.run(t, args...); r.code == 2 {
				t.Errorf("cedarpost %s: exit code %d\n%s", command, r.code, r.err)
			}
		}
	}
}

// documentedCommands returns the arguments of each command in docs/lifecycle.md, in order of blocks, then of
// commands with flags in the text.
func documentedCommands(t *testing.T) (commands []string) {
	t.Helper()
	text, err := os.ReadFile("../../docs/lifecycle.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, block := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(string(text), -1) {
		for line := range strings.Lines(block[1]) {
			if command, ok := strings.CutPrefix(line, "cedarpost "); ok {
				commands = append(commands, command)
			}
		}
	}
	for _, span := range regexp.MustCompile("`cedarpost ([^`]+ --[^`]+)`").FindAllStringSubmatch(string(text), -1) {
		commands = append(commands, span[1])
	}
	if len(commands) < 40 {
		t.Fatalf("%d commands", len(commands))
	}
	for i, command := range commands {
		command, _, _ = strings.Cut(command, " #")
		commands[i] = strings.TrimSpace(command)
	}
	return commands
}
