package secret_test

import (
	"bytes"
	"encoding/base64"
	"encoding/gob"
	"encoding/hex"
	"encoding/json"
	"encoding/xml"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"testing"
	"text/template"

	jsonv2 "github.com/go-json-experiment/json"
	yamlv3 "go.yaml.in/yaml/v3"
	"go.yaml.in/yaml/v4"
	"pgregory.net/rapid"

	"github.com/cedarpost/cedarpost/internal/secret"
)

// config is a configuration with secrets in all kinds of places.
type config struct {
	Name     string
	Secret   secret.Secret
	Pointer  *secret.Secret
	List     []secret.Secret
	Map      map[string]secret.Secret
	Any      any
	Nested   struct{ Secret secret.Secret }
	hidden   secret.Secret
	hiddenTo *secret.Secret
}

func configOf(s secret.Secret) config {
	c := config{Name: "name", Secret: s, Pointer: &s, List: []secret.Secret{s}, Map: map[string]secret.Secret{"k": s}, Any: s, hidden: s, hiddenTo: &s}
	c.Nested.Secret = s
	return c
}

// shows reports whether a text has the secret in a form that somebody could read it from.
func shows(text, plain string) bool {
	quoted := strconv.Quote(plain)
	for _, form := range []string{
		plain, quoted[1 : len(quoted)-1], hex.EncodeToString([]byte(plain)), strings.ToUpper(hex.EncodeToString([]byte(plain))),
		base64.StdEncoding.EncodeToString([]byte(plain)), fmt.Sprintf("%d", []byte(plain)), fmt.Sprintf("% x", plain), fmt.Sprintf("%#v", []byte(plain)),
	} {
		if strings.Contains(text, form) {
			return true
		}
	}
	return false
}

// No verb with any flags, and no encoder, shows a secret, wherever it is in a value.
func TestNothingShowsASecret(t *testing.T) {
	printed := 0
	rapid.Check(t, func(t *rapid.T) {
		// No text of this test has a character of this alphabet twice in a row by chance.
		plain := rapid.StringMatching(`zq[a-zäß"\\0-9<&:/@#\n]{6,40}zq`).Draw(t, "secret")
		s := secret.New(plain)
		if s.Reveal() != plain || s.IsZero() {
			t.Fatal("the secret is lost")
		}
		c := configOf(s)
		check := func(how, text string) {
			printed++
			if shows(text, plain) {
				t.Fatalf("%s shows the secret: %s", how, text)
			}
		}
		verb := rapid.SampledFrom([]rune("vTtbcdoOqxXUeEfFgGspw%zä")).Draw(t, "verb")
		flags := rapid.SampledFrom([]string{"", "+", "#", "-", " ", "0", "+#", "# ", "5", "100.3", ".2", "+100.100", "#-9.4"}).Draw(t, "flags")
		format := "%" + flags + string(verb)
		for _, value := range []any{s, &s, c, &c, []any{s}, map[string]any{"k": s}, [1]secret.Secret{s}, c.Nested, fmt.Errorf("wrapped: %w", fmt.Errorf("%v", s))} {
			check(format, fmt.Sprintf(format, value))
			check("Sprint", fmt.Sprint(value))
			check("Sprintln", fmt.Sprintln(value))
			check("Errorf", fmt.Errorf(format, value).Error())
			for how, encode := range encoders {
				text, err := encode(value)
				check(how, text)
				if err != nil {
					check(how, err.Error())
				}
			}
		}
	})
	if printed == 0 {
		t.Fatal("nothing was printed")
	}
}

var encoders = map[string]func(any) (string, error){
	"json":    func(v any) (string, error) { b, err := json.Marshal(v); return string(b), err },
	"json v2": func(v any) (string, error) { b, err := jsonv2.Marshal(v); return string(b), err },
	"yaml v4": func(v any) (string, error) { b, err := yaml.Marshal(v); return string(b), err },
	"yaml v3": func(v any) (string, error) { b, err := yamlv3.Marshal(v); return string(b), err },
	"xml":     func(v any) (string, error) { b, err := xml.Marshal(v); return string(b), err },
	"gob": func(v any) (string, error) {
		var b bytes.Buffer
		err := gob.NewEncoder(&b).Encode(v)
		return b.String(), err
	},
	"slog text": func(v any) (string, error) {
		var b bytes.Buffer
		slog.New(slog.NewTextHandler(&b, nil)).Info("x", "v", v, slog.Group("g", slog.Any("v", v)))
		return b.String(), nil
	},
	"slog json": func(v any) (string, error) {
		var b bytes.Buffer
		slog.New(slog.NewJSONHandler(&b, nil)).Info("x", "v", v)
		return b.String(), nil
	},
	"template": func(v any) (string, error) {
		var b strings.Builder
		err := template.Must(template.New("").Parse("{{.}} {{printf `%#v` .}} {{js .}}")).Execute(&b, v)
		return b.String(), err
	},
}

// The encoders of the list above write stars, so a reader sees that there is a secret.
func TestStars(t *testing.T) {
	type pair struct{ Secret, Empty secret.Secret }
	c := pair{Secret: secret.New("hunter2")}
	for how, encode := range encoders {
		text, err := encode(c)
		if how == "gob" {
			if err == nil {
				t.Error("gob sends a secret")
			}
			continue
		}
		if err != nil || !strings.Contains(text, "********") || strings.Contains(text, "hunter2") {
			t.Errorf("%s: %s, %v", how, text, err)
		}
	}
	if text := fmt.Sprintf("%v|%s|%#v", c.Empty, c.Empty, c.Empty); text != "||" {
		t.Errorf("the empty secret is printed as %q", text)
	}
}

// A secret can be a value of a setting.
func TestDecode(t *testing.T) {
	var c struct{ Secret secret.Secret }
	if err := json.Unmarshal([]byte(`{"Secret":"hunter2"}`), &c); err != nil || c.Secret.Reveal() != "hunter2" {
		t.Errorf("%q, %v", c.Secret.Reveal(), err)
	}
	if err := yaml.Unmarshal([]byte("secret: hunter3"), &c); err != nil || c.Secret.Reveal() != "hunter3" {
		t.Errorf("%q, %v", c.Secret.Reveal(), err)
	}
	text := "first"
	live := secret.Live(func() string { return text })
	text = "second"
	if live.Reveal() != "second" || live.IsZero() {
		t.Errorf("%q", live.Reveal())
	}
	if (secret.Secret{}).Reveal() != "" || !secret.New("").IsZero() {
		t.Error("the zero value is not empty")
	}
}
