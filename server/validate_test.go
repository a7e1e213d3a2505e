package server

import (
	"strings"
	"testing"

	"buf.build/gen/go/bufbuild/protovalidate/protocolbuffers/go/buf/validate"
	"buf.build/go/protovalidate"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// An error about a pattern of the contract names the value and says in words what is expected.
func TestPatternsHaveWords(t *testing.T) {
	used := map[string]bool{}
	for _, file := range []protoreflect.FileDescriptor{
		cedarpostv1.File_cedarpost_v1_authorization_proto, cedarpostv1.File_cedarpost_v1_entity_proto, cedarpostv1.File_cedarpost_v1_policy_proto,
		cedarpostv1.File_cedarpost_v1_audit_proto, cedarpostv1.File_cedarpost_v1_access_proto,
	} {
		for i := range file.Messages().Len() {
			for j := range file.Messages().Get(i).Fields().Len() {
				field := file.Messages().Get(i).Fields().Get(j)
				rules, _ := proto.GetExtension(field.Options(), validate.E_Field).(*validate.FieldRules)
				if pattern := rules.GetString().GetPattern(); pattern != "" {
					used[pattern] = true
					if patterns[pattern] == "" {
						t.Errorf("%s: nothing says what %s means", field.FullName(), pattern)
					}
				}
			}
		}
	}
	if len(used) != len(patterns) {
		t.Errorf("%d patterns are used, and %d explained", len(used), len(patterns))
	}
	err := validator{protovalidate.GlobalValidator}.Validate(&cedarpostv1.PutGrantRequest{Grant: &cedarpostv1.Grant{Caller: "x", Role: "Enforcer", Bundle: "Shop"}})
	for _, part := range []string{`grant.role: "Enforcer" is not a role; the roles are enforcer, data-writer`, `grant.bundle: "Shop" is not the name of a bundle`, ", or *"} {
		if err == nil || !strings.Contains(err.Error(), part) {
			t.Errorf("%v, want %q", err, part)
		}
	}
}
