package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/alecthomas/kong"

	"github.com/cedarpost/cedarpost/auditlog"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/store"
)

type verifyCmd struct {
	outputFlags
	databaseFlags
	keyFlags
	Since        moment   `help:"Verify only rows from this time on, but all headers, the whole tree and all checkpoints: 2006-01-02T15:04:05Z, or 90m, 12h, 7d ago." placeholder:"TIME"`
	MinRetention span     `help:"How long a day of the log is kept at least after its end, as the table log_retention of the database says. Events that a younger day was dropped are not accepted (default ${default})." default:"30d" placeholder:"DURATION"`
	History      bool     `help:"Also compare the stored entities, bundles and API keys with their events in the log. Not with --since."`
	Against      []string `help:"File with checkpoints and statements of truncation that serve --audit-checkpoint-file or audit witness kept outside of the database; may be repeated." type:"path" sep:"none" placeholder:"FILE"`
}

// Help is the long help of verify.
func (*verifyCmd) Help() string {
	return `Recomputes each row from its bytes, each batch from its rows and the tree from its batches, compares the columns with the records, looks for rows that belong to no batch, and compares the tree with every checkpoint. It reads the database itself, as a role that may read the log, and trusts no server. If it finds faults, it lists them, and the exit code is 1.

Rows may be missing only if the log proves that their whole day was dropped, at least --min-retention after the end of the day.

With --history, each stored version of an entity or a bundle and each API key must be as its event in the log says. The comparison begins at the first state root in the log, or at the empty database. What was stored before that, or is older than the history retention, cannot be proven.

Without --against, a log that was cut off or replaced as a whole, with its checkpoints, can pass. Without a verifier key, signatures are not verified. docs/audit.md says what is proven.`
}

