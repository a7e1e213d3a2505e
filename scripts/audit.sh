#!/bin/sh
# Checks the supply chain of cedarpost: known vulnerabilities (govulncheck), insecure code (gosec) and
# licences (go-licenses). make audit installs the pinned tools and runs it.
#
#   scripts/audit.sh FOLDER-OF-THE-TOOLS COMMAND-OF-GOLANGCI-LINT
#
# Exit codes: 0 all checks ran and found nothing, 1 a check found something, 3 no check found
# anything, but one could not run, such as govulncheck without its database. Code 1 counts before
# code 3. make itself ends with 2 in both cases, and prints the code.
#
# govulncheck asks the database of the Go project, or the one in GOVULNDB: a URL, or file:///FOLDER.
set -eu

# shellcheck source=scripts/lib.sh
. "$(dirname "$0")/lib.sh"
tools=${1:?usage: scripts/audit.sh FOLDER-OF-THE-TOOLS COMMAND-OF-GOLANGCI-LINT}
lint=${2:?usage: scripts/audit.sh FOLDER-OF-THE-TOOLS COMMAND-OF-GOLANGCI-LINT}

# All that the binary is built from may have one of these licences. None of them asks for the source
# of programs that use the code.
allowed=Apache-2.0,BSD-2-Clause,BSD-3-Clause,ISC,MIT

found='' missing=''
log=$(mktemp)
trap 'rm -f "$log"' EXIT

say "known vulnerabilities in code that is called: govulncheck"
status=0
"$tools/govulncheck" ${GOVULNDB:+-db "$GOVULNDB"} ./... >"$log" 2>&1 || status=$?
cat "$log"
case $status in
0) ;;
3) found="$found vulnerabilities" ;; # its own code for findings
*)
    missing="$missing govulncheck"
    echo "govulncheck DID NOT RUN (exit code $status): nothing is known about vulnerabilities."
    echo "If its database cannot be reached from here, copy it and set GOVULNDB=file:///FOLDER."
    ;;
esac

say "insecure code: gosec, as part of golangci-lint (.golangci.yml has what is left out, and why)"
status=0
$lint run --enable-only gosec || status=$?
case $status in
0) ;;
1) found="$found gosec" ;;
*)
    missing="$missing gosec"
    echo "gosec DID NOT RUN (exit code $status)."
    ;;
esac

say "licences of all that is built in: $allowed"
status=0
"$tools/go-licenses" check ./cmd/cedarpost --allowed_licenses="$allowed" >"$log" 2>&1 || status=$?
case $status in
0) echo "no other licence" ;;
*)
    cat "$log"
    if grep -q 'Not allowed license' "$log"; then
        found="$found licences"
    else
        missing="$missing go-licenses"
        echo "go-licenses DID NOT RUN (exit code $status)."
    fi
    ;;
esac

echo
if [ -n "$found" ]; then
    echo "audit: FINDINGS:$found${missing:+; not run:$missing}"
    exit 1
fi
if [ -n "$missing" ]; then
    echo "audit: INCOMPLETE, no findings in what ran; not run:$missing"
    exit 3
fi
echo "audit: passed"
