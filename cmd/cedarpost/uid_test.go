package main

import (
	"testing"
)

func TestUID(t *testing.T) {
	for text, want := range map[string]string{
		`Shop::User::bob`:             `Shop::User::"bob"`,
		`Shop::User::"bob"`:           `Shop::User::"bob"`,
		`User::b o b`:                 `User::"b o b"`,
		`User::back\slash`:            `User::"back\\slash"`,
		`Shop::User::bob@example.com`: `Shop::User::"bob@example.com"`,
		`Shop::User::""`:              `Shop::User::""`,
		`bob`:                         "",
		`User::`:                      "",
		`::bob`:                       "",
		`Us er::bob`:                  "",
		`User::"bob`:                  "",
	} {
		var u uid
		err := u.UnmarshalText([]byte(text))
		if want == "" {
			if err == nil {
				t.Errorf("%s: %s, want an error", text, uidText(u.EntityUid))
			}
		} else if err != nil || uidText(u.EntityUid) != want {
			t.Errorf("%s: %s, %v, want %s", text, uidText(u.EntityUid), err, want)
		}
	}
}
