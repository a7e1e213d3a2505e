package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/alecthomas/kong"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/cedarpost/cedarpost/internal/keyfile"
	"github.com/cedarpost/cedarpost/internal/secret"
	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/decisionlog"
	"github.com/cedarpost/cedarpost/store"
)

type keysCmd struct {
	List    listKeysCmd    `cmd:"" default:"withargs" help:"List the API keys."`
	Create  createKeyCmd   `cmd:"" help:"Make a caller with a key."`
	Rotate  rotateKeyCmd   `cmd:"" help:"Make a second key that replaces the first one."`
	Revoke  revokeKeyCmd   `cmd:"" help:"End the keys of a caller, or one key."`
	Recover recoverKeysCmd `cmd:"" help:"Make a key of an operator with the database, when nobody has one any more."`
}

type listKeysCmd struct {
	Caller string `arg:"" optional:"" help:"Only the keys of this caller."`
	outputFlags
	adminFlags
}

// Help is the long help of keys list.
func (*listKeysCmd) Help() string {
	return `LAST USED is the hour of the last use. A use is shown within about a minute.`
}

// Run lists the keys. As JSON, each key is a line.
func (l *listKeysCmd) Run(ctx context.Context, k *kong.Context, c *console) error {
	admin, err := l.dial()
	if err != nil {
		return err
	}
	rows := [][]string{{"CALLER", "ID", "MADE", "ENDS", "LAST USED"}}
	req := &cedarpostv1.ListKeysRequest{Caller: l.Caller, PageSize: 1000}
	found := 0
	for {
		res, err := call(ctx, admin, admin.access().ListKeys, req)
		if err != nil {
			return err
		}
		found += len(res.GetKeys())
		for _, k := range res.GetKeys() {
			if l.json() {
				if err := c.message(k); err != nil {
					return err
				}
				continue
			}
			rows = append(rows, []string{k.GetCaller(), k.GetId(), dateTime(k.GetCreatedAt(), ""), ends(k.GetExpiresAt(), k.GetExpired()), dateTime(k.GetLastUsedAt(), "never")})
		}
		if req.PageToken = res.GetNextPageToken(); req.PageToken == "" {
			break
		}
	}
	switch {
	case found == 0 && l.Caller != "" && isGuess(k, l.Caller):
		return misuse("no caller %q has keys, and there is no such command; the commands of keys are list, create, rotate, revoke and recover", l.Caller)
	case l.json():
	case len(rows) == 1 && l.Caller != "":
		fmt.Fprintf(c.out, "no keys of the caller %s\n", clean(l.Caller))
	case len(rows) == 1:
		fmt.Fprintln(c.out, "no keys")
	default:
		c.table(rows)
	}
	return nil
}

// isGuess reports whether a word is taken for the name of a caller only because no command has this name:
// the command line has no "list" before it.
func isGuess(k *kong.Context, word string) bool {
	return k != nil && slices.Index(k.Args, "list") < 0 && slices.Contains(k.Args, word)
}

func dateTime(t *timestamppb.Timestamp, none string) string {
	if t == nil {
		return none
	}
	return localTime(t)
}

func ends(t *timestamppb.Timestamp, ended bool) string {
	text := dateTime(t, "never")
	if ended {
		text += " (ended)"
	}
	return text
}

// expiryFlag says when something ends.
type expiryFlag struct {
	Expires end `help:"It ends after this time, such as 24h or 90d, or at this time: 2006-01-02T15:04:05Z, or 2006-01-02, when that day begins here (default: never)." placeholder:"TIME"`
}

// keyOutFlag says where a new key goes.
type keyOutFlag struct {
	Out string `required:"" help:"New file for the key (mode 0600). \"-\" prints it." placeholder:"FILE"`
}

// check fails before the key is made if the file cannot be written.
func (k keyOutFlag) check() error {
	if k.Out == "-" {
		return nil
	}
	if _, err := os.Lstat(k.Out); err == nil {
		return about("out", fmt.Errorf("%s exists already", k.Out))
	}
	probe, err := os.CreateTemp(filepath.Dir(k.Out), ".key-*")
	if bad, ok := errors.AsType[*fs.PathError](err); ok { // its path is that of the probe
		err = fmt.Errorf("no file can be made in %s: %w", filepath.Dir(k.Out), bad.Err)
	}
	if err != nil {
		return about("out", err)
	}
	return errors.Join(probe.Close(), os.Remove(probe.Name()))
}

