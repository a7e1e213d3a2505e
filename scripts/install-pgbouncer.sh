#!/bin/sh
# Installs PgBouncer, for the tests that put a connection pooler in front of the database, unless it
# is there already. Starts no system service.
set -eu

# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

# found prints the path of the program, if it is there. It looks in the same folders as
# store/storetest, because the folder of the package is not in every PATH.
found() {
    for name in pgbouncer /usr/sbin/pgbouncer /usr/local/sbin/pgbouncer /opt/homebrew/bin/pgbouncer /usr/local/bin/pgbouncer; do
        if command -v "$name" >/dev/null 2>&1; then
            command -v "$name"
            return
        fi
    done
}

by_hand() {
    echo "Install PgBouncer by hand, so that pgbouncer is in the PATH, and run this again." >&2
    exit 1
}

# install_apt prevents the package from starting a PgBouncer of its own, which would have no
# database.
install_apt() {
    as_root apt-get update
    policy=/usr/sbin/policy-rc.d
    if [ -e "$policy" ]; then
        as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends pgbouncer
        return
    fi
    printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
    as_root chmod 755 "$policy"
    status=0
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends pgbouncer || status=$?
    as_root rm -f "$policy"
    return "$status"
}

program=$(found)
if [ -n "$program" ]; then
    echo "install-pgbouncer: found $program"
    exit 0
fi

if command -v apt-get >/dev/null 2>&1; then
    install_apt || by_hand
elif command -v dnf >/dev/null 2>&1; then
    as_root dnf install -y pgbouncer || by_hand
elif command -v apk >/dev/null 2>&1; then
    as_root apk add --no-cache pgbouncer || by_hand
elif command -v brew >/dev/null 2>&1; then
    brew install pgbouncer || by_hand
else
    echo "install-pgbouncer: there is no apt-get, dnf, apk or brew." >&2
    by_hand
fi

hash -r
program=$(found)
if [ -z "$program" ]; then
    echo "install-pgbouncer: installed, but pgbouncer is in none of the known folders." >&2
    by_hand
fi
echo "install-pgbouncer: installed $program"
