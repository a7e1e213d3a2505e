package main

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/mod/sumdb/note"

	"github.com/cedarpost/cedarpost/server"
)

type keygenCmd struct {
	Name string `help:"Name of the log, which is the first line of its checkpoints: a host name and a path, like audit.example.org/cedarpost. A key that replaces another one has the same name." required:"" placeholder:"NAME"`
	File string `arg:"" help:"File for the private key. It must not exist yet." type:"path"`
}

// Help is the long help of keygen.
func (*keygenCmd) Help() string {
	return `Writes the private key to the file (mode 0600) for serve --audit-key-file, and prints the verifier key. Verifiers need the verifier key, and it is no secret.`
}

// Run makes a key.
func (k *keygenCmd) Run(c *console) error {
	verifier, err := makeAuditKey(k.File, k.Name)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s exists: a key is never overwritten", k.File)
	}
	if err != nil {
		return err
	}
	fmt.Fprintln(c.out, verifier)
	return nil
}

// makeAuditKey writes a new private key, unless the file exists.
func makeAuditKey(file, name string) (verifier string, err error) {
	if err := server.CheckName(name); err != nil {
		return "", fmt.Errorf("%q cannot name a log: %w", name, err)
	}
	secret, verifier, err := note.GenerateKey(rand.Reader, name)
	if err == nil {
		_, err = note.NewVerifier(verifier) // it refuses names that GenerateKey accepts
	}
	if err != nil {
		return "", fmt.Errorf("%q cannot name a log: %w", name, err)
	}
	return verifier, writeNew(file, []byte(secret+"\n"), 0o600)
}

// writeNew writes a file that does not exist yet.
func writeNew(file string, content []byte, mode os.FileMode) error {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	return errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
}
