package main

import (
	"fmt"

	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/decisionlog"
)

// agentFlags say which keys of an ssh-agent sign the log.
type agentFlags struct {
	AuditAgent    string   `help:"Socket of an ssh-agent that has keys that sign checkpoints of the log, for example in a hardware module; needs --audit-agent-key." env:"CEDARPOST_AUDIT_AGENT" type:"path" placeholder:"SOCKET" group:"server"`
	AuditAgentKey []string `help:"Verifier key of such a key, as audit agent-keys prints it. While keys rotate, several keys separated by spaces, the new one first." env:"CEDARPOST_AUDIT_AGENT_KEY" sep:" " placeholder:"KEY" group:"server"`
}

type agentKeysCmd struct {
	AuditAgent string `help:"Socket of the ssh-agent." env:"CEDARPOST_AUDIT_AGENT,SSH_AUTH_SOCK" placeholder:"SOCKET"`
	Name       string `help:"Name of the log, which is the first line of its checkpoints: a host name and a path, like audit.example.org/cedarpost. A key that replaces another one has the same name." required:"" placeholder:"NAME"`
}

// Help is the long help of agent-keys.
func (*agentKeysCmd) Help() string {
	return `Prints a line for each Ed25519 key of the ssh-agent: the verifier key, and the comment of the key. Give the verifier key to serve --audit-agent-key, and to everybody who verifies the log. It is no secret. Keys of other types cannot sign the log.`
}

// Run lists the keys.
func (a *agentKeysCmd) Run(c *console) error {
	if a.AuditAgent == "" {
		return misuse("no ssh-agent: give --audit-agent, or set SSH_AUTH_SOCK")
	}
	if err := server.CheckName(a.Name); err != nil {
		return fmt.Errorf("%q cannot name a log: %w", a.Name, err)
	}
	keys, err := decisionlog.AgentKeys(a.AuditAgent, a.Name)
	if err != nil {
		return about("audit-agent", err)
	}
	if len(keys) == 0 {
		return about("audit-agent", fmt.Errorf("%s has no Ed25519 key: add one with ssh-add", a.AuditAgent))
	}
	for _, k := range keys {
		fmt.Fprintln(c.out, k.Verifier+"\t"+clean(k.Comment))
	}
	return nil
}
