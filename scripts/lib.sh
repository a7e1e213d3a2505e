# Functions that the scripts of this folder share. They source this file.

script=$(basename "$0" .sh)

# fail MESSAGE ends the script with an error.
fail() {
    echo "$script: $*" >&2
    exit 1
}

# say prints a headline of a story.
say() { printf '\n# %s\n' "$*"; }

# as_root runs a command as root, or says that it cannot.
as_root() {
    if [ "$(id -u)" -eq 0 ]; then
        "$@"
    elif command -v sudo >/dev/null 2>&1; then
        sudo "$@"
    else
        echo "$script: needs root for: $*" >&2
        return 1
    fi
}

# begin makes the folder $dir for a story of real servers. When the script ends, the servers in
# $servers are stopped, the last one first, and the folder is removed.
begin() {
    # The settings of the user would change the story.
    for name in $(env | sed -n 's/^\(CEDARPOST_[A-Z_]*\)=.*/\1/p'); do
        [ "$name" = CEDARPOST_POSTGRES_BIN ] || unset "$name"
    done
    dir=$(mktemp -d)
    servers=
    trap finish EXIT
    trap 'exit 1' HUP INT TERM
}

finish() {
    status=$?
    trap - EXIT HUP INT TERM
    for server in $servers; do
        kill "$server" 2>/dev/null || true
        wait "$server" 2>/dev/null || true
    done
    # If root runs the script, the database is in another folder behind a link (see store/localpg).
    if [ -L "$dir/data/postgres" ]; then
        rm -rf "$(readlink "$dir/data/postgres")"
    fi
    rm -rf "$dir"
    exit "$status"
}

# start NAME COMMAND ARGUMENTS... starts a server on free ports and waits for its line that says
# ready, in $dir/NAME. Its log is in $dir/NAME.err.
start() {
    out=$dir/$1
    shift
    "$cedarpost" "$@" --listen 127.0.0.1:0 --admin-listen 127.0.0.1:0 --ops-listen 127.0.0.1:0 >"$out" 2>"$out.err" &
    servers="$! $servers"
    tries=0
    until grep -qs '^ready' "$out"; do
        tries=$((tries + 1))
        if [ "$tries" -gt 600 ] || ! kill -0 "${servers%% *}" 2>/dev/null; then
            cat "$out" "$out.err" >&2
            fail "the server did not get ready"
        fi
        sleep 0.1
    done
}
