package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect/v2"
	"github.com/alecthomas/kong"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"

	"github.com/cedarpost/cedarpost/auditlog"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/store"
)

type auditCmd struct {
	Verify     verifyCmd     `cmd:"" help:"Recompute the log in a database, and compare it with its checkpoints."`
	Witness    witnessCmd    `cmd:"" help:"Keep checkpoints elsewhere, and cry when the log contradicts them."`
	Prove      proveCmd      `cmd:"" help:"Prove that one record is in the log."`
	Checkpoint checkpointCmd `cmd:"" help:"Print the newest signed checkpoint."`
	Truncate   truncateCmd   `cmd:"" help:"State that the newest batches were lost, as after a failover, so that the log can be signed again."`
	Keygen     keygenCmd     `cmd:"" help:"Make a key to sign checkpoints with."`
}

// keyFlags say which keys a checkpoint must be signed with.
type keyFlags struct {
	VerifierKey     []string `help:"Key that checkpoints must be signed with, as keygen prints it; may be repeated." env:"CEDARPOST_VERIFIER_KEY" sep:" " placeholder:"KEY"`
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
		if err != nil {
			return nil, misuse("%q is not a verifier key, which looks like name+hash+key", text)
		}
		keys = append(keys, key)
	}
	return keys, nil
}

// required is verifiers, and wrong usage if there are none.
func (f *keyFlags) required() ([]note.Verifier, error) {
	keys, err := f.verifiers()
	if err == nil && len(keys) == 0 {
		err = misuse("no key to verify with: give --verifier-key, or --verifier-key-file")
	}
	return keys, err
}

type verifyCmd struct {
	outputFlags
	databaseFlags
	keyFlags
	Since        moment   `help:"Only rows from this time on, beside all headers, the tree and all checkpoints: 2006-01-02T15:04:05Z, or 90m, 12h, 7d ago." placeholder:"TIME"`
	MinRetention span     `help:"How long after its end a day of the log is kept at least, as the database's table log_retention says: records that a younger day was dropped are not accepted (default ${default})." default:"30d" placeholder:"DURATION"`
	History      bool     `help:"Also compare the stored entities, bundles and API keys with what the log says of them. Not with --since."`
	Against      []string `help:"File with checkpoints that were kept elsewhere, and statements of truncation, by serve --audit-checkpoint-file or by audit witness; may be repeated." type:"path" sep:"none" placeholder:"FILE"`
}

