#!/bin/sh
# Installs Node.js and npm, for the tests that run the reference implementation of Cedar, unless
# they are there already.
set -eu

# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

MINIMUM=20

# usable succeeds if node is new enough and npm is there.
usable() {
    command -v node >/dev/null 2>&1 && command -v npm >/dev/null 2>&1 || return 1
    version=$(node --version)
    major=${version#v}
    [ "${major%%.*}" -ge "$MINIMUM" ]
}

by_hand() {
    echo "Install Node.js $MINIMUM or later by hand, so that node and npm are in the PATH," >&2
    echo "and run this again." >&2
    exit 1
}

if usable; then
    echo "install-node: found $(command -v node) $(node --version)"
    exit 0
fi

if command -v apt-get >/dev/null 2>&1; then
    as_root apt-get update
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends nodejs npm
elif command -v dnf >/dev/null 2>&1; then
    as_root dnf install -y nodejs npm
elif command -v apk >/dev/null 2>&1; then
    as_root apk add --no-cache nodejs npm
elif command -v brew >/dev/null 2>&1; then
    brew install node
else
    echo "install-node: there is no apt-get, dnf, apk or brew." >&2
    by_hand
fi

hash -r
if ! usable; then
    echo "install-node: the packages of this system do not have Node.js $MINIMUM: there is $(node --version 2>/dev/null || echo none)." >&2
    by_hand
fi
echo "install-node: installed $(command -v node) $(node --version)"