// Run verifies.
func (v *verifyCmd) Run(ctx context.Context, k *kong.Context, c *console) error {
	url, err := v.databaseFlags.required(k)
	if err != nil {
		return err
	}
	if v.History && !v.Since.IsZero() {
		return misuse("--history reads the log from its beginning: it cannot be combined with --since")
	}
	keys, err := v.verifiers()
	if err != nil {
		return err
	}
	var against [][][]byte
	kept := 0
	for _, file := range v.Against {
		notes, err := checkpointsIn(file)
		if err != nil {
			return err
		}
		if len(notes) == 0 {
			return fmt.Errorf("%s holds no checkpoint", file)
		}
		if len(keys) == 0 && slices.ContainsFunc(notes, auditlog.IsTruncation) {
			return misuse("%s has a statement of truncation, which counts only if its signature is verified: no verifier key was given; give --verifier-key or --verifier-key-file", file)
		}
		against, kept = append(against, notes), kept+len(notes)
	}
	db, err := store.OpenAuditor(ctx, url)
	if err != nil {
		return err
	}
	defer db.Close()
	began, said := time.Now(), time.Now()
	done, err := decisionlog.VerifyLog(ctx, db, decisionlog.Verification{
		Since: v.Since.Time, Keys: keys, Against: against, MinRetention: time.Duration(v.MinRetention), History: v.History,
		Progress: func(d decisionlog.Verified) {
			if time.Since(said) >= time.Second {
				said = time.Now()
				fmt.Fprintf(c.err, "%d of %d batches, %d rows (%.0f rows/s)\n", d.Batches, d.Total,
					d.Decisions+d.Events, float64(d.Decisions+d.Events)/time.Since(began).Seconds())
			}
		},
	})
	var bad *decisionlog.BadLogError
	if err != nil && !errors.As(err, &bad) {
		return err
	}
	if v.json() {
		result := map[string]any{
			"ok": bad == nil, "batches": done.Batches, "decisions": done.Decisions, "events": done.Events, "dropped_rows": done.Dropped,
			"signed_batches": done.Size, "unsigned_batches": done.Unsigned, "checkpoints": done.Checkpoints,
			"signatures_verified": len(keys) > 0, "compared_with_kept": kept > 0, "kept_checkpoints": kept, "truncated_checkpoints": done.Truncated,
		}
		if len(done.Truncations) > 0 {
			list := make([]map[string]any, len(done.Truncations))
			for i, t := range done.Truncations {
				list[i] = map[string]any{
					"origin": t.Origin, "from": t.From.Size, "to": t.To.Size, "lost_batches": t.Lost(), "time": t.Time.Format(time.RFC3339),
					"number": t.Number, "operator": t.Operator, "reason": t.Reason, "kept": t.Kept, "in_log": t.InLog,
				}
			}
			result["truncations"] = list
		}
		if !done.UnsignedSince.IsZero() {
			result["unsigned_since"] = done.UnsignedSince.Format(time.RFC3339Nano)
		}
		if h := done.History; h != nil {
			result["history"] = map[string]any{
				"base": h.Base, "oldest": h.Oldest, "newest": h.Newest, "entities": h.Entities, "bundles": h.Bundles, "keys": h.Keys,
				"revisions": h.Revisions, "not_provable": h.NotProvable,
			}
		}
		if bad != nil {
			faults := make([]map[string]any, len(bad.Faults))
			for i, f := range bad.Faults {
				faults[i] = map[string]any{"batch": f.Leaf, "row": f.Row, "what": f.What}
			}
			result["faults"], result["more_faults"] = faults, bad.More
		}
		if err := c.object(result); err != nil {
			return err
		}
	}
	if len(keys) == 0 {
		c.warnUnverified()
	}
	if bad != nil {
		return fmt.Errorf("the log is NOT in order: %w", bad)
	}
	if !v.json() {
		fmt.Fprintln(c.out, c.paint(green, "the log is in order"))
		c.pair("batches", fmt.Sprint(done.Batches))
		unsigned := "none"
		if done.Unsigned > 0 {
			unsigned = fmt.Sprintf("%s, since %s", count(done.Unsigned, "batch", "batches"), done.UnsignedSince.Format(time.RFC3339))
			if time.Since(done.UnsignedSince) > unsignedNormal {
				unsigned += ": the log is NOT being signed"
			}
		}
		c.pair("unsigned", unsigned)
		c.pair("decisions", fmt.Sprint(done.Decisions))
		c.pair("events", fmt.Sprint(done.Events))
		if done.Dropped > 0 {
			c.pair("dropped", fmt.Sprintf("%d rows of days that were dropped, as the log proves", done.Dropped))
		}
		signatures := "signatures NOT verified: no verifier key"
		if len(keys) > 0 {
			signatures = "signatures verified"
		}
		elsewhere := "no checkpoint that was kept elsewhere was compared (--against): a log that was cut off or replaced as a whole can pass like this"
		if kept > 0 {
			elsewhere = fmt.Sprintf("%d kept elsewhere", kept)
		}
		c.pair("checkpoints", fmt.Sprintf("%d compared; %s; %s", done.Checkpoints, elsewhere, signatures))
		for _, t := range done.Truncations {
			c.pair("truncated", truncatedText(t.Truncation))
		}
		if done.History != nil {
			printHistory(c, done.History)
		}
		c.pair("took", time.Since(began).Round(time.Millisecond).String())
	}
	return nil
}

// printHistory prints which part of the stored history was compared with the log.
func printHistory(c *console, h *decisionlog.HistoryVerified) {
	base := "the empty database"
	if h.Base > 0 {
		base = fmt.Sprintf("the state root of revision %d", h.Base)
	}
	c.pair("history", fmt.Sprintf("revisions %d to %d, from %s", h.Oldest, h.Newest, base))
	revisions := fmt.Sprintf("%d compared with their events", h.Revisions)
	if h.NotProvable > 0 {
		revisions += fmt.Sprintf(", %d not provable: their events are gone", h.NotProvable)
	}
	c.pair("revisions", revisions)
	c.pair("stored", fmt.Sprintf("%s, %s, %s", count(h.Entities, "version of an entity", "versions of entities"),
		count(h.Bundles, "version of a bundle", "versions of bundles"), count(h.Keys, "API key", "API keys")))
}

// unsignedNormal is how long the newest batches can be without a checkpoint in normal operation:
// until another server takes over the signing.
const unsignedNormal = time.Minute

// checkpointsIn reads the checkpoints of a file.
func checkpointsIn(file string) (notes [][]byte, err error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	err = auditlog.EachCheckpoint(f, func(signed []byte) error {
		notes = append(notes, signed)
		return nil
	})
	return notes, err
}
