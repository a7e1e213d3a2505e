#!/bin/sh
# The restore drill: takes a dump, suspends a user, and restores the dump into a second database.
# The restored database does not have the suspension, so a question that names the revision of
# the suspension must be refused there. Starts a private Postgres and two servers, and stops them.
# Fails if anything is not as expected.
#
#   scripts/drill-restore.sh bin/cedarpost
set -eu

# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
cedarpost=${1:?usage: scripts/drill-restore.sh path/to/cedarpost}

begin

# tool prints the path of a program of Postgres.
tool() {
    for bin in "${CEDARPOST_POSTGRES_BIN:-}" /usr/lib/postgresql/*/bin /usr/pgsql-*/bin /opt/homebrew/opt/postgresql*/bin /usr/local/opt/postgresql*/bin; do
        if [ -n "$bin" ] && [ -x "$bin/$1" ]; then
            echo "$bin/$1"
            return
        fi
    done
    command -v "$1" || fail "$1 is not installed"
}

# post PLANE METHOD BODY calls a server.
post() {
    curl -s "$1/cedarpost.v1.$2" -H "Authorization: Bearer $CEDARPOST_TOKEN" -H 'Content-Type: application/json' -d "$3"
}

set_attribute() {
    post "$1" EntityService/WriteEntities "{\"operations\": [{\"setAttributes\": {\"uid\": {\"type\": \"Shop::User\", \"id\": \"$2\"}, \"attrs\": {\"suspended\": $3}}}]}"
}

# view PLANE CONSISTENCY asks whether bob may view his order, at a revision or later if one is
# given.
view() {
    post "$1" AuthorizationService/Authorize "{\"principal\": {\"type\": \"Shop::User\", \"id\": \"bob\"}, \"action\": {\"type\": \"Shop::Action\", \"id\": \"ViewOrder\"},
        \"resource\": {\"type\": \"Shop::Order\", \"id\": \"42\"}, \"context\": {\"mfa\": true}$2}"
}

# expect WORD ANSWER shows an answer, and fails unless it contains the word.
expect() {
    printf '%s\n' "$2"
    case $2 in
    *"$1"*) ;;
    *) fail "expected $1" ;;
    esac
}

say "A server with a private database and the example bundle."
start dev dev --data "$dir/data"
# shellcheck source=/dev/null
. "$dir/data/dev.env"
expect '"ALLOW"' "$(view "$CEDARPOST_API_URL" '')"

say "The database is dumped."
"$(tool pg_dump)" --format=custom --file="$dir/dump" --dbname="$CEDARPOST_DATABASE_URL"
ls -l "$dir/dump" | awk '{print $5, "bytes"}'

say "Bob is suspended. The write returns a token."
written=$(set_attribute "$CEDARPOST_ADMIN_URL" bob true)
expect '"token"' "$written"
token=$(printf '%s' "$written" | sed 's/.*"token": *"\([^"]*\)".*/\1/')
fresh=", \"consistency\": {\"atLeastAsFresh\": {\"token\": \"$token\"}}"

say "Asked with the token, the server denies."
expect '"DENY"' "$(view "$CEDARPOST_API_URL" "$fresh")"

say "The dump is restored into a second database, and a second server serves it."
restored=$(printf '%s' "$CEDARPOST_DATABASE_URL" | sed 's|/cedarpost?|/drill?|')
"$(tool psql)" -q "$CEDARPOST_DATABASE_URL" -c 'create database drill'
"$(tool pg_restore)" --exit-on-error --dbname="$restored" "$dir/dump"
start serve serve --development-database --database-url "$restored"
expect 'is a copy' "$(grep 'level=WARN.*copy' "$dir/serve.err")"
api=$(sed 's/.*decision=\([^ ]*\).*/\1/' "$dir/serve")
admin=$(sed 's/.*admin=\([^ ]*\).*/\1/' "$dir/serve")

say "The second database does not have the suspension: asked without the token, its server allows."
expect '"ALLOW"' "$(view "$api" '')"

say "One unrelated write there: its newest revision now has the number of the lost one."
expect '"token"' "$(set_attribute "$admin" alice true)"

say "Asked with the token, the second server refuses."
expect '"aborted"' "$(view "$api" "$fresh")"

say "The original still denies."
expect '"DENY"' "$(view "$CEDARPOST_API_URL" "$fresh")"

say "The log of the second database says that it is a copy."
expect 'it is a copy' "$(CEDARPOST_ADMIN_URL=$admin "$cedarpost" events --kind database_renewed)"
echo
