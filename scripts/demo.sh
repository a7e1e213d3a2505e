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

# ask CODE WORD ARGUMENTS... runs a command and shows it with its output. It fails unless the exit
# code is CODE and the output begins with WORD.
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

say "Bob looks at order 42, which is his. He may see all fields for customers, and no internal ones."
ask 0 ALLOW authorize --principal Shop::User::bob --action Shop::Action::ViewOrder \
    --resource Shop::Order::42 --context '{"mfa": false}' --fields all
line permitted "customer.email, customer.name, id, items, shipping.address, status, total"
line denied "internal.margin, internal.notes"

say "Bob changes the number in the URL to 99, which is Carol's order."
ask 5 "DENY at OBJECT" authorize --principal Shop::User::bob --action Shop::Action::ViewOrder \
    --resource Shop::Order::99 --context '{"mfa": false}' --fields all
line permitted "\(none\)"

say "Alice of support sees the basic fields of Bob's order. The advice says that personal data needs a second factor."
ask 0 ALLOW authorize --principal Shop::User::alice --action Shop::Action::ViewOrder \
    --resource Shop::Order::42 --context '{"mfa": false}' --fields id,status,items,total,customer.name,customer.email
line permitted "id, items, status"
line denied "customer.email, customer.name, total"
line advice "step_up_mfa \(shop/pii-needs-mfa\) for customer.email, customer.name"

say "Alice asks again with her second factor: now she sees name and email of the customer, but not the total."
ask 0 ALLOW authorize --principal Shop::User::alice --action Shop::Action::ViewOrder \
    --resource Shop::Order::42 --context '{"mfa": true}' --fields id,status,items,total,customer.name,customer.email
line permitted "customer.email, customer.name, id, items, status"
line denied "total"

say "Alice tries to delete the order. She may not delete any order, so the denial is at FUNCTION."
ask 5 "DENY at FUNCTION" authorize --principal Shop::User::alice --action Shop::Action::DeleteOrder \
    --resource Shop::Order::42 --context '{"mfa": true}'

say "Every decision above was recorded before its answer was sent."
ask 0 TIME decisions --limit 10
rows=$(printf '%s\n' "$answer" | grep -c ' Shop::')
[ "$rows" -eq 5 ] || fail "$rows decisions are recorded, expected 5"

say "The full record of the decision about order 99."
id=$(printf '%s\n' "$answer" | awk '/Order::"99"/ { print $NF }')
ask 0 "DENY at OBJECT" decisions get "$id"

say "Done. The server stops now, and its database is removed. To keep a server running: make dev"
