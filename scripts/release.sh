#!/bin/sh
# Builds the files of a release into a folder: for each platform the binary and its list of components
# (SBOM, CycloneDX 1.6 in JSON), and the checksums of all. The bytes depend on the source, the version,
# the Go toolchain and the tools alone, and not on the folder, the time, the user or git. make release
# installs the pinned tools and runs it; scripts/check-reproducible.sh builds twice and compares.
#
#   scripts/release.sh FOLDER-OF-THE-TOOLS VERSION FOLDER PLATFORM...      PLATFORM: linux/amd64
set -eu

# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
[ $# -ge 4 ] || fail "usage: scripts/release.sh FOLDER-OF-THE-TOOLS VERSION FOLDER PLATFORM..."
tools=$1 version=$2 out=$3
shift 3
case $version in
devel) ;;
v[0-9]*.[0-9]*.[0-9]*) ;;
*) fail "$version is not a version like v1.2.3" ;;
esac
rm -rf "$out"
mkdir -p "$out"

# Settings of the user would change the result.
unset GOAMD64 GOARM64 GOEXPERIMENT GOFLAGS CGO_CFLAGS CGO_LDFLAGS GOFIPS140
export CGO_ENABLED=0 GOFLAGS='-trimpath -buildvcs=false -mod=readonly' GOENV=off GOWORK=off

for platform in "$@"; do
    export GOOS="${platform%/*}" GOARCH="${platform#*/}"
    name=cedarpost_${version}_${GOOS}_${GOARCH}
    go build -ldflags="-X main.release=$version" -o "$out/$name" ./cmd/cedarpost
    # Licences come from the module cache. The module of cedarpost itself is not in it, and the tool
    # warns about that; its warnings are shown only if it fails.
    "$tools/cyclonedx-gomod" bin -json -std -licenses -noserial -notimestamp -version "$version" \
        -output "$out/$name.cdx.json" "$out/$name" 2>"$out/sbom.log" || {
        cat "$out/sbom.log" >&2
        fail "no SBOM of $name"
    }
    rm "$out/sbom.log"
    echo "$out/$name"
done
(cd "$out" && sha256sum -- cedarpost_* >SHA256SUMS)
echo "$out/SHA256SUMS"
