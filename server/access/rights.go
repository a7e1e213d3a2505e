package access

import (
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/cedar-policy/cedar-go"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/cedarpost/cedarpost/bundle"
	"github.com/cedarpost/cedarpost/internal/entityuid"
	"github.com/cedarpost/cedarpost/policies"
	"github.com/cedarpost/cedarpost/server/engine"
	"github.com/cedarpost/cedarpost/server/offline"
	"github.com/cedarpost/cedarpost/store"
)

// The roles that a grant can give. policies/admin says what each may do.
const (
	Enforcer        = "enforcer"
	DataWriter      = "data-writer"
	PolicyAuthor    = "policy-author"
	PolicyApprover  = "policy-approver"
	PolicyPublisher = "policy-publisher"
	Auditor         = "auditor"
	Operator        = "operator"
	BreakGlass      = "break-glass"
)

// Roles lists the roles.
func Roles() []string { return slices.Clone(roles) }

var roles = []string{Enforcer, DataWriter, PolicyAuthor, PolicyApprover, PolicyPublisher, Auditor, Operator, BreakGlass}

// AllBundles is the bundle of a grant that is for all bundles and for the service itself.
const AllBundles = "*"

// reserved are the bundles that join the decisions about others. To change one, a grant must name
// it: one for all bundles does not do.
var reserved = []string{engine.Guardrails, engine.AdminLocal}

// AllGrants returns the grants that give a caller all roles, for all bundles and for those that
// join the decisions of others. by is the caller that gives them.
func AllGrants(caller, by string) []store.Grant {
	var list []store.Grant
	for _, role := range roles {
		list = append(list, store.Grant{Caller: caller, Role: role, Bundle: AllBundles, GrantedBy: by})
	}
	for _, b := range reserved {
		for _, role := range []string{PolicyPublisher, BreakGlass} {
			list = append(list, store.Grant{Caller: caller, Role: role, Bundle: b, GrantedBy: by})
		}
	}
	return list
}

// roleSet has a bit for each of roles.
type roleSet uint16

func roleOf(name string) roleSet {
	if i := slices.Index(roles, name); i >= 0 {
		return 1 << i
	}
	return 0
}

// Target is what a call is about. The zero value is the service itself: all bundles, keys, grants
// and the log.
type Target struct {
	// Bundle is the name of a bundle, or "" for the service itself.
	Bundle string
	// Action is the Cedar action of a question; zero if the call has none.
	Action cedar.EntityUID
	// EntityType is the type of an entity that is written or read; "" if there is none, and
	// AllTypes for entities of any type.
	EntityType string
	// Changes says that the call changes the policies of the bundle.
	Changes bool
}

// AllTypes is the EntityType of a [Target] for which a grant must not be narrowed to types.
const AllTypes = "*"

// aboutAll reports whether a call about the target is about all bundles, and not about an action or a
// type of none.
func (t Target) aboutAll() bool {
	return t.Bundle == "" && t.Action == (cedar.EntityUID{}) && (t.EntityType == "" || t.EntityType == AllTypes || t.EntityType == store.GrantType)
}

// covers reports whether a grant is for a target. No grant is for the bundle admin, which is built in.
func covers(g *store.Grant, t Target) bool {
	switch {
	case t.Bundle == engine.Admin:
		return false
	case g.Bundle == AllBundles:
		if t.Changes && slices.Contains(reserved, t.Bundle) {
			return false
		}
	case g.Bundle != t.Bundle:
		return false
	}
	return (g.Actions == nil || t.Action == (cedar.EntityUID{}) || slices.Contains(g.Actions, t.Action.String())) &&
		(g.EntityTypes == nil || t.EntityType == "" || slices.Contains(g.EntityTypes, t.EntityType))
}

// Decider decides by the policies of the admin bundle and those of admin-local which role may do
// what. It is safe for concurrent use.
type Decider struct {
	builtIn *engine.Set // without admin-local
	set     *engine.Set
	local   bool // there is an admin-local
	// apart are the bundles that the policies of admin-local can tell apart: each that they name, and
	// one that stands for all others. Bundles have no attributes and no parents.
	apart []string

	mu   sync.RWMutex
	memo map[memoKey]actions
}

// memoKey is what a set of rights depends on. caller is "" if no policy can look at it.
type memoKey struct {
	caller, bundle string
	roles          roleSet
}

