package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/policies"
	"github.com/cedarpost/cedarpost/server/engine"
)

type initCmd struct {
	Dir       string `arg:"" help:"Folder to make; its name becomes the name of the bundle." type:"path"`
	Namespace string `help:"Namespace of the types and actions (default ${default})." default:"App" placeholder:"NAME"`
}

// Help is the long help of init.
func (*initCmd) Help() string {
	return `Writes a bundle about documents of teams: schema, policies, catalogue of fields, tests and the entities for the tests. It is valid, and its tests pass. Change it to what your service has.`
}

var (
	namespaces  = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*(::[A-Za-z_][A-Za-z0-9_]*)*$`)
	bundleNames = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,63}$`)
	starterName = regexp.MustCompile(`(?m)^name: starter$`)
)

// isNamespace reports whether a bundle may have a namespace: no part of it is a word of Cedar, and it is not
// that of the service.
func isNamespace(name string) bool {
	first, _, _ := strings.Cut(name, "::")
	words := []string{"if", "then", "else", "true", "false", "in", "is", "like", "has", "__cedar"}
	return namespaces.MatchString(name) && first != "Cedarpost" &&
		!slices.ContainsFunc(strings.Split(name, "::"), func(part string) bool { return slices.Contains(words, part) })
}

// Run writes the folder.
func (i *initCmd) Run(c *console) error {
	name := filepath.Base(i.Dir)
	if !bundleNames.MatchString(name) {
		return misuse("%q is not the name of a bundle: lower-case letters, digits and . _ - after the first character, at most 64", name)
	}
	if slices.Contains([]string{engine.Admin, engine.AdminLocal, engine.Guardrails}, name) {
		return misuse("a bundle with the name %s has rules of its own: give the folder another name", name)
	}
	if !isNamespace(i.Namespace) {
		return misuse("--namespace: %q is not a namespace like App or Clinic::Records", i.Namespace)
	}
	if there, err := os.ReadDir(i.Dir); err == nil && len(there) > 0 {
		return fmt.Errorf("%s is not empty, so nothing was written", relative(i.Dir))
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.MkdirAll(i.Dir, 0o755); err != nil {
		return err
	}
	starter := policies.Starter()
	err := fs.WalkDir(starter, ".", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		text, err := fs.ReadFile(starter, path)
		if err != nil {
			return err
		}
		text = bytes.ReplaceAll(text, []byte("App::"), []byte(i.Namespace+"::"))
		text = bytes.ReplaceAll(text, []byte("namespace App {"), []byte("namespace "+i.Namespace+" {"))
		if path == bundle.ManifestName {
			text = starterName.ReplaceAll(text, []byte("name: "+name))
		}
		// Never over a file that appeared meanwhile.
		f, err := os.OpenFile(filepath.Join(i.Dir, path), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
		if err != nil {
			return err
		}
		_, err = f.Write(text)
		return errors.Join(err, f.Close())
	})
	if err != nil {
		return err
	}
	dir := relative(i.Dir)
	fmt.Fprintf(c.out, "wrote the bundle %s\n\n  cedarpost check %s           # validate it, and run its tests\n  cedarpost dev %s --watch     # serve it, and publish what you save\n", name, quoteWord(dir), quoteWord(dir))
	return nil
}

var plainWord = regexp.MustCompile(`^[A-Za-z0-9._/-]+$`)

// quoteWord quotes a word for a shell if it has to be.
func quoteWord(s string) string {
	if plainWord.MatchString(s) {
		return s
	}
	return quoteShell(s)
}
