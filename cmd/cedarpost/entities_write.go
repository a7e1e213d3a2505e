package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/types/known/structpb"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
	"github.com/cedarpost/cedarpost/server/entityfile"
)

// conditionFlags are conditions on the entity at the moment of the write.
type conditionFlags struct {
	IfRevision string `name:"if-revision" help:"Only if the entity has not changed since this revision: the token that entities get prints." placeholder:"TOKEN"`
}

func (f conditionFlags) precondition() *cedarpostv1.Precondition {
	if f.IfRevision == "" {
		return nil
	}
	return &cedarpostv1.Precondition{Condition: &cedarpostv1.Precondition_IfRevision{IfRevision: &cedarpostv1.Revision{Token: f.IfRevision}}}
}

// writeEntities makes all changes in one write, and prints its revision.
func writeEntities(ctx context.Context, c *console, a adminFlags, o outputFlags, operations ...*cedarpostv1.EntityOperation) error {
	admin, err := a.dial()
	if err != nil {
		return err
	}
	res, err := call(ctx, admin, admin.entities().WriteEntities, &cedarpostv1.WriteEntitiesRequest{Operations: operations})
	if err != nil {
		return err
	}
	if o.json() {
		return c.message(res)
	}
	if res.GetChanged() == 0 {
		fmt.Fprintln(c.out, "nothing changed: it is stored like this already")
	} else {
		fmt.Fprintf(c.out, "changed %s\n", count(res.GetChanged(), "entity", "entities"))
	}
	c.printRevision(res.GetRevision())
	return nil
}

type putEntityCmd struct {
	outputFlags
	UID     uid    `arg:"" name:"uid" help:"The entity: Shop::User::bob."`
	Attrs   string `help:"Its attributes as a JSON object, or @FILE. Entities in it are like {\"__entity\": {\"type\": \"Shop::User\", \"id\": \"bob\"}}." placeholder:"JSON"`
	Tags    string `help:"Its tags as a JSON object, or @FILE." placeholder:"JSON"`
	Parents []uid  `name:"parent" help:"A group that it is in; repeat the flag for several." placeholder:"UID"`
	New     bool   `help:"Only if it is not stored yet."`
	conditionFlags
	adminFlags
}

// Help is the long help of put.
func (*putEntityCmd) Help() string {
	return `Creates the entity, or replaces it as a whole: what is not given is gone. To change a part of it, use entities set and entities move. For many entities, use entities import.

Example:

  cedarpost entities put Shop::User::dora --attrs '{"region": "eu", "suspended": false}' --parent Shop::Role::support`
}

// Run writes the entity.
func (p *putEntityCmd) Run(ctx context.Context, c *console) error {
	put := &cedarpostv1.Entity{Uid: p.UID.EntityUid, Parents: uids(p.Parents)}
	for _, part := range []struct {
		flag, text string
		into       **structpb.Struct
	}{{"--attrs", p.Attrs, &put.Attrs}, {"--tags", p.Tags, &put.Tags}} {
		if part.text == "" {
			continue
		}
		record, err := parseContext(part.text)
		if err != nil {
			return misuse("%s: %w", part.flag, err)
		}
		*part.into = record
	}
	op := &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_Put{Put: put}, Precondition: p.precondition()}
	if p.New {
		if p.IfRevision != "" {
			return misuse("--new and --if-revision cannot be given together")
		}
		op.Precondition = &cedarpostv1.Precondition{Condition: &cedarpostv1.Precondition_MustNotExist{MustNotExist: true}}
	}
	return writeEntities(ctx, c, p.adminFlags, p.outputFlags, op)
}

type setEntityCmd struct {
	outputFlags
	UID    uid      `arg:"" name:"uid" help:"The entity: Shop::User::bob."`
	Attrs  []string `arg:"" optional:"" name:"attribute" help:"An attribute with its value as JSON: level=3, 'region=\"eu\"'. A value that is no JSON is a string: region=eu."`
	Remove []string `help:"An optional attribute to remove; repeat the flag for several." placeholder:"NAME"`
	conditionFlags
	adminFlags
}

// Help is the long help of set.
func (*setEntityCmd) Help() string {
	return `Sets and removes single attributes of a stored entity. All others stay. A value replaces the whole attribute, also a record or a set.

Example:

  cedarpost entities set Shop::User::dora suspended=true region=us`
}