// actions are the actions that are permitted, and those that policies forbid.
type actions map[string]verdict

// verdict is the decision on one action.
type verdict struct {
	permitted bool
	forbids   []string // policies of admin-local, as bundle/id
}

// maxMemo bounds the sets of rights that are kept. Callers with tokens are not bounded.
const maxMemo = 4096

var adminSource = sync.OnceValue(func() engine.Source {
	b, err := bundle.Read(policies.Admin(), engine.Admin)
	if err != nil {
		panic(err) // it is embedded, and tested
	}
	return offline.Source(b)
})

// AdminSource is the source of the admin bundle, against which admin-local is checked.
func AdminSource() engine.Source {
	src := adminSource()
	src.Published = true
	return src
}

// NewDecider compiles the policies of the admin bundle and those of admin-local, which may be nil.
func NewDecider(local *engine.Source) (*Decider, error) {
	compile := func(sources ...engine.Source) (*engine.Set, error) {
		set, findings := engine.Load(sources, nil)
		if set == nil {
			return nil, fmt.Errorf("the rights of callers: %s", findings[0])
		}
		return set, nil
	}
	d := &Decider{memo: map[memoKey]actions{}, local: local != nil}
	var err error
	if d.builtIn, err = compile(AdminSource()); err != nil {
		return nil, err
	}
	if d.set = d.builtIn; local == nil {
		return d, nil
	}
	if d.set, err = compile(AdminSource(), *local); err != nil {
		return nil, err
	}
	d.apart = []string{anyOther}
	for _, uid := range d.set.Literals(engine.AdminLocal) {
		if uid.Type == ownNamespace+"Bundle" && uid.ID != "" && string(uid.ID) != engine.Admin {
			d.apart = append(d.apart, string(uid.ID))
		}
	}
	return d, nil
}

// anyOther stands for the bundles that no policy of admin-local names. No bundle has this name.
const anyOther = "?"

// everywhere reports whether a caller with these roles may do an action on the service and on each
// bundle: a forbid about one bundle is also about calls that are about all.
func (d *Decider) everywhere(caller string, roles roleSet, action string) bool {
	if !d.permits(caller, roles, action, Target{}) {
		return false
	}
	for _, name := range d.apart {
		if !d.permits(caller, roles, action, Target{Bundle: name}) {
			return false
		}
	}
	return true
}

// unforbiddable reports whether policies of admin-local do not count: without this, they could lock
// all operators out for ever. WhoAmI is the call that says what a caller may do.
func unforbiddable(action string, t Target) bool {
	return action == "PutGrant" || action == "WhoAmI" || t.Changes && t.Bundle == engine.AdminLocal
}

// permits reports whether a caller with these roles may do an action.
func (d *Decider) permits(caller string, roles roleSet, action string, t Target) bool {
	return d.decide(caller, roles, action, t).permitted
}

// decide decides whether a caller with these roles may do an action.
func (d *Decider) decide(caller string, roles roleSet, action string, t Target) verdict {
	if d == nil {
		return verdict{}
	}
	key := memoKey{bundle: t.Bundle, roles: roles}
	set := d.builtIn
	if d.local && !unforbiddable(action, t) {
		key.caller, set = caller, d.set
		if key.caller == "" {
			return verdict{} // the zero Caller is no caller
		}
	}
	return d.lookUp(set, caller, key)[action]
}

// lookUp returns what a set of policies permits, from the memo if it is there.
func (d *Decider) lookUp(set *engine.Set, caller string, key memoKey) actions {
	d.mu.RLock()
	may, ok := d.memo[key]
	d.mu.RUnlock()
	if !ok {
		may = evaluate(set, caller, key.roles, key.bundle)
		d.mu.Lock()
		if len(d.memo) >= maxMemo {
			clear(d.memo)
		}
		d.memo[key] = may
		d.mu.Unlock()
	}
	return may
}

const ownNamespace = store.OwnNamespace + "::"

