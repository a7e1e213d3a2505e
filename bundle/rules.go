package bundle

import (
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v4"

	"github.com/cedarpost/cedarpost/internal/days"
)

// Rules are what bundle.yaml asks for before a version of the bundle is published. The zero value asks
// for nothing.
type Rules struct {
	// Approvals is how many callers must approve a change of the bundle before it is published.
	Approvals int
	// ApprovalsExpire is how long an approval counts; 0: [DefaultApprovalsExpire].
	ApprovalsExpire time.Duration
	// Impact asks for a report of the impact of a change, and for approvals that name one.
	Impact bool
	// Freeze are windows of time in which the bundle is not published.
	Freeze []FreezeWindow
	// Unread says what cannot be read of a bundle.yaml that was published; "": nothing. It is set by
	// [ReadRules] only.
	Unread string
}

const (
	approvalsKey       = "approvals"
	approvalsExpireKey = "approvals_expire"
	impactKey          = "impact"
	freezeKey          = "freeze"

	maxApprovals = 100
)

// impactRequired is the only value of impact.
const impactRequired = "required"

// DefaultApprovalsExpire is how long an approval counts if bundle.yaml does not say it.
const DefaultApprovalsExpire = 30 * days.Day

// The shortest and the longest time that an approval can count.
const (
	minApprovalsExpire = time.Hour
	maxApprovalsExpire = 365 * days.Day
)

// Expire returns how long an approval counts.
func (r Rules) Expire() time.Duration {
	if r.ApprovalsExpire == 0 {
		return DefaultApprovalsExpire
	}
	return r.ApprovalsExpire
}

// Stricter returns the rules that are as strict as both: the larger number of approvals, the shorter time
// that they count, the windows of both.
func (r Rules) Stricter(o Rules) Rules {
	out := Rules{Approvals: max(r.Approvals, o.Approvals), ApprovalsExpire: min(r.Expire(), o.Expire()), Impact: r.Impact || o.Impact, Unread: r.Unread}
	if out.Unread == "" {
		out.Unread = o.Unread
	}
	for _, w := range slices.Concat(r.Freeze, o.Freeze) {
		i := slices.IndexFunc(out.Freeze, w.same)
		if i < 0 {
			out.Freeze = append(out.Freeze, w)
		} else if w.KeptOf == 0 {
			out.Freeze[i].KeptOf = 0
		}
	}
	return out
}

// same reports whether two windows are the same, wherever they come from.
func (w FreezeWindow) same(o FreezeWindow) bool {
	w.KeptOf, o.KeptOf = 0, 0
	return w == o
}

// rule reads a key of bundle.yaml that is about rules for publishing. known is false for another key.
func (y yamlFile) rule(r *Rules, key string, v *yaml.Node) (known bool) {
	switch key {
	case approvalsKey:
		r.Approvals = y.approvals(v)
	case approvalsExpireKey:
		r.ApprovalsExpire = y.duration(v, approvalsExpireKey, minApprovalsExpire, maxApprovalsExpire)
	case impactKey:
		r.Impact = y.oneOf(v, impactKey, strings.ToLower, impactRequired) == impactRequired
	case freezeKey:
		r.Freeze = y.freezeWindows(v)
	default:
		return false
	}
	return true
}

// ReadRules reads the rules of a bundle.yaml that was published. It does not look at the other settings.
// A number of approvals that it cannot read counts as 1, because the file asks for approvals: an earlier
// version of the service did not read it. What else it cannot read, such as a rule of a later version, is
// in Unread.
func ReadRules(manifest []byte) (r Rules) {
	var probs Problems
	y := yamlFile{path: ManifestName, probs: &probs}
	root := y.load(manifest)
	if root == nil || root.Kind != yaml.MappingNode {
		return r
	}
	y.each(root, ManifestName, func(k, v *yaml.Node) {
		before, read := len(probs), r
		switch known := y.rule(&read, k.Value, v); {
		case !known:
		case len(probs) == before:
			r = read
		case k.Value == approvalsKey:
			r.Approvals = 1
		case r.Unread == "":
			r.Unread = probs[before].String()
		}
	})
	return r
}
