#!/usr/bin/env bash
# Compares the allocations and bytes of each call on the path of a decision with the figures in
# bench/gate.txt, and fails if one has grown by more than a tenth. These figures hardly depend on the
# machine. With UPDATE=1 it writes the file. It also fails if traces add more than 2 % to the
# allocations or bytes of a call that is not sampled.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

file=bench/gate.txt
# The cheap calls run more often, so that what happens once does not count.
bench() { go test -run '^$' -bench "^Benchmark($1)\$" -benchmem -benchtime "$2" "${@:3}"; }
out=$(bench 'Authorize|AuthorizeUnsampled' 2000x ./server && bench 'Gate|ReadJSON|AppendJSON' 20000x ./server ./server/wire)
figures=$(awk '/^Benchmark/ && $1 !~ /protojson/ { sub(/-[0-9]+$/, "", $1); print $1, $(NF-1), $(NF-3) }' <<<"$out")
if [[ $(wc -l <<<"$figures") -ne 5 ]]; then
	echo "bench-gate: expected the figures of 5 benchmarks:" >&2
	echo "$out" >&2
	exit 1
fi
if [[ ${UPDATE:-} ]]; then
	{
		echo "# benchmark, allocations and bytes of one call; make bench-gate compares them, make bench-gate UPDATE=1 writes them"
		echo "$figures"
	} >"$file"
fi
awk '
	/^#/ { next }
	NR == FNR { allocs[$1] = $2; bytes[$1] = $3; next }
	!($1 in allocs) { print "bench-gate: bench/gate.txt has no figures of " $1 > "/dev/stderr"; bad = 1; next }
	{
		printf "%-22s %5d allocations (%d in the file), %6d bytes (%d)\n", $1, $2, allocs[$1], $3, bytes[$1]
		if ($2 > allocs[$1] * 1.1 || $3 > bytes[$1] * 1.1) {
			print "bench-gate: " $1 " has grown by more than a tenth; save some of it, or run make bench-gate UPDATE=1 and say in the commit why" > "/dev/stderr"
			bad = 1
		}
	}
	$1 == "BenchmarkAuthorize" { base = $2; baseBytes = $3 }
	$1 == "BenchmarkAuthorizeUnsampled" && ($2 > base * 1.02 || $3 > baseBytes * 1.02) {
		print "bench-gate: traces cost a call that is not sampled more than 2 % of its allocations or bytes" > "/dev/stderr"
		bad = 1
	}
	END { exit bad }' "$file" <(echo "$figures")