// evaluate asks the engine about each action. What cannot be decided is not permitted.
func evaluate(set *engine.Set, caller string, held roleSet, name string) actions {
	principal := cedar.NewEntityUID(ownNamespace+"Caller", cedar.String(caller))
	resource := cedar.NewEntityUID(ownNamespace+"Bundle", cedar.String(name))
	if name == "" {
		resource = cedar.NewEntityUID(ownNamespace+"Service", "cedarpost")
	}
	var parents []cedar.EntityUID
	for i, role := range roles {
		if held&(1<<i) != 0 {
			parents = append(parents, cedar.NewEntityUID(ownNamespace+"Role", cedar.String(role)))
		}
	}
	may := actions{}
	for _, action := range Actions() {
		pool := engine.NewPool()
		pool.Add(nil, []engine.Entity{{UID: principal, Parents: parents}, {UID: resource}})
		ask := engine.Ask{Principal: principal, Action: cedar.NewEntityUID(ownNamespace+"Action", cedar.String(action)), Resource: resource}
		e, err := set.Prepare(ask, pool, func(missing []cedar.EntityUID) error {
			pool.Add(missing, nil)
			return nil
		})
		if err != nil {
			continue
		}
		res, err := e.Decide()
		if err != nil {
			continue
		}
		v := verdict{permitted: res.Allowed}
		for _, p := range res.Policies {
			if !v.permitted && p.Bundle == engine.AdminLocal { // it has forbids only
				v.forbids = append(v.forbids, p.Bundle+"/"+p.ID)
			}
		}
		may[action] = v
	}
	return may
}

// Actions lists the actions of the admin bundle by name: one for each RPC, CheckBundle
// and BreakGlass.
func Actions() []string { return slices.Clone(adminActions()) }

var adminActions = sync.OnceValue(func() []string {
	set, _ := engine.Load([]engine.Source{AdminSource()}, nil)
	var list []string
	for _, uid := range set.Actions() {
		list = append(list, string(uid.ID))
	}
	slices.Sort(list)
	return list
})

// Rights are what one caller may do, by its grants and by the policies of one moment.
type Rights struct {
	caller  string
	grants  []store.Grant // live ones
	decider *Decider
}

// NewRights returns the rights of a caller by its grants, of which those that have ended do not
// count.
func NewRights(caller string, grants []store.Grant, d *Decider, now time.Time) *Rights {
	r := &Rights{caller: caller, grants: grants, decider: d}
	ended := func(g store.Grant) bool { return !g.Live(now) }
	if slices.ContainsFunc(grants, ended) {
		r.grants = slices.DeleteFunc(slices.Clone(grants), ended)
	}
	return r
}

// Caller returns the name of the caller.
func (r *Rights) Caller() string { return r.caller }

// Grants returns the grants that count.
func (r *Rights) Grants() []store.Grant { return r.grants }

// checksPerSecond returns the rate limit of the caller, or 0 if no grant has one.
func (r *Rights) checksPerSecond() (most int32) {
	for i := range r.grants {
		most = max(most, r.grants[i].ChecksPerSecond)
	}
	return most
}

// May reports whether the caller may do an action on a target. On the service itself, it says nothing
// about single bundles, see [Rights.MayAll].
func (r *Rights) May(action string, t Target) bool {
	// Without a role the policies still decide: everyone may ask who they are.
	return r.decider.permits(r.caller, r.held(t), action, t)
}

// MayAll is May, but if a call about the target is about all bundles, the caller must be permitted the
// action on each of them, too.
func (r *Rights) MayAll(action string, t Target) bool {
	if !t.aboutAll() {
		return r.May(action, t)
	}
	return r.decider.everywhere(r.caller, r.held(t), action)
}

// held returns the roles of the grants that cover a target.
func (r *Rights) held(t Target) (held roleSet) {
	for i := range r.grants {
		if g := &r.grants[i]; covers(g, t) {
			held |= roleOf(g.Role)
		}
	}
	return held
}

// Forbidden lists the policies of admin-local that forbid an action on a target, which the roles of
// the caller permit, as bundle/id. If the target is all bundles, these are the policies for the first
// one that they forbid.
func (r *Rights) Forbidden(action string, t Target) []string {
	held := r.held(t)
	if r.decider == nil || !r.decider.local || !r.decider.lookUp(r.decider.builtIn, r.caller, memoKey{bundle: t.Bundle, roles: held})[action].permitted {
		return nil
	}
	list := r.decider.decide(r.caller, held, action, t).forbids
	if t.aboutAll() {
		for _, name := range r.decider.apart {
			if len(list) == 0 {
				list = r.decider.decide(r.caller, held, action, Target{Bundle: name}).forbids
			}
		}
	}
	return list
}