// Run writes the attributes.
func (s *setEntityCmd) Run(ctx context.Context, c *console) error {
	set := &cedarpostv1.SetAttributes{Uid: s.UID.EntityUid, Remove: s.Remove, Attrs: &structpb.Struct{Fields: map[string]*structpb.Value{}}}
	for _, text := range s.Attrs {
		name, value, ok := strings.Cut(text, "=")
		if !ok || name == "" {
			return misuse("%q is not an attribute with its value, like level=3", text)
		}
		if _, twice := set.Attrs.Fields[name]; twice {
			return misuse("the attribute %s is given twice", name)
		}
		v, err := attributeValue(value)
		if err != nil {
			return misuse("%s: %w", name, err)
		}
		set.Attrs.Fields[name] = v
	}
	if len(s.Attrs)+len(s.Remove) == 0 {
		return misuse("give an attribute to set, like level=3, or --remove NAME")
	}
	return writeEntities(ctx, c, s.adminFlags, s.outputFlags,
		&cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_SetAttributes{SetAttributes: set}, Precondition: s.precondition()})
}

// attributeValue reads a value as JSON. What does not look like JSON is a string.
func attributeValue(text string) (*structpb.Value, error) {
	record, err := entityfile.ParseRecord([]byte(`{"v":` + text + `}`))
	if v := record.GetFields()["v"]; err == nil && v != nil && len(record.GetFields()) == 1 {
		return v, nil
	}
	if strings.ContainsAny(text, `{}[]"`) { // it looks like JSON, so a string is not what is meant
		return nil, errors.New(`the value is not valid JSON; quote a string: '"…"'`)
	}
	return structpb.NewStringValue(text), nil
}

type moveEntityCmd struct {
	outputFlags
	UID  uid   `arg:"" name:"uid" help:"The entity: Shop::User::bob."`
	From []uid `help:"A group to leave; repeat the flag for several." placeholder:"UID"`
	To   []uid `help:"A group to join; repeat the flag for several." placeholder:"UID"`
	conditionFlags
	adminFlags
}

// Help is the long help of move.
func (*moveEntityCmd) Help() string {
	return `Changes which groups a stored entity is in, in one write: it is never in both groups, nor in neither. Other groups stay.

Example:

  cedarpost entities move Shop::User::dora --from Shop::Role::support --to Shop::Role::manager`
}

// Run writes the parents.
func (m *moveEntityCmd) Run(ctx context.Context, c *console) error {
	var ops []*cedarpostv1.EntityOperation
	if len(m.To) > 0 {
		ops = append(ops, &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_AddParents{
			AddParents: &cedarpostv1.ChangeParents{Uid: m.UID.EntityUid, Parents: uids(m.To)}}})
	}
	if len(m.From) > 0 {
		ops = append(ops, &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_RemoveParents{
			RemoveParents: &cedarpostv1.ChangeParents{Uid: m.UID.EntityUid, Parents: uids(m.From)}}})
	}
	if i := slices.IndexFunc(m.From, func(u uid) bool {
		return slices.ContainsFunc(m.To, func(o uid) bool { return uidText(o.EntityUid) == uidText(u.EntityUid) })
	}); i >= 0 {
		return misuse("%s is both in --from and in --to", uidText(m.From[i].EntityUid))
	}
	if len(ops) == 0 {
		return misuse("give --to, --from or both")
	}
	ops[0].Precondition = m.precondition()
	return writeEntities(ctx, c, m.adminFlags, m.outputFlags, ops...)
}

type deleteEntityCmd struct {
	outputFlags
	UIDs    []uid `arg:"" name:"uid" help:"The entities: Shop::User::bob."`
	Cascade bool  `help:"Also remove every membership in them. Without this, an entity that others are in is not deleted."`
	adminFlags
}

// Help is the long help of delete.
func (*deleteEntityCmd) Help() string {
	return `Deletes all of the entities, or none. An entity that is not stored is not an error.`
}

// Run deletes.
func (d *deleteEntityCmd) Run(ctx context.Context, c *console) error {
	var ops []*cedarpostv1.EntityOperation
	for _, u := range d.UIDs {
		ops = append(ops, &cedarpostv1.EntityOperation{Operation: &cedarpostv1.EntityOperation_Delete{
			Delete: &cedarpostv1.DeleteEntity{Uid: u.EntityUid, Cascade: d.Cascade}}})
	}
	return writeEntities(ctx, c, d.adminFlags, d.outputFlags, ops...)
}

func uids(list []uid) (out []*cedarpostv1.EntityUid) {
	for _, u := range list {
		out = append(out, u.EntityUid)
	}
	return out
}
