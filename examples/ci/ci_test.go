// Package ci_test tests the pipelines of this folder.
package ci_test

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"

	"go.yaml.in/yaml/v4"
)

type step struct {
	Uses string            `yaml:"uses"`
	Run  string            `yaml:"run"`
	With map[string]any    `yaml:"with"`
	Env  map[string]string `yaml:"env"`
}

func load(t *testing.T, name string, into any) string {
	t.Helper()
	text, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Load(text, into); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return string(text)
}

// shell checks the syntax of a script.
func shell(t *testing.T, script string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "sh", "-n")
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("%v: %s\n%s", err, out, script)
	}
}

// The workflow has the least rights, pinned actions, and no text of a pull request in its scripts.
func TestGitHub(t *testing.T) {
	var w struct {
		On          map[string]any `yaml:"on"`
		Permissions map[string]any `yaml:"permissions"`
		Jobs        map[string]struct {
			If          string            `yaml:"if"`
			Permissions map[string]string `yaml:"permissions"`
			Timeout     int               `yaml:"timeout-minutes"`
			Steps       []step            `yaml:"steps"`
		} `yaml:"jobs"`
	}
	text := load(t, "github.yml", &w)
	if len(w.On) != 1 || w.On["pull_request"] == nil || w.Permissions == nil || len(w.Permissions) > 0 || len(w.Jobs) != 2 {
		t.Errorf("%+v", w)
	}
	pinned := regexp.MustCompile(`^[a-z-]+/[a-z-]+@[0-9a-f]{40}$`)
	all := ""
	for name, job := range w.Jobs {
		may := map[string]string{"contents": "read"}
		secret := name == "impact"
		if secret {
			may["pull-requests"] = "write"
		}
		if fmt.Sprint(job.Permissions) != fmt.Sprint(may) || job.Timeout == 0 || secret != strings.Contains(job.If, "head.repo.full_name == github.repository") {
			t.Errorf("%s: %+v", name, job)
		}
		for _, s := range job.Steps {
			if s.Uses != "" && (!pinned.MatchString(s.Uses) || s.With["persist-credentials"] != false) {
				t.Errorf("%s: %+v", name, s)
			}
			if strings.Contains(s.Run, "${{") {
				t.Errorf("%s: an expression in a script: %s", name, s.Run)
			}
			if !secret && strings.Contains(fmt.Sprint(s.Env), "secrets.") {
				t.Errorf("%s has a secret", name)
			}
			shell(t, s.Run)
			all += s.Run
		}
	}
	commands(t, all)
	if strings.Contains(text, "pull_request_target") || regexp.MustCompile(`(?m)(^|[;&|] *)(sh |bash |\./|[a-z]+/)`).MatchString(all) {
		t.Error("code of the pull request would run")
	}
}

func TestGitLab(t *testing.T) {
	var jobs map[string]any
	load(t, "gitlab.yml", &jobs)
	all := ""
	for name, job := range jobs {
		fields, ok := job.(map[string]any)
		if !ok {
			t.Fatalf("%s is %T", name, job)
		}
		for _, part := range []string{"before_script", "script"} {
			lines, _ := fields[part].([]any)
			for _, line := range lines {
				script, ok := line.(string)
				if !ok {
					t.Fatalf("%s: %v is no text", name, line)
				}
				shell(t, script)
				all += script + "\n"
			}
		}
	}
	commands(t, all)
}

// commands checks that a pipeline has the steps that README.md names.
func commands(t *testing.T, scripts string) {
	t.Helper()
	for _, want := range []string{"sha256sum", "cedarpost\"? check ", "cedarpost\"? diff ", "cedarpost\"? impact .* --since 24h -o markdown --no-samples >>.*comment.md"} {
		if !regexp.MustCompile(want).MatchString(scripts) {
			t.Errorf("no step has %s", want)
		}
	}
}
