#!/bin/sh
# Installs the OpenSSH client, for the tests that sign the log with a key of an ssh-agent, unless it is
# there already. Starts no service.
set -eu

# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

found() {
    for name in ssh-agent ssh-add ssh-keygen; do
        command -v "$name" >/dev/null 2>&1 || return 1
    done
}

by_hand() {
    echo "Install the OpenSSH client by hand, so that ssh-agent, ssh-add and ssh-keygen are in the PATH, and run this again." >&2
    exit 1
}

if found; then
    echo "install-ssh-agent: found $(command -v ssh-agent)"
    exit 0
fi
if command -v apt-get >/dev/null 2>&1; then
    as_root apt-get update && as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends openssh-client || by_hand
elif command -v dnf >/dev/null 2>&1; then
    as_root dnf install -y openssh-clients || by_hand
elif command -v apk >/dev/null 2>&1; then
    as_root apk add --no-cache openssh-client || by_hand
else
    echo "install-ssh-agent: there is no apt-get, dnf or apk." >&2
    by_hand
fi
hash -r
found || by_hand
echo "install-ssh-agent: installed $(command -v ssh-agent)"
