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

	"github.com/cedarpost/cedarpost/server/decisionlog"
)

// rivals names for a setting another variable of the same purpose. If that is set, it also takes
// precedence over the file.
var rivals = map[string]string{
	"token-file":        tokenEnv,
	"database-url":      databaseURLEnv + "_FILE",
	"database-url-file": databaseURLEnv,
}

// settings are the values in the YAML file, by name.
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
	loader, err := yaml.NewLoader(bytes.NewReader(text), yaml.WithV4Defaults())
	if err != nil {
		return err
	}
	var document yaml.Node
	if err := loader.Load(&document); errors.Is(err, io.EOF) {
		return nil
	} else if err != nil {
		return yamlError(file, err)
	}
	if err := loader.Load(&yaml.Node{}); err == nil {
		return fmt.Errorf("%s: holds more than one YAML document", file)
	} else if !errors.Is(err, io.EOF) {
		return yamlError(file, err)
	}
	top := &document
	if top.Kind == yaml.DocumentNode {
		top = top.Content[0]
	}
	switch {
	case top.Kind == yaml.ScalarNode && top.Tag == "!!null":
		return nil
	case top.Kind != yaml.MappingNode:
		return fmt.Errorf("%s:%d: must hold settings as lines of the form NAME: VALUE", file, top.Line)
	}
	lines := map[string]int{}
	for i := 0; i+1 < len(top.Content); i += 2 {
		name, value := top.Content[i], top.Content[i+1]
		key, where := name.Value, fmt.Sprintf("%s:%d", file, name.Line)
		if value.Kind == yaml.AliasNode {
			value = value.Alias
		}
		if before, twice := lines[key]; twice {
			return fmt.Errorf("%s: %s: already set in line %d", where, key, before)
		}
		lines[key] = name.Line
		switch {
		case name.Kind != yaml.ScalarNode:
			return fmt.Errorf("%s: must hold settings as lines of the form NAME: VALUE", where)
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

// yamlError names the place of an error of YAML.
func yamlError(file string, err error) error {
	if bad, ok := errors.AsType[*yaml.LoadError](err); ok && bad.Mark.Line > 0 {
		return fmt.Errorf("%s:%d:%d: not YAML: %s", file, bad.Mark.Line, bad.Mark.Column, bad.Message)
	}
	return fmt.Errorf("%s: %w", file, err)
}

// about adds the flag whose value caused an error.
func about(flag string, err error) error { return fmt.Errorf("--%s: %w", flag, err) }

// configFlags are the flags that set fields of the server's configuration.
var configFlags = map[string]string{
	"Listen": "listen", "AdminListen": "admin-listen", "OpsListen": "ops-listen", "Pprof": "pprof", "CORSOrigins": "cors-origin", "TLSCert": "tls-cert", "TLSKey": "tls-key",
	"Clients.CA": "client-ca", "Clients.TrustDomains": "client-trust-domain",
	"Signing.KeyFiles": "audit-key-file", "Signing.Agent": "audit-agent", "Signing.AgentKeys": "audit-agent-key", "Signing.CheckpointFile": "audit-checkpoint-file",
}

// aboutField adds the flag whose value the server refuses.
func aboutField(err error) error {
	if bad, ok := errors.AsType[*decisionlog.ConfigError](err); ok {
		return about(configFlags[bad.Field], err)
	}
	return err
}

// Validate implements kong.Resolver.
func (settings) Validate(*kong.Application) error { return nil }

// Resolve implements kong.Resolver. Kong asks for each flag that is not on the command line, also
// for a flag that the environment sets.
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

// locate adds file and line to an error about settings of the YAML file. An error is about a
// setting if it names the flag of the setting.
func (s settings) locate(err error) error {
	text := err.Error()
	for _, name := range slices.Sorted(maps.Keys(s)) {
		set := s[name]
		if set.used && namesFlag(text, name) {
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

// onCommandLine reports whether a flag is given on the command line, rather than in the
// environment or the YAML file.
func onCommandLine(k *kong.Context, name string) bool {
	return slices.ContainsFunc(k.Path, func(p *kong.Path) bool {
		return p.Flag != nil && p.Flag.Name == name && !p.Resolved
	})
}
