package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/cedarpost/cedarpost/auditlog"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

type proveCmd struct {
	outputFlags
	keyFlags
	ID string `arg:"" help:"The id of a decision or an event."`
	adminFlags
}

// Help is the long help of prove.
func (*proveCmd) Help() string {
	return `Asks the service for a proof, and verifies it: that the row is in its batch, that the batch is in the log, and, if a verifier key is given, the signature of the checkpoint. With -o json, prints the GetInclusionProofResponse of the API, for other verifiers.`
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
	rowProof, ok := auditlog.Hashes(res.GetRowProof())
	proof, ok2 := auditlog.Hashes(res.GetProof())
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
		if len(keys) == 0 {
			c.warnUnverified()
		}
		return c.message(res)
	}
	fmt.Fprintln(c.out, c.paint(green, "the record is in the log"))
	c.pair("record", fmt.Sprintf("%d bytes, row %d of batch %d", len(in.Record), in.Row, in.Leaf))
	c.pair("checkpoint", fmt.Sprintf("%s, %d batches, root %s", checkpoint.Origin, checkpoint.Size, checkpoint.Root))
	if len(keys) == 0 {
		c.pair("signature", "NOT verified: no verifier key")
		c.warnUnverified()
	} else {
		c.pair("signature", "verified")
	}
	return nil
}

// warnUnverified says that no signature was verified, on the error output.
func (c *console) warnUnverified() {
	fmt.Fprintln(c.err, c.paint(yellow, "no signature was verified: whoever answers for the server or writes to the database could have made this. Give --verifier-key-file with the key of the log (cedarpost audit keygen wrote it)."))
}