// Help is the long help of verify.
func (*verifyCmd) Help() string {
	return `Recomputes each row from its bytes, each batch from its rows and the tree from its batches, compares the columns with the records, looks for rows that belong to no batch, and compares the tree with every checkpoint. It reads the database itself, as a role that may read the log, and trusts no server. What is not in order is listed, and the exit code is 1.

Rows may be missing only where the log proves that their whole day was dropped, at least --min-retention after the day's end.

With --history, each stored version of an entity and of a bundle and each API key must be what its event in the log says. It begins at the first state root in the log, or at the empty database; what was stored before that, and what is older than history is kept, cannot be proven.

Without --against, a log that was cut off or replaced as a whole, checkpoints and all, can pass. Without a verifier key, signatures are not looked at. docs/audit.md says what is proven.`
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
	if bad != nil {
		return fmt.Errorf("the log is NOT in order: %w", bad)
	}
	if !v.json() {
		fmt.Fprintln(c.out, c.paint(green, "the log is in order"))
		c.pair("batches", fmt.Sprint(done.Batches))
		unsigned := "none"
		if done.Unsigned > 0 {
			unsigned = fmt.Sprintf("%d batches, since %s", done.Unsigned, done.UnsignedSince.Format(time.RFC3339))
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
		signatures := "signatures not looked at: no verifier key"
		if len(keys) > 0 {
			signatures = "signatures verified"
		}
		elsewhere := "nothing kept elsewhere was compared (--against): a log that was cut off or replaced as a whole can look like this"
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

// truncatedText shows a statement of truncation in one line.
func truncatedText(t auditlog.Truncation) string {
	return clean(fmt.Sprintf("%d signed batches were lost, from %d down to %d, as %s stated at %s: %s",
		t.Lost(), t.From.Size, t.To.Size, t.Operator, t.Time.Format(time.RFC3339), t.Reason))
}

// printHistory says what of the stored history was compared with the log.
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

// unsignedNormal is for how long the newest batches may be without a checkpoint while
// all is well. It allows for a change of the server that signs.
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

type witnessCmd struct {
	keyFlags
	State    string `help:"File that keeps the checkpoints. It should be on another machine than the service and its database." required:"" type:"path" placeholder:"FILE"`
	Interval span   `help:"Ask so often (default ${default})." default:"10s" placeholder:"DURATION"`
	Once     bool   `help:"Ask once: for a timer that runs it."`
	adminFlags
}

// Help is the long help of witness.
func (*witnessCmd) Help() string {
	return `Asks the service for its newest checkpoint, verifies the signature, has it proven that the log of the last checkpoint it kept is the beginning of this one, and keeps it. When that fails, the log was altered, cut off or replaced: it says so, keeps the checkpoint that proves it in FILE.bad, and ends with exit code 1.

While the service cannot be reached it says so and asks again.`
}

// Run watches the log.
func (w *witnessCmd) Run(ctx context.Context, c *console) error {
	if w.Interval < span(time.Second) {
		return misuse("--interval must be at least 1s")
	}
	keys, err := w.required()
	if err != nil {
		return err
	}
	admin, err := w.dial()
	if err != nil {
		return err
	}
	for {
		grown, err := w.look(ctx, c, admin, keys)
		var forked *forkError
		switch {
		case errors.As(err, &forked):
			return err
		case err != nil && w.Once:
			return err
		case err != nil && ctx.Err() == nil:
			fmt.Fprintf(c.err, "%s not looked at: %v\n", time.Now().UTC().Format(time.RFC3339), err)
		case grown != nil:
			fmt.Fprintf(c.out, "%s %s size %d root %s\n", time.Now().UTC().Format(time.RFC3339), clean(grown.Origin), grown.Size, grown.Root)
		}
		if w.Once {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Duration(w.Interval)):
		}
	}
}

// forkError is a log that is not the one that was witnessed.
type forkError struct{ what string }

func (e *forkError) Error() string { return "THE LOG CONTRADICTS ITS CHECKPOINTS: " + e.what }

// look compares the newest checkpoint with the last one kept, and keeps it. The
// checkpoint is nil when the log has not grown.
func (w *witnessCmd) look(ctx context.Context, c *console, admin *peer, keys []note.Verifier) (*auditlog.Checkpoint, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	res, err := admin.audit().GetCheckpoint(ctx, &cedarpostv1.GetCheckpointRequest{})
	if connect.CodeOf(err) == connect.CodeNotFound {
		for _, key := range keys {
			if before, err := auditlog.LastCheckpoint(w.State, key.Name(), func(auditlog.Checkpoint) bool { return true }); err == nil && before.Size > 0 {
				return nil, &forkError{fmt.Sprintf("it has no checkpoint, and had one of %d batches", before.Size)}
			}
		}
	}
	if err != nil {
		return nil, admin.explain(err)
	}
	signed := []byte(res.GetCheckpoint())
	cry := func(format string, args ...any) (*auditlog.Checkpoint, error) {
		_ = auditlog.AppendCheckpoint(w.State+".bad", signed) // crying matters more
		return nil, &forkError{fmt.Sprintf(format, args...)}
	}
	now, err := auditlog.OpenCheckpoint(signed, keys...)
	if errors.Is(err, auditlog.ErrUnsigned) {
		return nil, w.unsigned(res, keys, cry)
	}
	if err != nil {
		return cry("%v", err)
	}
	known, err := auditlog.ReadStatements(w.State, now.Origin, keys...)
	if err != nil {
		return nil, err
	}
	var stated []auditlog.Statement
	for _, statement := range res.GetTruncations() {
		t, err := auditlog.PeekTruncation([]byte(statement))
		if err != nil || t.Origin != now.Origin {
			continue
		}
		before := len(known.Signed)
		if err := known.Add([]byte(statement), keys...); errors.Is(err, auditlog.ErrTwoStatements) {
			_ = auditlog.AppendCheckpoint(w.State+".bad", []byte(statement))
			return cry("%v", err)
		} else if err == nil && len(known.Signed) > before {
			stated = append(stated, auditlog.Statement{Truncation: t, Note: []byte(statement)})
		}
	}
	var signedBefore auditlog.Statements // of checkpoints alone
	have := false                        // now is kept already
	last, err := auditlog.LastCheckpoint(w.State, now.Origin, func(c auditlog.Checkpoint) bool { return !known.Excuses(c) })
	if err == nil {
		err = auditlog.EachKept(w.State, now.Origin, func(c auditlog.Checkpoint, signed []byte) error {
			signedBefore.See(c, signed, keys...)
			have = have || c == now
			return nil
		})
	}
	if err != nil {
		return nil, err
	}
	if now.Epoch < signedBefore.Epoch {
		return cry("it has gone back: its newest checkpoint was signed after %d statements of truncation, and one that was kept after %d", now.Epoch, signedBefore.Epoch)
	}
	// Each kept checkpoint was proven to continue the ones before it. So of those that are
	// not lost, the largest one stands for all. A new statement may have brought the log back
	// to before that, so then each size that one goes back to is proven again.
	before, proven := last, []auditlog.Checkpoint{last}
	for _, c := range known.Live() {
		if c.Size >= before.Size {
			before = c
		}
		if len(stated) > 0 {
			proven = append(proven, c)
		}
	}
	if len(stated) == 0 {
		proven = []auditlog.Checkpoint{before}
	}
	for _, c := range proven {
		what, err := w.continues(ctx, admin, c, now)
		if err != nil {
			return nil, err
		}
		if what != "" {
			if missing := known.Missing(c); missing != "" {
				what += ". But " + missing
			}
			return cry("%s", what)
		}
	}
	for _, t := range stated {
		if err := auditlog.AppendCheckpoint(w.State, t.Note); err != nil {
			return nil, err
		}
		fmt.Fprintf(c.out, "%s TRUNCATED: %s\n", time.Now().UTC().Format(time.RFC3339), truncatedText(t.Truncation))
	}
	if have {
		return nil, nil
	}
	return &now, auditlog.AppendCheckpoint(w.State, signed)
}

// continues makes sure that a log goes on from a checkpoint, and otherwise says what is
// wrong.
func (w *witnessCmd) continues(ctx context.Context, admin *peer, before, now auditlog.Checkpoint) (what string, err error) {
	switch {
	case now.Size < before.Size:
		return fmt.Sprintf("it has %d batches and had %d", now.Size, before.Size), nil
	case now.Size == before.Size && now.Root != before.Root:
		return fmt.Sprintf("at %d batches it has another root than before", now.Size), nil
	case now.Size == before.Size || before.Size == 0:
		return "", nil
	}
	p, err := call(ctx, admin, admin.audit().GetConsistencyProof,
		&cedarpostv1.GetConsistencyProofRequest{First: before.Size, Second: now.Size})
	if err != nil {
		return "", err
	}
	proof, ok := proofOf(p.GetProof())
	if ok {
		ok = tlog.CheckTree(proof, now.Size, now.Root, before.Size, before.Root) == nil
	}
	if !ok {
		return fmt.Sprintf("the log of %d batches is not the beginning of the log of %d", before.Size, now.Size), nil
	}
	return "", nil
}

// unsigned says what is wrong where none of the keys signed the newest checkpoint. Mostly
// a verifier key is missing or is another log's: that says nothing about the log. But if
// these keys signed checkpoints that the witness keeps, it is a contradiction.
func (w *witnessCmd) unsigned(res *cedarpostv1.GetCheckpointResponse, keys []note.Verifier, cry func(string, ...any) (*auditlog.Checkpoint, error)) error {
	signed := []byte(res.GetCheckpoint())
	for _, key := range keys {
		if slices.Contains(auditlog.Signers(signed), auditlog.KeyID(key)) {
			_, err := cry("its newest checkpoint names the key %s, and the signature is not of that key", auditlog.KeyID(key))
			return err
		}
	}
	notes, err := checkpointsIn(w.State)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, before := range notes {
		if _, err := auditlog.OpenCheckpoint(before, keys...); err == nil {
			_, err := cry("its newest checkpoint is not signed by a trusted key, and those before were; it is signed with %s", strings.Join(auditlog.Signers(signed), ", "))
			return err
		}
	}
	return unknownKey(signed, res.GetVerifierKeys(), keys)
}

func proofOf(list [][]byte) (hashes []tlog.Hash, ok bool) {
	for _, h := range list {
		if len(h) != tlog.HashSize {
			return nil, false
		}
		hashes = append(hashes, tlog.Hash(h))
	}
	return hashes, true
}

type proveCmd struct {
	outputFlags
	keyFlags
	ID string `arg:"" help:"The id of a decision or an event."`
	adminFlags
}

// Help is the long help of prove.
func (*proveCmd) Help() string {
	return `Asks for a proof and checks it here: the row in its batch, the batch in the log, and the signature of the checkpoint, if a verifier key is given. With -o json, the GetInclusionProofResponse of the API, for another verifier.`
}

// Run proves.
func (p *proveCmd) Run(ctx context.Context, c *console) error {
	keys, err := p.verifiers()
	if err != nil {
		return err
	}
	admin, err := p.dial()
	if err != nil {
		return err
	}
	res, err := call(ctx, admin, admin.audit().GetInclusionProof, &cedarpostv1.GetInclusionProofRequest{Id: p.ID})
	if err != nil {
		return err
	}
	rowProof, ok := proofOf(res.GetRowProof())
	proof, ok2 := proofOf(res.GetProof())
	if !ok || !ok2 {
		return errors.New("the proof is malformed")
	}
	signed := []byte(res.GetCheckpoint())
	checkpoint, err := auditlog.PeekCheckpoint(signed)
	if err == nil && len(keys) > 0 {
		checkpoint, err = auditlog.OpenCheckpoint(signed, keys...)
	}
	if err != nil {
		return err
	}
	in := auditlog.Inclusion{
		Record: res.GetRecord(), Row: int(res.GetRow()), RowProof: rowProof, Header: res.GetHeader(), Leaf: res.GetLeaf(), Proof: proof,
	}
	if err := in.Check(checkpoint); err != nil {
		return fmt.Errorf("the proof does NOT hold: %w", err)
	}
	if p.json() {
		return c.message(res)
	}
	fmt.Fprintln(c.out, c.paint(green, "the record is in the log"))
	c.pair("record", fmt.Sprintf("%d bytes, row %d of batch %d", len(in.Record), in.Row, in.Leaf))
	c.pair("checkpoint", fmt.Sprintf("%s, %d batches, root %s", checkpoint.Origin, checkpoint.Size, checkpoint.Root))
	if len(keys) == 0 {
		c.pair("signature", "not looked at: no verifier key")
	} else {
		c.pair("signature", "verified")
	}
	return nil
}

type checkpointCmd struct {
	adminFlags
}

// Run prints the note as it is signed.
func (p *checkpointCmd) Run(ctx context.Context, c *console) error {
	admin, err := p.dial()
	if err != nil {
		return err
	}
	res, err := call(ctx, admin, admin.audit().GetCheckpoint, &cedarpostv1.GetCheckpointRequest{})
	if err != nil {
		return err
	}
	fmt.Fprint(c.out, res.GetCheckpoint())
	return nil
}

type keygenCmd struct {
	Name string `help:"Name of the log, which checkpoints begin with: a host name and a path, like audit.example.org/cedarpost. A key that takes the place of another one has the same name." required:"" placeholder:"NAME"`
	File string `arg:"" help:"File for the private key, which must not exist." type:"path"`
}

// Help is the long help of keygen.
func (*keygenCmd) Help() string {
	return `Writes the private key to the file (mode 0600) for serve --audit-key-file, and prints the verifier key, which everybody may know and verifiers need.`
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
		_, err = note.NewVerifier(verifier) // knows which names are good
	}
	if err != nil {
		return "", fmt.Errorf("%q cannot name a log: %w", name, err)
	}
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return "", err
	}
	_, err = f.WriteString(secret + "\n")
	return verifier, errors.Join(err, f.Sync(), f.Close())
}
