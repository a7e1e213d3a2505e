#!/bin/sh
# Makes sure that Postgres server binaries are on this machine, for the tests
# and for `cedarpost dev`, which start private servers of their own. Does
# nothing if they are here already. Starts no system service.
set -eu

# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

# found prints the folder that holds initdb and postgres, if there is one. It
# looks where `cedarpost dev` looks.
found() {
    candidates=${CEDARPOST_POSTGRES_BIN:-}
    if command -v pg_config >/dev/null 2>&1; then
        candidates="$candidates
$(pg_config --bindir 2>/dev/null || true)"
    fi
    if command -v postgres >/dev/null 2>&1; then
        candidates="$candidates
$(dirname "$(command -v postgres)")"
    fi
    for dir in \
        /usr/lib/postgresql/*/bin \
        /usr/pgsql-*/bin \
        /usr/libexec/postgresql* \
        /opt/homebrew/opt/postgresql*/bin \
        /usr/local/opt/postgresql*/bin \
        /home/linuxbrew/.linuxbrew/opt/postgresql*/bin; do
        candidates="$candidates
$dir"
    done
    echo "$candidates" | while IFS= read -r dir; do
        if [ -n "$dir" ] && [ -x "$dir/initdb" ] && [ -x "$dir/postgres" ]; then
            echo "$dir"
            break
        fi
    done
}

install_apt() {
    as_root apt-get update
    # Without this the package would create and start a cluster of its own.
    as_root apt-get install -y --no-install-recommends postgresql-common
    as_root mkdir -p /etc/postgresql-common
    conf=/etc/postgresql-common/createcluster.conf
    if ! grep -qs '^create_main_cluster *= *false' "$conf"; then
        echo 'create_main_cluster = false' | as_root tee -a "$conf" >/dev/null
    fi
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends postgresql
}

dir=$(found)
if [ -n "$dir" ]; then
    echo "install-postgres: found $dir"
    exit 0
fi

if command -v apt-get >/dev/null 2>&1; then
    install_apt
elif command -v dnf >/dev/null 2>&1; then
    as_root dnf install -y postgresql-server
elif command -v apk >/dev/null 2>&1; then
    as_root apk add --no-cache postgresql
elif command -v brew >/dev/null 2>&1; then
    brew install postgresql@17
else
    echo "install-postgres: no apt-get, dnf, apk or brew here." >&2
    echo "Install the Postgres server (15 or later) by hand, so that initdb and postgres" >&2
    echo "are in the PATH, or name their folder in CEDARPOST_POSTGRES_BIN, and run this again." >&2
    exit 1
fi

dir=$(found)
if [ -z "$dir" ]; then
    echo "install-postgres: installed, but initdb and postgres are not where they should be." >&2
    echo "Name the folder that holds them in CEDARPOST_POSTGRES_BIN." >&2
    exit 1
fi
echo "install-postgres: installed in $dir"
