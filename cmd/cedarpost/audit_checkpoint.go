package main

import (
	"context"
	"fmt"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

type checkpointCmd struct {
	adminFlags
}

// Run prints the signed note as it is.
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
