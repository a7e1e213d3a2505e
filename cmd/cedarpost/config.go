package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/alecthomas/kong"
	"go.yaml.in/yaml/v4"
)

// rivals names, for a setting, the variable that says the same in another way: set
// in the environment, it too comes before the file.
var rivals = map[string]string{
	"token-file":        tokenEnv,
	"database-url":      databaseURLEnv + "_FILE",
	"database-url-file": databaseURLEnv,
}

// settings are the values of the YAML file, by their names.
type settings map[string]*setting

type setting struct {
	value string
	where string // "FILE:LINE"
	used  bool   // no flag and no variable overrides it
}

// load reads the file that --config or CEDARPOST_CONFIG names.
func (s settings) load(k *kong.Context) error {
	known := map[string]bool{}
	var file string
	var visit func(*kong.Node)
	visit = func(n *kong.Node) {
		for _, f := range n.Flags {
			if f.Name == "config" {
				file, _ = k.FlagValue(f).(string)
			} else if len(f.Envs) > 0 {
				known[f.Name] = true
			}
		}
		for _, child := range n.Children {
			visit(child)
		}
	}
	visit(k.Model.Node)
	if file == "" {
		return nil
	}
	if err := s.read(file, known); err != nil {
		return fmt.Errorf("settings: %w", err)
	}
	k.AddResolver(s)
	return nil
}

func (s settings) read(file string, known map[string]bool) error {
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	loader, err := yaml.NewLoader(bytes.NewReader(text), yaml.WithV4Defaults(), yaml.WithUniqueKeys(true))
	if err != nil {
		return err
	}
	values := map[string]yaml.Node{}
	if err := loader.Load(&values); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: %w", file, err)
	}
	if err := loader.Load(&yaml.Node{}); !errors.Is(err, io.EOF) {
		return fmt.Errorf("%s: holds more than one YAML document", file)
	}
	for _, key := range slices.Sorted(maps.Keys(values)) {
		value := values[key]
		where := fmt.Sprintf("%s:%d", file, value.Line)
		switch {
		case !known[key]:
			return fmt.Errorf("%s: %s: no such setting; there are %s", where, key, strings.Join(slices.Sorted(maps.Keys(known)), ", "))
		case value.Kind != yaml.ScalarNode:
			return fmt.Errorf("%s: %s: not a single value", where, key)
		case value.Tag != "!!null":
			s[key] = &setting{value: value.Value, where: where}
		}
	}
	return nil
}

// Validate implements kong.Resolver.
func (settings) Validate(*kong.Application) error { return nil }

// Resolve implements kong.Resolver. Kong asks for all flags that are not on the
// command line, those that the environment sets included.
func (s settings) Resolve(_ *kong.Context, _ *kong.Path, f *kong.Flag) (any, error) {
	set, ok := s[f.Name]
	if !ok || len(f.Envs) == 0 {
		return nil, nil
	}
	for _, env := range append([]string{rivals[f.Name]}, f.Envs...) {
		if _, set := os.LookupEnv(env); set {
			return nil, nil
		}
	}
	set.used = true
	return set.value, nil
}

// locate adds file and line to an error about settings of the YAML file. An error is about
// a setting if it names the setting's flag, or the file or address that is the value.
func (s settings) locate(err error) error {
	text := err.Error()
	for _, name := range slices.Sorted(maps.Keys(s)) {
		set := s[name]
		if set.used && (namesFlag(text, name) || strings.ContainsAny(set.value, "/:") && strings.Contains(text, set.value)) {
			err = fmt.Errorf("%w\n%s: this sets %s", err, set.where, name)
		}
	}
	return err
}

// namesFlag reports whether a text has --name, and not only --name-of-another.
func namesFlag(text, name string) bool {
	for _, after := range strings.Split(text, "--"+name)[1:] {
		if after == "" || !strings.ContainsAny(after[:1], "-abcdefghijklmnopqrstuvwxyz0123456789") {
			return true
		}
	}
	return false
}

// onCommandLine reports whether a flag stands on the command line itself.
func onCommandLine(k *kong.Context, name string) bool {
	return slices.ContainsFunc(k.Path, func(p *kong.Path) bool {
		return p.Flag != nil && p.Flag.Name == name && !p.Resolved
	})
}
