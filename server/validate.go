package server

import (
	"errors"
	"fmt"
	"strings"

	"buf.build/go/protovalidate"
	"google.golang.org/protobuf/proto"

	"github.com/cedarpost/cedarpost/server/access"
	"github.com/cedarpost/cedarpost/server/wire"
)

// validator is protovalidate, with a quick check before it: most questions need no more than that.
type validator struct{ protovalidate.Validator }

// Validate implements protovalidate.Validator.
func (v validator) Validate(msg proto.Message, options ...protovalidate.ValidationOption) error {
	if wire.Valid(msg) {
		return nil
	}
	err := v.Validator.Validate(msg, options...)
	if bad, ok := errors.AsType[*protovalidate.ValidationError](err); ok {
		for _, violation := range bad.Violations {
			if violation.Proto.GetRuleId() == "string.pattern" && violation.RuleValue.IsValid() {
				violation.Proto.SetMessage(fmt.Sprintf("%q is not %s", violation.FieldValue.String(), patterns[violation.RuleValue.String()]))
			}
		}
	}
	return err
}

const bundleForm = "the name of a bundle, which has at most 64 lower-case letters, digits, dots, hyphens and underscores, and begins with a letter or a digit"

// patterns says in words what the patterns of the contract demand.
var patterns = map[string]string{
	"^([a-z0-9][a-z0-9._-]{0,63}-r[0-9a-f]{16})?$": `the id of a report, which is the name of its bundle, "-r" and 16 hexadecimal digits, or absent`,
	"^[a-z0-9][a-z0-9._-]{0,63}-r[0-9a-f]{16}$":    `the id of a report, which is the name of its bundle, "-r" and 16 hexadecimal digits`,
	`^[a-z0-9][a-z0-9._-]{0,63}$`:                  bundleForm,
	`^([a-z0-9][a-z0-9._-]{0,63})?$`:               bundleForm + ", or absent",
	`^(\*|[a-z0-9][a-z0-9._-]{0,63})$`:             bundleForm + ", or *",
	`^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$`:            "the name of a caller, which has at most 64 letters, digits, dots, hyphens and underscores, and begins with a letter or a digit",
	`^[a-z][a-z-]{0,31}$`:                          "a role; the roles are " + strings.Join(access.Roles(), ", "),

	`^[a-z0-9][a-z0-9._-]{0,63}-[1-9][0-9]{0,17}$`: `the id of a change, which is the name of its bundle and a number, like "shop-12"`,
	`^[0-9a-f]{64}$`:    "a digest, which has 64 hexadecimal digits in lower case",
	`^([0-9a-f]{64})?$`: "a digest, which has 64 hexadecimal digits in lower case, or absent",
}