// write writes the key. It must not be lost: the server has only its hash.
func (k keyOutFlag) write(c *console, secret string) error {
	if k.Out == "-" {
		fmt.Fprintln(c.out, secret)
		return nil
	}
	return keyfile.Write(k.Out, []byte(secret+"\n"))
}

type createKeyCmd struct {
	Caller string   `arg:"" help:"Name of the caller: letters, digits, dots, hyphens and underscores."`
	Roles  []string `name:"role" help:"A role of the caller: enforcer, data-writer, policy-author, policy-approver, policy-publisher, auditor, operator or break-glass. Can be given several times." placeholder:"ROLE"`
	Bundle string   `help:"The bundle that the roles are for, or '*' for all bundles and the service itself." placeholder:"BUNDLE"`
	keyOutFlag
	expiryFlag
	outputFlags
	adminFlags
}

// Help is the long help of keys create.
func (*createKeyCmd) Help() string {
	return `For example

  cedarpost keys create orders --role enforcer --bundle shop --out orders.key

The grants of the caller stay when the key ends: cedarpost grants changes them. --expires ends the key, not the grants. A program reads its key from the file (CEDARPOST_TOKEN_FILE).`
}

// Run makes the key.
func (k *createKeyCmd) Run(ctx context.Context, c *console) error {
	if (len(k.Roles) > 0) != (k.Bundle != "") {
		return misuse("give --role and --bundle together, or neither for a caller that has grants already")
	}
	if err := k.check(); err != nil {
		return err
	}
	admin, err := k.dial()
	if err != nil {
		return err
	}
	req := &cedarpostv1.CreateKeyRequest{Caller: k.Caller, ExpiresAt: k.Expires.timestamp()}
	for _, role := range k.Roles {
		req.Grants = append(req.Grants, &cedarpostv1.Grant{Role: role, Bundle: k.Bundle})
	}
	res, err := call(ctx, admin, admin.access().CreateKey, req)
	if err != nil {
		return err
	}
	c.warnings(res.GetWarnings())
	return k.report(c, k.outputFlags, res.GetKey(), res.GetSecret())
}

// report writes the key and says where it is.
func (k keyOutFlag) report(c *console, o outputFlags, key *cedarpostv1.Key, secret string) error {
	if k.Out == "-" && o.json() { // one object
		return c.message(&cedarpostv1.CreateKeyResponse{Key: key, Secret: secret})
	}
	if err := k.write(c, secret); err != nil {
		return fmt.Errorf("the key %s of %s was made, and its text is lost (revoke it with: cedarpost keys revoke --id %s): %w", key.GetId(), key.GetCaller(), key.GetId(), err)
	}
	if o.json() {
		return c.message(key)
	}
	if k.Out != "-" {
		fmt.Fprintf(c.out, "key %s of %s is in %s; it ends: %s\n", clean(key.GetId()), clean(key.GetCaller()), clean(relative(k.Out)), dateTime(key.GetExpiresAt(), "never"))
	}
	return nil
}

type rotateKeyCmd struct {
	Caller string `arg:"" help:"The caller."`
	keyOutFlag
	expiryFlag
	outputFlags
	adminFlags
}

// Help is the long help of keys rotate.
func (*rotateKeyCmd) Help() string {
	return `The old key keeps working, so that the programs of the caller can change over one by one. When "cedarpost keys list" shows that nobody uses it any more, end it with "cedarpost keys revoke --id ID".`
}

// Run makes the second key.
func (k *rotateKeyCmd) Run(ctx context.Context, c *console) error {
	if err := k.check(); err != nil {
		return err
	}
	admin, err := k.dial()
	if err != nil {
		return err
	}
	res, err := call(ctx, admin, admin.access().RotateKey, &cedarpostv1.RotateKeyRequest{Caller: k.Caller, ExpiresAt: k.Expires.timestamp()})
	if err != nil {
		return err
	}
	if err := k.report(c, k.outputFlags, res.GetKey(), res.GetSecret()); err != nil || k.json() {
		return err
	}
	for _, o := range res.GetOthers() {
		fmt.Fprintf(c.err, "when nobody uses the old key any more: cedarpost keys revoke --id %s\n", clean(o.GetId()))
	}
	return nil
}

type revokeKeyCmd struct {
	Caller string `arg:"" optional:"" help:"The caller, all of whose keys end."`
	ID     string `help:"Only the key with this id." placeholder:"ID"`
	Grants bool   `help:"Delete the grants of the caller, too, so that a later key of this name has no rights from before."`
	outputFlags
	adminFlags
}

