package cedarpost

import (
	"fmt"

	"github.com/cedarpost/cedarpost/internal/entityuid"
)

// EntityUID names an entity, such as a principal, an action or a resource, by its type with
// the namespace and its id.
type EntityUID struct{ Type, ID string }

// UID returns the name of an entity: UID("Shop::User", "bob") is Shop::User::"bob".
func UID(typ, id string) EntityUID { return EntityUID{typ, id} }

// String is the name as Cedar text: Shop::User::"bob".
func (u EntityUID) String() string { return entityuid.Format(u.Type, u.ID) }

// ParseUID reads a name from Cedar text, with the escapes of Cedar's strings:
// Shop::User::"bob".
func ParseUID(text string) (EntityUID, error) {
	typ, id, err := entityuid.Parse(text)
	if err != nil {
		return EntityUID{}, fmt.Errorf("%q: %w", text, err)
	}
	return EntityUID{typ, id}, nil
}
