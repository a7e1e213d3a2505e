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

// settings are the values of the YAML file, as text.
type settings map[string]string

// loadSettings reads the file that --config or CEDARPOST_CONFIG names.
func loadSettings(k *kong.Context) error {
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
	s, err := readSettings(file, known)
	if err != nil {
		return fmt.Errorf("settings: %w", err)
	}
	k.AddResolver(s)
	return nil
}

func readSettings(file string, known map[string]bool) (settings, error) {
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	loader, err := yaml.NewLoader(bytes.NewReader(text), yaml.WithV4Defaults(), yaml.WithUniqueKeys(true))
	if err != nil {
		return nil, err
	}
	values := map[string]yaml.Node{}
	if err := loader.Load(&values); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	if err := loader.Load(&yaml.Node{}); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s: holds more than one YAML document", file)
	}
	s := settings{}
	for _, key := range slices.Sorted(maps.Keys(values)) {
		value := values[key]
		where := fmt.Sprintf("%s:%d: %s", file, value.Line, key)
		switch {
		case !known[key]:
			return nil, fmt.Errorf("%s: no such setting; there are %s", where, strings.Join(slices.Sorted(maps.Keys(known)), ", "))
		case value.Kind != yaml.ScalarNode:
			return nil, fmt.Errorf("%s: not a single value", where)
		case value.Tag != "!!null":
			s[key] = value.Value
		}
	}
	return s, nil
}

// Validate implements kong.Resolver.
func (settings) Validate(*kong.Application) error { return nil }

// Resolve implements kong.Resolver. Kong asks for all flags that are not on the
// command line, those that the environment sets included.
func (s settings) Resolve(_ *kong.Context, _ *kong.Path, f *kong.Flag) (any, error) {
	value, ok := s[f.Name]
	if !ok || len(f.Envs) == 0 {
		return nil, nil
	}
	for _, env := range append([]string{rivals[f.Name]}, f.Envs...) {
		if _, set := os.LookupEnv(env); set {
			return nil, nil
		}
	}
	return value, nil
}

// onCommandLine reports whether a flag stands on the command line itself.
func onCommandLine(k *kong.Context, name string) bool {
	return slices.ContainsFunc(k.Path, func(p *kong.Path) bool {
		return p.Flag != nil && p.Flag.Name == name && !p.Resolved
	})
}
