package main

import (
	"fmt"
	"os"
	"strings"
	"time"

	"golang.org/x/mod/sumdb/note"

	"github.com/cedarpost/cedarpost/auditlog"
)

type auditCmd struct {
	Verify     verifyCmd     `cmd:"" help:"Recompute the log in a database, and compare it with its checkpoints."`
	Witness    witnessCmd    `cmd:"" help:"Keep checkpoints outside of the service, and report a log that contradicts them."`
	Prove      proveCmd      `cmd:"" help:"Prove that one record is in the log."`
	Checkpoint checkpointCmd `cmd:"" help:"Print the newest signed checkpoint."`
	Truncate   truncateCmd   `cmd:"" help:"After a failover or a restore that lost the newest batches, sign a statement of it, so that servers sign the log again."`
	Keygen     keygenCmd     `cmd:"" help:"Make a key that signs checkpoints."`
	AgentKeys  agentKeysCmd  `cmd:"" name:"agent-keys" help:"Print the verifier keys of the keys that an ssh-agent has."`
}

// keyFlags say which keys a checkpoint must be signed with.
type keyFlags struct {
	VerifierKey     []string `help:"Key that must have signed checkpoints, as keygen prints it; may be repeated." env:"CEDARPOST_VERIFIER_KEY" sep:" " placeholder:"KEY"`
	VerifierKeyFile string   `help:"File with such keys, one on each line." env:"CEDARPOST_VERIFIER_KEY_FILE" type:"path" placeholder:"FILE"`
}

func (f *keyFlags) verifiers() (keys []note.Verifier, err error) {
	texts := f.VerifierKey
	if f.VerifierKeyFile != "" {
		content, err := os.ReadFile(f.VerifierKeyFile)
		if err != nil {
			return nil, about("verifier-key-file", err)
		}
		texts = append(texts, strings.Fields(string(content))...)
	}
	for _, text := range texts {
		key, err := note.NewVerifier(text)
		if err != nil && strings.HasPrefix(text, "PRIVATE+KEY+") {
			return nil, misuse("a private key is given as a verifier key: give the verifier key, which audit keygen printed")
		}
		if err != nil {
			return nil, misuse("%q is not a verifier key, which looks like name+hash+key", text)
		}
		keys = append(keys, key)
	}
	return keys, nil
}

// required returns the verifiers, and an error of wrong usage if there are none.
func (f *keyFlags) required() ([]note.Verifier, error) {
	keys, err := f.verifiers()
	if err == nil && len(keys) == 0 {
		err = misuse("no key to verify with: give --verifier-key, or --verifier-key-file")
	}
	return keys, err
}

// truncatedText returns a statement of truncation as one line of text.
func truncatedText(t auditlog.Truncation) string {
	return clean(fmt.Sprintf("%d signed batches were lost, from %d down to %d, as %s stated at %s: %s",
		t.Lost(), t.From.Size, t.To.Size, t.Operator, t.Time.Format(time.RFC3339), t.Reason))
}
