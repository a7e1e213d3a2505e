#!/bin/sh
# The restore drill: a dump is taken, a user is suspended, and the dump is restored beside.
# The suspension is lost with the writes after the dump, so whoever asks the restored
# database for an answer that knows of it must be refused. Starts a private Postgres and
# two servers, and stops them. Fails if anything is not as expected.
#
#   scripts/drill-restore.sh bin/cedarpost
set -eu

cedarpost=${1:?usage: scripts/drill-restore.sh path/to/cedarpost}

# Settings of the user's own would change the drill.
for name in $(env | sed -n 's/^\(CEDARPOST_[A-Z_]*\)=.*/\1/p'); do
    [ "$name" = CEDARPOST_POSTGRES_BIN ] || unset "$name"
done

dir=$(mktemp -d)
servers=

finish() {
    status=$?
    trap - EXIT HUP INT TERM
    for server in $servers; do # the one on the restored database first
        kill "$server" 2>/dev/null || true
        wait "$server" 2>/dev/null || true
    done
    if [ -L "$dir/data/postgres" ]; then # as root it may be elsewhere
        rm -rf "$(readlink "$dir/data/postgres")"
    fi
    rm -rf "$dir"
    exit "$status"
}
trap finish EXIT
trap 'exit 1' HUP INT TERM

say() { printf '\n# %s\n' "$*"; }

fail() {
    echo "drill: $*" >&2
    exit 1
}

# tool is the path of one of the programs that come with Postgres.
tool() {
    for bin in "${CEDARPOST_POSTGRES_BIN:-}" /usr/lib/postgresql/*/bin /usr/pgsql-*/bin /opt/homebrew/opt/postgresql*/bin /usr/local/opt/postgresql*/bin; do
        if [ -n "$bin" ] && [ -x "$bin/$1" ]; then
            echo "$bin/$1"
            return
        fi
    done
    command -v "$1" || fail "$1 is not installed"
}

# await FILE waits for the line that says ready.
await() {
    for _ in $(seq 600); do
        if grep -q '^ready' "$1"; then
            return
        fi
        sleep 0.1
    done
    cat "$1" "$1.err" >&2
    fail "a server does not start"
}

# post PLANE METHOD BODY calls a server.
post() {
    curl -s "$1/cedarpost.v1.$2" -H "Authorization: Bearer $CEDARPOST_TOKEN" -H 'Content-Type: application/json' -d "$3"
}

set_attribute() {
    post "$1" EntityService/WriteEntities "{\"operations\": [{\"setAttributes\": {\"uid\": {\"type\": \"Shop::User\", \"id\": \"$2\"}, \"attrs\": {\"suspended\": $3}}}]}"
}

# view PLANE TOKEN asks whether bob may view his order, knowing of a revision.
view() {
    post "$1" AuthorizationService/Authorize "{\"principal\": {\"type\": \"Shop::User\", \"id\": \"bob\"}, \"action\": {\"type\": \"Shop::Action\", \"id\": \"ViewOrder\"},
        \"resource\": {\"type\": \"Shop::Order\", \"id\": \"42\"}, \"context\": {\"mfa\": true}$2}"
}

# expect WORD ANSWER shows an answer, and fails unless it has the word.
expect() {
    printf '%s\n' "$2"
    case $2 in
    *"$1"*) ;;
    *) fail "expected $1" ;;
    esac
}

say "A server with a private database and the example shop."
"$cedarpost" dev --data "$dir/data" --listen 127.0.0.1:0 --admin-listen 127.0.0.1:0 --ops-listen 127.0.0.1:0 >"$dir/dev" 2>"$dir/dev.err" &
servers=$!
await "$dir/dev"
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

say "An answer that knows of the token is a denial."
expect '"DENY"' "$(view "$CEDARPOST_API_URL" "$fresh")"

say "The dump is restored beside, and served."
restored=$(printf '%s' "$CEDARPOST_DATABASE_URL" | sed 's|/cedarpost?|/drill?|')
"$(tool psql)" -q "$CEDARPOST_DATABASE_URL" -c 'create database drill'
"$(tool pg_restore)" --exit-on-error --dbname="$restored" "$dir/dump"
"$cedarpost" serve --development-database --database-url "$restored" --listen 127.0.0.1:0 --admin-listen 127.0.0.1:0 --ops-listen 127.0.0.1:0 >"$dir/serve" 2>"$dir/serve.err" &
servers="$! $servers"
await "$dir/serve"
expect 'is a copy' "$(grep 'level=WARN.*copy' "$dir/serve.err")"
api=$(sed 's/.*decision=\([^ ]*\).*/\1/' "$dir/serve")
admin=$(sed 's/.*admin=\([^ ]*\).*/\1/' "$dir/serve")

say "It knows nothing of the suspension: asked without the token, it allows."
expect '"ALLOW"' "$(view "$api" '')"

say "One unrelated write: its newest revision has the number of the lost one."
expect '"token"' "$(set_attribute "$admin" alice true)"

say "An answer that knows of the token is refused."
expect '"aborted"' "$(view "$api" "$fresh")"

say "The original still denies."
expect '"DENY"' "$(view "$CEDARPOST_API_URL" "$fresh")"

say "The log of the restored database says that it is a copy."
expect 'it is a copy' "$(CEDARPOST_ADMIN_URL=$admin "$cedarpost" events --kind database_renewed)"
echo
