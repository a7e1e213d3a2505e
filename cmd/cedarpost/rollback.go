package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"connectrpc.com/connect/v2"
	"connectrpc.com/connect/v2/connectproto"
	"google.golang.org/protobuf/proto"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

type rollbackCmd struct {
	outputFlags
	Bundle  string `arg:"" help:"Name of the bundle."`
	Version int64  `arg:"" help:"Number of the version whose files are published again (cedarpost versions lists them)."`
	Reason  string `required:"" help:"Why, for the log and the list of versions." placeholder:"TEXT"`

	AllowBreaking bool `help:"Publish also if callers who ask as before would break."`
	waitFlags
	adminFlags
}

// Help is the long help of rollback.
func (*rollbackCmd) Help() string {
	return `Publishes the files of an earlier version as a new version, and freezes the bundle: until "cedarpost unfreeze", no apply and no change is published, so that a pipeline cannot publish the fault again. Nothing is published if stored entities do not fit the schema of the earlier version; then they are named, if you may read them.`
}

// Run rolls back.
func (r *rollbackCmd) Run(ctx context.Context, c *console) error {
	if r.Version < 1 {
		return misuse("%d is not the number of a version", r.Version)
	}
	if strings.TrimSpace(r.Reason) == "" {
		return misuse("--reason must say why")
	}
	admin, err := r.dial()
	if err != nil {
		return err
	}
	// Checking a bundle may take longer than other calls.
	res, err := admin.policies().RollbackVersion(ctx, &cedarpostv1.RollbackVersionRequest{Bundle: r.Bundle, Version: r.Version, Reason: r.Reason, AllowBreaking: r.AllowBreaking})
	if err != nil {
		return c.refusedPublish(admin, err, r.Bundle, r.json())
	}
	if r.json() {
		if err := c.message(res); err != nil {
			return err
		}
		return r.forServers(ctx, c, admin, r.Bundle, res.GetBundle().GetVersion())
	}
	c.printFindings(c.out, r.Bundle, findingsFromProto(res.GetWarnings()))
	fmt.Fprintf(c.out, "%s: %s with the files of version %d, and frozen; `cedarpost unfreeze %s` ends that\n",
		clean(r.Bundle), c.paint(green, fmt.Sprintf("published version %d", res.GetBundle().GetVersion())), r.Version, clean(r.Bundle))
	c.pair("digest", res.GetBundle().GetDigest())
	c.printRevision(res.GetRevision())
	return r.forServers(ctx, c, admin, r.Bundle, res.GetBundle().GetVersion())
}

// refusedPublish explains an error of a publish. If it has findings, they are printed; place is where
// they are.
func (c *console) refusedPublish(admin *peer, err error, place string, asJSON bool) error {
	details, _ := detailOf[*cedarpostv1.BundleFindings](err)
	e, _ := errors.AsType[*connect.Error](err)
	if len(details.GetFindings()) == 0 {
		return admin.explain(err)
	}
	if asJSON {
		if err := c.message(details); err != nil {
			return err
		}
	}
	found := findingsFromProto(details.GetFindings())
	c.printFindings(c.err, place, found)
	return &exitError{max(severe(found), codeInvalid), fmt.Errorf("refused, nothing changed: %s", headline(e.Message()))}
}

// detailOf returns the detail of a type that an error of a call has.
func detailOf[T proto.Message](err error) (detail T, ok bool) {
	e, _ := errors.AsType[*connect.Error](err)
	if e == nil {
		return detail, false
	}
	for _, d := range e.Details() {
		m, derr := connectproto.UnmarshalErrorDetail(d)
		if detail, ok = m.(T); derr == nil && ok {
			return detail, true
		}
	}
	return detail, false
}

type freezeCmd struct {
	outputFlags
	Bundle string `arg:"" help:"Name of the bundle."`
	Reason string `help:"Why: publishers read it in the error that refuses their publish." placeholder:"TEXT"`
	adminFlags
}

// Help is the long help of freeze.
func (*freezeCmd) Help() string {
	return `Keeps a bundle as it is: until "cedarpost unfreeze", an apply and the publish of a change fail. A rollback is still possible.`
}

// Run freezes.
func (f *freezeCmd) Run(ctx context.Context, c *console) error {
	admin, err := f.dial()
	if err != nil {
		return err
	}
	res, err := call(ctx, admin, admin.policies().FreezeBundle, &cedarpostv1.FreezeBundleRequest{Bundle: f.Bundle, Reason: f.Reason})
	if err != nil || f.json() {
		return orMessage(c, res, err)
	}
	outcome := "frozen"
	if !res.GetChanged() {
		outcome = "was frozen already"
	}
	fmt.Fprintf(c.out, "%s: %s\n", clean(f.Bundle), outcome)
	c.printFreeze(res.GetFreeze())
	return nil
}

func (c *console) printFreeze(f *cedarpostv1.BundleFreeze) {
	if f != nil {
		c.pair("frozen", localTime(f.GetAt())+" by "+f.GetCaller())
		c.pair("reason", f.GetReason())
	}
}

type unfreezeCmd struct {
	outputFlags
	Bundle string `arg:"" help:"Name of the bundle."`
	Reason string `help:"Why, for the log." placeholder:"TEXT"`
	adminFlags
}

// Run ends a freeze.
func (u *unfreezeCmd) Run(ctx context.Context, c *console) error {
	admin, err := u.dial()
	if err != nil {
		return err
	}
	res, err := call(ctx, admin, admin.policies().UnfreezeBundle, &cedarpostv1.UnfreezeBundleRequest{Bundle: u.Bundle, Reason: u.Reason})
	if err == nil && !res.GetChanged() {
		err = admin.knows(ctx, u.Bundle)
	}
	if err != nil || u.json() {
		return orMessage(c, res, err)
	}
	outcome := "not frozen any more"
	if !res.GetChanged() {
		outcome = "was not frozen"
	}
	fmt.Fprintf(c.out, "%s: %s\n", clean(u.Bundle), outcome)
	return nil
}
