#!/bin/sh
# Builds the same release twice, from copies of the source in two folders with different names, as two
# different users would, and fails if a byte differs. make release runs it with REPRODUCE=1.
#
#   scripts/check-reproducible.sh FOLDER-OF-THE-TOOLS VERSION PLATFORM...
set -eu

# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
[ $# -ge 3 ] || fail "usage: scripts/check-reproducible.sh FOLDER-OF-THE-TOOLS VERSION PLATFORM..."
tools=$(cd "$1" && pwd) version=$2
shift 2
modules=$(go env GOMODCACHE) proxy=$(go env GOPROXY) toolchain=$(go env GOTOOLCHAIN)
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT

# The second copy has another path of another length, has files of another age, and is a git
# repository of its own; it is built with an empty build cache and another umask.
for copy in a another/folder/with-a-longer-name; do
    mkdir -p "$dir/$copy"
    git ls-files -z --cached --others --exclude-standard | tar --null -T - -cf - | tar -xf - -C "$dir/$copy"
done
touch -d 2001-01-01 "$dir/another/folder/with-a-longer-name/go.mod"
git -C "$dir/another/folder/with-a-longer-name" init -q
(cd "$dir/a" && scripts/release.sh "$tools" "$version" dist "$@")
(
    cd "$dir/another/folder/with-a-longer-name"
    umask 077
    GOCACHE="$dir/cache" HOME="$dir" GOMODCACHE="$modules" GOPROXY="$proxy" GOTOOLCHAIN="$toolchain" \
        scripts/release.sh "$tools" "$version" dist "$@"
)
diff -r "$dir/a/dist" "$dir/another/folder/with-a-longer-name/dist" || fail "the two builds differ"
echo "check-reproducible: the same bytes twice:"
cat "$dir/a/dist/SHA256SUMS"
