package access

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"time"

	"github.com/cedarpost/cedarpost/internal/pause"
)

// followInterval is the time between two looks at the file of the issuers.
const followInterval = time.Second

// OpenTokens returns a verifier for the issuers of a file, which [ReadIssuers] reads. The issuers
// of the configuration are not used.
func OpenTokens(file string, c TokensConfig) (*Tokens, error) {
	text, err := readIssuersFile(file)
	if err != nil {
		return nil, err
	}
	if c.Issuers, err = ReadIssuers(text); err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	t, err := NewTokens(c)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	t.text = text
	return t, nil
}

// Follow reads the file of [OpenTokens] again when its content changes, until ctx ends. If the new
// content is not valid, the issuers stay as they are, and the log says so.
func (t *Tokens) Follow(ctx context.Context, file string) {
	for last := t.text; ctx.Err() == nil; pause.For(ctx, followInterval) {
		text, err := readIssuersFile(file)
		if err == nil && bytes.Equal(text, last) {
			continue
		}
		if err == nil {
			var issuers []Issuer
			if issuers, err = ReadIssuers(text); err == nil {
				err = t.Replace(issuers)
			}
			if err != nil {
				err = fmt.Errorf("%s: %w", file, err)
			}
		}
		switch {
		case err == nil:
			t.log.Info("the issuers of tokens were read again", "file", file)
		case !bytes.Equal(text, last):
			t.log.Error("the issuers of tokens stay as they were", "err", err)
		}
		last = text
	}
}

// readIssuersFile reads the file of the issuers. It refuses a file that every user may change: it
// says whose tokens make an operator.
func readIssuersFile(file string) ([]byte, error) {
	info, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	if mode := info.Mode(); mode.IsRegular() && mode.Perm()&0o002 != 0 {
		return nil, fmt.Errorf("%s: all users of this machine may change it (mode %04o); take the right away with chmod o-w", file, mode.Perm())
	}
	return os.ReadFile(file)
}