// ForbiddenSomewhere is Forbidden for the first target on which a policy forbids the action.
func (r *Rights) ForbiddenSomewhere(action string) []string {
	if list := r.Forbidden(action, Target{}); list != nil {
		return list
	}
	for _, g := range r.grants {
		if g.Bundle == AllBundles {
			continue
		}
		if list := r.Forbidden(action, Target{Bundle: g.Bundle, Changes: true}); list != nil {
			return list
		}
	}
	return nil
}

// MaySomewhere reports whether the caller may do an action on any target.
func (r *Rights) MaySomewhere(action string) bool {
	if r.May(action, Target{}) {
		return true
	}
	return slices.ContainsFunc(r.grants, func(g store.Grant) bool {
		return g.Bundle != AllBundles && (r.May(action, Target{Bundle: g.Bundle}) || r.May(action, Target{Bundle: g.Bundle, Changes: true}))
	})
}

// MayEverywhere reports whether the caller may do an action on the service itself and on every bundle,
// without a grant that is narrowed.
func (r *Rights) MayEverywhere(action string) bool {
	var held roleSet
	for i := range r.grants {
		if g := &r.grants[i]; covers(g, Target{}) && g.Actions == nil && g.EntityTypes == nil {
			held |= roleOf(g.Role)
		}
	}
	return r.decider.everywhere(r.caller, held, action)
}

// Permitted lists the actions that the caller may do on a target, sorted.
func (r *Rights) Permitted(t Target) []string {
	var list []string
	for _, action := range adminActions() {
		if r.May(action, t) {
			list = append(list, action)
		}
	}
	return list
}

// Governs reports whether the caller may do an action that manages a grant for a bundle, or the keys
// of a caller that has one: it is an operator of that bundle, or of all, and may do the action there.
// So forbids about the bundle apply to the action, though never to PutGrant itself. A key of a caller
// with a grant for all bundles is about each of them.
func (r *Rights) Governs(action, bundle string) bool {
	if bundle == AllBundles && (action == "CreateKey" || action == "RotateKey") {
		return r.May("PutGrant", Target{}) && r.MayAll(action, Target{})
	}
	t := GrantTarget(bundle)
	return r.May("PutGrant", t) && r.May(action, t)
}

// GrantTarget returns what calls about grants for a bundle are about: that bundle, or the service itself
// for all bundles and for those that join the decisions about others.
func GrantTarget(bundle string) Target {
	if bundle == AllBundles || slices.Contains(reserved, bundle) {
		return Target{}
	}
	return Target{Bundle: bundle}
}

// GivesUntil returns when the grants end by which the caller may do an action on a target; nil: never.
// What the caller gives by them must not last longer. A grant that comes with a token ends with the
// token only for what the caller gives itself: the issuer gives it again with the next token.
func (r *Rights) GivesUntil(action string, t Target, itself bool) (end *time.Time) {
	for i := range r.grants {
		g := &r.grants[i]
		if !covers(g, t) || !r.decider.permits(r.caller, roleOf(g.Role), action, t) {
			continue
		}
		if stored := g.Since > 0; g.ExpiresAt == nil || !stored && !itself {
			return nil
		}
		if end == nil || g.ExpiresAt.After(*end) {
			end = g.ExpiresAt
		}
	}
	return end
}

// OperatorsLeft says whether an API key with the role operator for all bundles is left: 2 if there is
// one without an end, 1 if there is one that has not ended yet, and 0 if there is none.
func OperatorsLeft(keys []store.Key, grants []store.Grant, now time.Time) (level int) {
	for _, g := range grants {
		if g.Role != Operator || g.Bundle != AllBundles || !g.Live(now) {
			continue
		}
		for _, k := range keys {
			switch {
			case k.Name != g.Caller || !k.Live(now):
			case k.ExpiresAt == nil && g.ExpiresAt == nil:
				return 2
			default:
				level = 1
			}
		}
	}
	return level
}

// NeedlessBootstrap reports whether the first key still lives although another operator of all bundles
// has a key without an end.
func NeedlessBootstrap(keys []store.Key, grants []store.Grant, now time.Time) bool {
	first := func(k store.Key) bool { return k.Name == BootstrapName && k.Live(now) }
	return slices.ContainsFunc(keys, first) && OperatorsLeft(slices.DeleteFunc(slices.Clone(keys), first), grants, now) == 2
}

