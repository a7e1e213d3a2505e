#!/bin/sh
# Installs h2load, the load generator of make bench-peers, unless it is there already.
set -eu

# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

by_hand() {
    echo "Install h2load (of nghttp2) by hand, so that it is in the PATH, and run this again." >&2
    exit 1
}

if command -v h2load >/dev/null 2>&1; then
    echo "install-h2load: found $(command -v h2load)"
    exit 0
fi
if command -v apt-get >/dev/null 2>&1; then
    as_root apt-get update && as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends nghttp2-client || by_hand
elif command -v dnf >/dev/null 2>&1; then
    as_root dnf install -y nghttp2 || by_hand
elif command -v apk >/dev/null 2>&1; then
    as_root apk add --no-cache nghttp2 || by_hand
elif command -v brew >/dev/null 2>&1; then
    brew install nghttp2 || by_hand
else
    echo "install-h2load: there is no apt-get, dnf, apk or brew." >&2
    by_hand
fi
hash -r
command -v h2load >/dev/null 2>&1 || by_hand
echo "install-h2load: installed $(command -v h2load)"
