package main

import (
	"context"
	"fmt"
	"os"

	"github.com/alecthomas/kong"

	"github.com/cedarpost/cedarpost/internal/secret"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/store"
)

type truncateCmd struct {
	databaseFlags
	AuditKeyFile []string `help:"Private key of the log, as for serve. While keys rotate, both keys, separated by a space." env:"CEDARPOST_AUDIT_KEY_FILE" sep:" " placeholder:"FILE"`
	agentFlags
	AuditCheckpointFile string `help:"Checkpoint file of the server that refuses to sign. The statement is added to it." required:"" env:"CEDARPOST_AUDIT_CHECKPOINT_FILE" type:"path" placeholder:"FILE"`
	Operator            string `help:"Name of the person who makes the statement, for the record: one line." required:"" placeholder:"WHO"`
	Reason              string `help:"Why the batches are lost, for the record: one line." required:"" placeholder:"WHY"`
	Confirm             bool   `help:"Sign the statement. Without this flag, it is only printed."`
}

// Help is the long help of truncate.
func (*truncateCmd) Help() string {
	return `After a failover or a restore that lost the newest batches, servers refuse to sign, because the log contradicts the checkpoint file. This command compares the batches in the database with the checkpoints in the file, and signs a statement that the log continues from the last checkpoint that matches. The statement is added to the file and recorded in the log. The commands verify and witness accept it, and show it. Servers sign again with the same key within ten seconds.

The command refuses if nothing is lost, if no signed checkpoint matches the database, or if the database contradicts a checkpoint of its own. Everybody who has the key can make such a statement; the number of lost batches, the operator and the reason stay on record. Run it once for each loss, with the file of the server that signed last. The other servers find the statement in the log.`
}

// Run prints the statement, and signs it with --confirm.
func (f *truncateCmd) Run(ctx context.Context, k *kong.Context, c *console) error {
	if len(f.AuditKeyFile)+len(f.AuditAgentKey) == 0 {
		return misuse("no key to sign with: give --audit-key-file, or --audit-agent and --audit-agent-key")
	}
	url, err := f.required(k)
	if err != nil {
		return err
	}
	name, _ := os.Hostname()
	db, err := store.Open(ctx, store.Config{DatabaseURL: secret.New(url), Server: name})
	if err != nil {
		return err
	}
	defer db.Close()
	done, err := decisionlog.TruncateLog(ctx, db, decisionlog.Truncation{
		Signing:  decisionlog.Signing{KeyFiles: f.AuditKeyFile, Agent: f.AuditAgent, AgentKeys: f.AuditAgentKey, CheckpointFile: f.AuditCheckpointFile},
		Operator: f.Operator, Reason: f.Reason, Server: name, Confirm: f.Confirm,
	})
	if err != nil {
		return aboutField(err)
	}
	fmt.Fprintf(c.out, "signed      %s, root %s\n", count(done.From.Size, "batch", "batches"), done.From.Root)
	fmt.Fprintf(c.out, "goes on at  %s, root %s\n", count(done.To.Size, "batch", "batches"), done.To.Root)
	fmt.Fprintf(c.out, "lost        %s\n", count(done.Lost(), "signed batch", "signed batches"))
	fmt.Fprintf(c.out, "unsigned    %s after that, which no checkpoint of this file covers\n", count(done.Batches-done.To.Size, "batch", "batches"))
	if !f.Confirm {
		fmt.Fprintln(c.out, "nothing was signed: give --confirm to sign the statement")
		return nil
	}
	fmt.Fprintln(c.out, "the statement is signed, in the checkpoint file and in the log")
	return nil
}