// Run revokes.
func (k *revokeKeyCmd) Run(ctx context.Context, c *console) error {
	if (k.Caller == "") == (k.ID == "") {
		return misuse("give either the caller, all of whose keys end, or --id")
	}
	if k.Grants && k.Caller == "" {
		return misuse("--grants needs the caller, because grants belong to a caller and not to a key")
	}
	admin, err := k.dial()
	if err != nil {
		return err
	}
	res, err := call(ctx, admin, admin.access().RevokeKey, &cedarpostv1.RevokeKeyRequest{Caller: k.Caller, Id: k.ID})
	if err != nil {
		return err
	}
	for _, key := range res.GetRevoked() {
		if k.json() {
			if err := c.message(key); err != nil {
				return err
			}
			continue
		}
		fmt.Fprintf(c.out, "revoked key %s of %s\n", clean(key.GetId()), clean(key.GetCaller()))
		if key.GetCaller() == access.BootstrapName {
			fmt.Fprintln(c.err, "if the file of this key is the one of serve --bootstrap-key-file: remove the file and the setting")
		}
	}
	if k.Grants {
		return k.deleteGrants(ctx, c, admin)
	}
	if k.Caller != "" && !k.json() {
		fmt.Fprintf(c.err, "the grants of %s stay, for a next key: cedarpost grants %[1]s lists them, cedarpost grants delete ends them\n", clean(k.Caller))
	}
	return nil
}

// deleteGrants deletes the grants of the caller, each in a revision of its own.
func (k *revokeKeyCmd) deleteGrants(ctx context.Context, c *console, admin *peer) error {
	grants, err := admin.grantsOf(ctx, k.Caller)
	for _, g := range grants {
		if err != nil {
			break
		}
		one := deleteGrantCmd{grantArgs: grantArgs{Caller: g.GetCaller(), Role: g.GetRole(), Bundle: g.GetBundle()}, outputFlags: k.outputFlags}
		err = one.delete(ctx, c, admin)
	}
	if err != nil {
		return fmt.Errorf("the keys are revoked, and not all grants are deleted: %w", err)
	}
	return nil
}

type recoverKeysCmd struct {
	Caller string `help:"The caller that gets the key and the role operator for all bundles (default ${default})." default:"recovered" placeholder:"NAME"`
	keyOutFlag
	databaseFlags
}

// Help is the long help of keys recover.
func (*recoverKeysCmd) Help() string {
	return `It needs no server and no key, only the URL of the database with the login that migrates. It makes a key with the role operator for all bundles, of a caller that has no key and no grant yet. The log records that, as a change by the caller "recover".`
}

// Run makes the key.
func (k *recoverKeysCmd) Run(ctx context.Context, kc *kong.Context, c *console) error {
	if err := access.CheckCallerName(k.Caller); err != nil {
		return misuse("--caller: %v", err)
	}
	url, err := k.required(kc)
	if err != nil {
		return err
	}
	if err := k.check(); err != nil {
		return err
	}
	db, err := store.OpenOwner(ctx, store.Config{DatabaseURL: secret.New(url), Server: "cedarpost keys recover", Event: decisionlog.ChangeEvents("cedarpost keys recover")})
	if errors.Is(err, store.ErrRoles) {
		return errors.New("a key is recovered with the login that migrates: it has the role cedarpost_owner, and the login of this URL does not")
	}
	if err != nil {
		return err
	}
	defer db.Close()
	var id, secret string
	others := false // there is another operator
	_, err = db.ChangeAccess(ctx, access.RecoverName, func(_ context.Context, now store.Access) (change store.AccessChange, err error) {
		others = access.OperatorsLeft(now.Keys, now.Grants, time.Now()) > 0
		if change, secret, err = access.Recovery(now, k.Caller); err == nil {
			id = change.Add[0].ID
		}
		return change, err
	})
	if err != nil {
		return err
	}
	if err := k.write(c, secret); err != nil {
		return err
	}
	if k.Out != "-" {
		fmt.Fprintf(c.out, "key %s of %s, an operator of all bundles, is in %s\n", id, k.Caller, clean(relative(k.Out)))
	}
	if others {
		fmt.Fprintf(c.err, "%s: other operators of all bundles have keys; if this one is not needed: cedarpost keys revoke %s --grants\n", c.paint(yellow, "warning"), k.Caller)
	}
	return nil
}

// short joins the parts of a list for a table.
func short(list []string, none string) string {
	if len(list) == 0 {
		return none
	}
	return strings.Join(list, ", ")
}