// callerName is the form of the name of a caller with an API key. Names of other kinds of callers
// have a colon.
var callerName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`)

// CheckCallerName returns an error if a name cannot be that of a caller with an API key.
func CheckCallerName(name string) error {
	switch {
	case name == RecoverName:
		return fmt.Errorf("%q is the name of recoveries in the log (cedarpost keys recover), so no caller has it; take another name", name)
	case !callerName.MatchString(name):
		return fmt.Errorf("a caller has a name of at most 64 letters, digits, dots, hyphens and underscores, which begins with a letter or a digit, not %q", name)
	}
	return nil
}

// CheckAnyCallerName returns an error if a name cannot be that of a caller of any kind.
func CheckAnyCallerName(name string) error {
	kind, rest, other := strings.Cut(name, ":")
	switch {
	case !other:
		return CheckCallerName(name)
	case kind == "token":
		if issuer, subject, ok := strings.Cut(rest, "/"); !ok || subject == "" || !issuerName.MatchString(issuer) {
			return fmt.Errorf("%q is not token:<issuer>/<subject>, with the short name of an issuer", name)
		}
	case kind+":" == certificatePrefix:
		if !isHostName(rest) {
			return fmt.Errorf("%q is not certificate:<DNS name>, in lower case and without a wildcard", name)
		}
	case kind == "spiffe":
		if id, err := spiffeid.FromString(name); err != nil || id.Path() == "" {
			return fmt.Errorf("%q is not a SPIFFE ID like spiffe://example.org/orders, with a trust domain in lower case", name)
		}
	default:
		return fmt.Errorf("%q begins with none of token:, certificate: and spiffe:, and the name of an API key's caller has no colon", name)
	}
	return nil
}

// maxNarrowed bounds the actions and the entity types of a grant.
const maxNarrowed = 100

// CheckGrant returns an error if a grant makes no sense. The error is for the caller.
func CheckGrant(g store.Grant) error {
	switch {
	case g.Caller == "" || len(g.Caller) > 512 || strings.ContainsAny(g.Caller, "\x00\n\r"):
		return errors.New("a grant names a caller, in one line of at most 512 bytes")
	case roleOf(g.Role) == 0:
		return fmt.Errorf("there is no role %q; the roles are %s", g.Role, strings.Join(roles, ", "))
	case g.Bundle != AllBundles && !bundleName.MatchString(g.Bundle):
		return fmt.Errorf("a grant is for the name of a bundle, or for \"*\", not for %q", g.Bundle)
	case g.Actions != nil && g.Role != Enforcer:
		return fmt.Errorf("only the role %s can be narrowed to actions", Enforcer)
	case g.EntityTypes != nil && g.Role != DataWriter:
		return fmt.Errorf("only the role %s can be narrowed to entity types", DataWriter)
	case g.ChecksPerSecond != 0 && g.Role != Enforcer:
		return fmt.Errorf("only the role %s can have checks_per_second", Enforcer)
	case g.ChecksPerSecond < 0:
		return errors.New("checks_per_second: it must not be negative")
	case len(g.Actions) > maxNarrowed || len(g.EntityTypes) > maxNarrowed:
		return fmt.Errorf("a grant can be narrowed to %d actions or entity types at most", maxNarrowed)
	}
	for _, action := range g.Actions {
		typ, _, err := entityuid.Parse(action)
		if err != nil {
			return fmt.Errorf(`actions: %q is not an action like Shop::Action::"ViewOrder": %w`, action, err)
		}
		// The type of an action has the name Action, in any namespace (https://docs.cedarpolicy.com/schema/human-readable-schema.html).
		if typ != "Action" && !strings.HasSuffix(typ, "::Action") {
			return fmt.Errorf(`actions: %s is not an action: its type is not Action, or Action in a namespace, like Shop::Action`, action)
		}
	}
	for _, typ := range g.EntityTypes {
		if !entityuid.ValidType(typ) {
			return fmt.Errorf("entity_types: %q is not an entity type like Shop::Order", typ)
		}
	}
	return nil
}

// CheckTokenGrant returns an error if no token can have a grant.
func CheckTokenGrant(g TokenGrant) error {
	return CheckGrant(store.Grant{Caller: "token", Role: g.Role, Bundle: g.Bundle})
}

var bundleName = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,63}$`)
