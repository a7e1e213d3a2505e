package wire

import (
	"strings"
	"testing"

	"buf.build/go/protovalidate"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"pgregory.net/rapid"

	cedarpostv1 "github.com/cedarpost/cedarpost/proto/cedarpost/v1"
)

// edges changes texts and lists of a message, so that they are as long as a rule permits, or longer.
func edges(t *rapid.T, m protoreflect.Message) {
	fields := m.Descriptor().Fields()
	for i := range fields.Len() {
		f := fields.Get(i)
		switch {
		case f.IsMap():
		case f.IsList() && f.Kind() == protoreflect.StringKind:
			list := m.Mutable(f).List()
			if rapid.IntRange(0, 29).Draw(t, "long") == 0 {
				for range rapid.SampledFrom([]int{999, 1000}).Draw(t, "more") {
					list.Append(protoreflect.ValueOfString("p"))
				}
			}
			if list.Len() > 0 && rapid.IntRange(0, 5).Draw(t, "edge") == 0 {
				list.Set(0, protoreflect.ValueOfString(edge(t)))
			}
		case f.IsList() && f.Message() != nil:
			list := m.Mutable(f).List()
			for j := range list.Len() {
				edges(t, list.Get(j).Message())
			}
			if list.Len() > 0 && rapid.IntRange(0, 29).Draw(t, "long") == 0 {
				more := rapid.SampledFrom([]int{99, 100, 999, 1000}).Draw(t, "more")
				// A long list of long lists takes minutes, and tells no more.
				if more*proto.Size(list.Get(0).Message().Interface()) > 1<<18 {
					more = 0
				}
				for range more {
					list.Append(list.Get(0))
				}
			}
		case f.Kind() == protoreflect.StringKind && rapid.IntRange(0, 19).Draw(t, "edge") == 0:
			m.Set(f, protoreflect.ValueOfString(edge(t)))
		case f.Message() != nil && m.Has(f) && f.Message().FullName() != "google.protobuf.Struct":
			edges(t, m.Mutable(f).Message())
		}
	}
}

func edge(t *rapid.T) string {
	n := rapid.SampledFrom([]int{0, 128, 256, 512, 1024, 16384}).Draw(t, "limit") + rapid.IntRange(-1, 1).Draw(t, "beyond")
	text := strings.Repeat("x", max(n, 0))
	if rapid.IntRange(0, 5).Draw(t, "nul") == 0 {
		text += "\x00"
	}
	return text
}

// Valid says what protovalidate says, except of the token of a revision with other characters than
// ASCII: protovalidate counts characters, and decides about it.
func TestValid(t *testing.T) {
	drawn, valid := 0, 0
	rapid.Check(t, func(t *rapid.T) {
		question := func() *cedarpostv1.AuthorizeRequest {
			m := drawQuestion(t)
			if rapid.IntRange(0, 3).Draw(t, "usual") > 0 { // otherwise most are not valid
				uid := &cedarpostv1.EntityUid{Type: "T", Id: "i"}
				m.Action, m.Resource, m.RequestId = uid, uid, "r"
				if m.PrincipalToken == "" {
					m.Principal = uid
				} else {
					m.Principal = nil
				}
				if m.Fields != nil {
					m.Fields = &cedarpostv1.FieldSelection{Paths: []string{"p"}}
				}
				for _, e := range m.Entities {
					e.Uid = uid
				}
				m.Consistency, m.Explain = nil, false
			}
			return m
		}
		var m proto.Message = question()
		if rapid.Bool().Draw(t, "batch") {
			batch := &cedarpostv1.AuthorizeBatchRequest{}
			if rapid.Bool().Draw(t, "consistency") {
				batch.Consistency = drawConsistency(t)
			}
			for range rapid.SampledFrom([]int{0, 1, 2}).Draw(t, "checks") {
				batch.Checks = append(batch.Checks, question())
			}
			m = batch
		}
		edges(t, m.ProtoReflect())
		got, err := Valid(m), protovalidate.Validate(m)
		if drawn++; got {
			valid++
		}
		if got && err != nil {
			t.Fatalf("valid; protovalidate says %v", err)
		}
		if !got && err == nil && !hasOtherToken(m) {
			t.Fatalf("protovalidate takes %v", m)
		}
	})
	if t.Logf("%d of %d messages are valid", valid, drawn); valid == 0 || valid == drawn {
		t.Error("too one-sided to tell anything")
	}
	if Valid(&cedarpostv1.GetEntityRequest{}) {
		t.Error("a message that it does not know is valid")
	}
}

// hasOtherToken reports whether a token has more bytes than 128, and not more characters.
func hasOtherToken(m proto.Message) bool {
	long := func(c *cedarpostv1.Consistency) bool {
		token := c.GetAtLeastAsFresh().GetToken()
		return len(token) > 128 && len([]rune(token)) <= 128
	}
	switch m := m.(type) {
	case *cedarpostv1.AuthorizeRequest:
		return long(m.GetConsistency())
	case *cedarpostv1.AuthorizeBatchRequest:
		return long(m.GetConsistency())
	}
	return false
}
