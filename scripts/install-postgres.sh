#!/bin/sh
# Installs the Postgres server binaries, unless they are there already. The tests and
# `cedarpost dev` start private servers with them. Starts no system service.
set -eu

# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

# found prints the folder with initdb and postgres, if there is one. It looks in the same folders as
# `cedarpost dev`.
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
    # Without this setting, the package would create and start a cluster of its own.
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
    echo "install-postgres: there is no apt-get, dnf, apk or brew." >&2
    echo "Install the Postgres server (15 or later) by hand, so that initdb and postgres" >&2
    echo "are in the PATH, or name their folder in CEDARPOST_POSTGRES_BIN, and run this again." >&2
    exit 1
fi

dir=$(found)
if [ -z "$dir" ]; then
    echo "install-postgres: installed, but initdb and postgres are in none of the known folders." >&2
    echo "Name their folder in CEDARPOST_POSTGRES_BIN." >&2
    exit 1
fi
echo "install-postgres: installed in $dir"
