#!/bin/sh
# Builds the previous release from the history of git, and upgrades its servers to this tree and back,
# under load. scripts/previous-release names its commit.
set -eu

# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"

commit=$(sed -n 's/^commit //p' scripts/previous-release)
git cat-file -e "$commit^{commit}" 2>/dev/null || fail "the commit $commit of the previous release is not here; a shallow clone lacks it: git fetch --unshallow"
binary=$PWD/.build/previous/$commit/cedarpost
if [ ! -x "$binary" ]; then
    source=$(mktemp -d)
    trap 'rm -rf "$source"' EXIT
    git archive "$commit" | tar -x -C "$source"
    mkdir -p "$(dirname "$binary")"
    (cd "$source" && CGO_ENABLED=0 go build -trimpath -o "$binary" ./cmd/cedarpost)
fi
CEDARPOST_PREVIOUS_BINARY=$binary go test -count 1 -timeout 30m -v -run '^TestUpgradeFromPreviousRelease$' ./cmd/cedarpost
