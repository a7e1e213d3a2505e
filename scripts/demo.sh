#!/bin/sh
# Tells the story of the example shop with the real service: starts a server with a private
# database, asks it, shows its answers and its records, and stops it. Fails if an answer is not
# the expected one.
#
#   scripts/demo.sh bin/cedarpost
set -eu

# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
cedarpost=${1:?usage: scripts/demo.sh path/to/cedarpost}

begin

# ask EXPECTED-CODE WORD ARGUMENTS... shows the command and its output, and fails
# unless the exit code is the expected one and the first line begins with WORD.
ask() {
    want=$1
    word=$2
    shift 2
    printf '$ cedarpost'
    for argument; do
        case $argument in
        *[!A-Za-z0-9_./:,=-]*) printf " '%s'" "$argument" ;;
        *) printf ' %s' "$argument" ;;
        esac
    done
    echo
    code=0
    answer=$("$cedarpost" "$@") || code=$?
    printf '%s\n' "$answer"
    [ "$code" -eq "$want" ] || fail "exit code $code, expected $want"
    case $answer in
    "$word"*) ;;
    *) fail "expected $word" ;;
    esac
}

# line LABEL VALUE fails unless the last answer has that line.
line() {
    printf '%s\n' "$answer" | grep -Eq "^  $1 +$2\$" || fail "expected $1: $2"
}

say "A server with a private Postgres and the example bundle."
echo "\$ cedarpost dev --data $dir/data"
start dev dev --data "$dir/data"
cat "$dir/dev"
# shellcheck source=/dev/null
. "$dir/data/dev.env"

say "Bob looks at order 42, which is his: all that customers may see, and nothing internal."
ask 0 ALLOW authorize --principal Shop::User::bob --action Shop::Action::ViewOrder \
    --resource Shop::Order::42 --context '{"mfa": false}' --fields all
line permitted "customer.email, customer.name, id, items, shipping.address, status, total"
line denied "internal.margin, internal.notes"

say "Bob changes the number in the URL to 99, which is Carol's order."
ask 5 "DENY at OBJECT" authorize --principal Shop::User::bob --action Shop::Action::ViewOrder \
    --resource Shop::Order::99 --context '{"mfa": false}' --fields all
line permitted "\(none\)"

say "Alice of support sees the basics of Bob's order. Personal data needs a second factor, says the advice."
ask 0 ALLOW authorize --principal Shop::User::alice --action Shop::Action::ViewOrder \
    --resource Shop::Order::42 --context '{"mfa": false}' --fields id,status,items,total,customer.name,customer.email
line permitted "id, items, status"
line denied "customer.email, customer.name, total"
line advice "step_up_mfa \(shop/pii-needs-mfa\) for customer.email, customer.name"

say "Alice asks again with her second factor: now she sees whom to call, but still no money."
ask 0 ALLOW authorize --principal Shop::User::alice --action Shop::Action::ViewOrder \
    --resource Shop::Order::42 --context '{"mfa": true}' --fields id,status,items,total,customer.name,customer.email
line permitted "customer.email, customer.name, id, items, status"
line denied "total"

say "Alice tries to delete the order. No order at all is hers to delete, so it is the function that is denied."
ask 5 "DENY at FUNCTION" authorize --principal Shop::User::alice --action Shop::Action::DeleteOrder \
    --resource Shop::Order::42 --context '{"mfa": true}'

say "Every answer above was recorded before it was given."
ask 0 TIME decisions --limit 10
rows=$(printf '%s\n' "$answer" | grep -c ' Shop::')
[ "$rows" -eq 5 ] || fail "$rows decisions are recorded, expected 5"

say "The whole record of the one about order 99."
id=$(printf '%s\n' "$answer" | awk '/Order::"99"/ { print $NF }')
ask 0 "DENY at OBJECT" decisions get "$id"

say "Done. The server stops now, and its database is removed. To keep one running: make dev"
