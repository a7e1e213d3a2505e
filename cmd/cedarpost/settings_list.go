package main

import (
	"fmt"
	"net/url"
	"reflect"
	"runtime"
	"strings"

	"github.com/alecthomas/kong"

	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/server"
)

// settingsOf returns the settings of the selected command with their values, whatever they come from:
// the command line, the environment, the file or the default. It has no secrets: of a URL, only the
// host, the user and the database.
func settingsOf(k *kong.Context) map[string]string {
	list := map[string]string{}
	for node := k.Selected(); node != nil; node = node.Parent {
		for _, f := range node.Flags {
			if len(f.Envs) > 0 && f.Name != "config" && f.Name != "output" {
				list[f.Name] = settingText(k.FlagValue(f))
			}
		}
	}
	return list
}

// startOf returns what the log records about the start of a server.
func startOf(k *kong.Context) server.Start {
	version, commit := buildVersion()
	return server.Start{Version: version, Commit: commit, GoVersion: runtime.Version(), Settings: settingsOf(k)}
}

// settingText returns a value as text, without secrets.
func settingText(value any) string {
	switch v := value.(type) {
	case nil:
		return ""
	case secret.Secret:
		return withoutSecrets(v.Reveal())
	case []secret.Secret:
		list := make([]string, len(v))
		for i, s := range v {
			list[i] = withoutSecrets(s.Reveal())
		}
		return strings.Join(list, " ")
	case []string:
		return strings.Join(v, " ")
	}
	if v := reflect.ValueOf(value); v.Kind() == reflect.Pointer {
		if v.IsNil() {
			return ""
		}
		return settingText(v.Elem().Interface())
	}
	return fmt.Sprint(value)
}

// withoutSecrets returns what may be shown of the URL of a database: no password, and no parameters,
// which can have one.
func withoutSecrets(text string) string {
	if text == "" {
		return ""
	}
	u, err := url.Parse(text)
	if err != nil || u.Host == "" || u.Opaque != "" {
		return "(a connection string)"
	}
	shown := &url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}
	if name := u.User.Username(); name != "" {
		shown.User = url.User(name)
	}
	return shown.String()
}
