// Package secret has a type for passwords and keys in configuration, so that a configuration can be
// printed, logged and encoded without showing them.
package secret

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
)

// stars replace a secret that is not empty.
const stars = "********"

// Secret is a text that no verb of fmt, no encoder and no logger shows: they write stars, or the empty
// text if the secret is empty. The text is behind a function, so that a struct with a Secret in a field
// that is not exported does not show it either. The zero value is the empty secret.
//
// Text that was decoded into a Secret is lost when the Secret is encoded again, which is the purpose:
// gob refuses to send a Secret at all, because its receiver would take the stars for the text.
type Secret struct{ reveal func() string }

// New returns a secret with a fixed text.
func New(text string) Secret {
	if text == "" {
		return Secret{}
	}
	return Secret{func() string { return text }}
}

// Live returns a secret that calls read each time it is revealed, for example to read a file again.
// read must be safe for concurrent use.
func Live(read func() string) Secret { return Secret{read} }

// Reveal returns the text.
func (s Secret) Reveal() string {
	if s.reveal == nil {
		return ""
	}
	return s.reveal()
}

// IsZero reports whether there is no secret. It does not read the text of a live secret.
func (s Secret) IsZero() bool { return s.reveal == nil }

// String returns stars.
func (s Secret) String() string {
	if s.IsZero() {
		return ""
	}
	return stars
}

// Format implements fmt.Formatter: every verb, with all flags, writes stars.
func (s Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, s.String()) }

// LogValue implements slog.LogValuer.
func (s Secret) LogValue() slog.Value { return slog.StringValue(s.String()) }

// MarshalText implements encoding.TextMarshaler, which encoders of JSON, YAML and XML use.
func (s Secret) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler, so that a secret can be a flag or a setting.
func (s *Secret) UnmarshalText(text []byte) error {
	*s = New(string(text))
	return nil
}

var errGob = errors.New("a secret is not sent")

// GobEncode implements gob.GobEncoder.
func (s Secret) GobEncode() ([]byte, error) { return nil, errGob }

// GobDecode implements gob.GobDecoder.
func (s *Secret) GobDecode([]byte) error { return errGob }
