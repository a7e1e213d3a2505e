package main

import (
	"context"
	"fmt"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

type deleteBundleCmd struct {
	outputFlags
	Name          string `arg:"" help:"Name of the bundle."`
	Reason        string `help:"Why, for the log." placeholder:"TEXT"`
	ExpectVersion int64  `help:"Delete only if this version is live." placeholder:"N"`
	Force         bool   `help:"Also if entities of its types are stored: they are listed, and left behind."`
	adminFlags
}

// Help is the long help of bundles delete.
func (*deleteBundleCmd) Help() string {
	return `Ends the live version: questions about the actions of the bundle become errors, its entities can no longer be written, and only callers with rights to all bundles read them. It is refused while entities of its types are stored, while another bundle uses its types, while it is frozen, and while its changes need approvals.

--force deletes no entity. Those that are stored stay, with their history, and can be read and written again when a bundle declares their types again.

The name keeps its versions and their numbers, and the rules for its changes: "versions", "diff NAME V1 V2" and "pull --version" work as before, and "rollback NAME V" brings a version back.`
}

// Run deletes the bundle.
func (d *deleteBundleCmd) Run(ctx context.Context, c *console) error {
	if d.ExpectVersion < 0 {
		return misuse("--expect-version must not be negative")
	}
	admin, err := d.dial()
	if err != nil {
		return err
	}
	req := &cedarpostv1.DeleteBundleRequest{Bundle: d.Name, Reason: d.Reason}
	if d.ExpectVersion > 0 {
		req.ExpectVersion = &d.ExpectVersion
	}
	// Checking the other bundles may take longer than other calls.
	res, err := admin.policies().DeleteBundle(ctx, req)
	if stored, ok := detailOf[*cedarpostv1.StoredEntities](err); d.Force && ok {
		// The types that were found now are named, so entities of others are never left behind.
		for _, t := range stored.GetTypes() {
			req.LeaveTypes = append(req.LeaveTypes, t.GetType())
		}
		res, err = admin.policies().DeleteBundle(ctx, req)
	}
	if err != nil {
		return c.refusedPublish(admin, err, d.Name, d.json())
	}
	if d.json() {
		return c.message(res)
	}
	fmt.Fprintf(c.out, "%s: %s; `cedarpost rollback %s %d` brings it back\n", clean(d.Name), c.paint(green, fmt.Sprintf("deleted, version %d was live", res.GetVersion())), clean(d.Name), res.GetVersion())
	for _, t := range res.GetLeft() {
		entities := "entities"
		if t.GetEntities() > 0 {
			entities = count(int(t.GetEntities()), "entity", "entities")
		}
		c.pair("left behind", fmt.Sprintf("%s of the type %s", entities, t.GetType()))
	}
	c.printRevision(res.GetRevision())
	return nil
}
