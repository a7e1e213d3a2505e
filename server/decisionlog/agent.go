package decisionlog

import (
	"context"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"
	"golang.org/x/mod/sumdb/note"

	"github.com/cedarpost/cedarpost/auditlog"
)

// agentTimeout bounds one conversation with an ssh-agent.
const agentTimeout = 5 * time.Second

// agentError is an error of an ssh-agent that has a key of the log.
type agentError struct{ err error }

func (e *agentError) Error() string { return "ssh-agent: " + e.err.Error() }
func (e *agentError) Unwrap() error { return e.err }

// agentSigner signs with an Ed25519 key that an ssh-agent keeps. The agent may keep it in a hardware
// module or a vault: the private key never comes into this process. It connects for each signature, so
// an agent that was away signs again when it is back.
//
// The signature of a note is Ed25519 over its text (golang.org/x/mod/sumdb/note). That of an agent for
// a key of type ssh-ed25519 is Ed25519 over the bytes that it was sent (RFC 8709, section 6; the agent
// protocol adds nothing to them). So they are the same 64 bytes.
type agentSigner struct {
	note.Verifier
	public ed25519.PublicKey
	socket string
}

// newAgentKey returns the key of an agent that belongs to a verifier key. It does not ask the agent.
func newAgentKey(socket, verifier string) (auditlog.Key, error) {
	v, err := note.NewVerifier(verifier)
	if err != nil && strings.HasPrefix(verifier, "PRIVATE+KEY+") { // an error must not show it
		return auditlog.Key{}, errors.New("a private key is given as the verifier key of a key that the ssh-agent has")
	}
	if err != nil {
		return auditlog.Key{}, fmt.Errorf("%q is not a verifier key, which looks like name+hash+key", verifier)
	}
	// name+hash+data: the algorithm, and an Ed25519 key. NewVerifier knows no other algorithm.
	parts := strings.SplitN(verifier, "+", 3)
	data, err := base64.StdEncoding.DecodeString(parts[len(parts)-1])
	if err != nil || len(data) != 1+ed25519.PublicKeySize {
		return auditlog.Key{}, fmt.Errorf("%q is not the verifier key of an Ed25519 key", verifier)
	}
	return auditlog.Key{Signer: &agentSigner{v, data[1:], socket}, Verifier: verifier}, nil
}

var errAgentSignature = errors.New("its signature does not belong to the key and the text")

// Sign implements note.Signer.
func (s *agentSigner) Sign(text []byte) ([]byte, error) {
	key, err := ssh.NewPublicKey(s.public)
	if err != nil {
		return nil, &agentError{err}
	}
	var signature *ssh.Signature
	err = withAgent(s.socket, func(a agent.ExtendedAgent) (err error) {
		signature, err = a.Sign(key, text)
		return err
	})
	if err != nil {
		return nil, err
	}
	// A checkpoint without a valid signature would be found only by those who verify it.
	if signature.Format != ssh.KeyAlgoED25519 || !ed25519.Verify(s.public, text, signature.Blob) {
		return nil, &agentError{errAgentSignature}
	}
	return signature.Blob, nil
}

// withAgent calls use with a new connection to an agent.
func withAgent(socket string, use func(agent.ExtendedAgent) error) error {
	ctx, cancel := context.WithTimeout(context.Background(), agentTimeout)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "unix", socket)
	if err != nil {
		return &agentError{err}
	}
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(agentTimeout)); err != nil {
		return &agentError{err}
	}
	if err := use(agent.NewClient(conn)); err != nil {
		return &agentError{err}
	}
	return nil
}

// AgentKey is a key of an ssh-agent that can sign a log.
type AgentKey struct {
	// Verifier is the verifier key, in the note format.
	Verifier string
	// Comment is what the agent says about the key, often the name of its file.
	Comment string
}

// AgentKeys lists the Ed25519 keys of the ssh-agent at a socket, as keys of the log that has a name.
func AgentKeys(socket, name string) (keys []AgentKey, err error) {
	err = withAgent(socket, func(a agent.ExtendedAgent) error {
		list, err := a.List()
		if err != nil {
			return err
		}
		for _, k := range list {
			public, ok := ed25519Of(k.Blob)
			if !ok {
				continue
			}
			verifier, err := note.NewEd25519VerifierKey(name, public)
			if err == nil {
				_, err = note.NewVerifier(verifier) // it refuses names that NewEd25519VerifierKey accepts
			}
			if err != nil {
				return fmt.Errorf("%q cannot name a log: %w", name, err)
			}
			keys = append(keys, AgentKey{verifier, k.Comment})
		}
		return nil
	})
	return keys, err
}

// ed25519Of reads the Ed25519 key of a public key of SSH.
func ed25519Of(blob []byte) (ed25519.PublicKey, bool) {
	parsed, err := ssh.ParsePublicKey(blob)
	if err != nil || parsed.Type() != ssh.KeyAlgoED25519 {
		return nil, false
	}
	wrapped, ok := parsed.(ssh.CryptoPublicKey)
	if !ok {
		return nil, false
	}
	key, ok := wrapped.CryptoPublicKey().(ed25519.PublicKey)
	return key, ok
}

// tryText is what [TryKeys] signs. It is no checkpoint and no statement: it has a single line.
var tryText = []byte("cedarpost tries whether this key signs\n")

// TryKeys reads the keys of cfg and signs a text that means nothing with each, so that a key that
// cannot sign is found before the log needs it.
func TryKeys(cfg Signing) error {
	keys, _, err := readKeys(cfg)
	if err != nil {
		return err
	}
	for _, key := range keys {
		if _, err := key.Sign(tryText); err != nil {
			return fmt.Errorf("%s: %w", key.Verifier, err)
		}
	}
	return nil
}
